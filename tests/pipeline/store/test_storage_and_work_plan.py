import json
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from pipeline.runtime import work_plan
from pipeline.store import bf16_columns, delta_tables, hashing, schema, storage

TABLE = pa.schema([("row_id", pa.string()), ("data", pa.large_binary())])


def rows(count: int, first: int = 0) -> list[dict]:
    return [{"row_id": f"r{i:04d}"} for i in range(first, first + count)]


def plan(folder: str, planned: list[dict], rows_per_shard: int = 8) -> list[work_plan.Shard]:
    return work_plan.plan(folder, planned, "row_id", "f", rows_per_shard).pending


def make(folder: str, pending: list[work_plan.Shard], killed: bool = False) -> None:
    """killed: before what is written is committed."""
    table_schema = schema.with_fingerprint(TABLE, "f")
    made = lambda planned: [{**row, "data": row["row_id"].encode()} for row in planned]  # noqa: E731
    reports = [work_plan.make_shard(folder, shard.to_json(), table_schema, made) for shard in pending]
    if not killed:
        work_plan.commit(folder, table_schema, reports)


def ids(folder: str) -> list[str]:
    table = delta_tables.read(folder, ["row_id"])
    return [] if table is None else table.column("row_id").to_pylist()


def test_what_was_made_is_never_made_again_and_additions_only_add(tmp_path):
    folder = f"file://{tmp_path}/table"
    pending = plan(folder, rows(50))
    make(folder, pending[:2])
    make(folder, pending[2:3], killed=True)
    again = plan(folder, rows(50))
    assert [shard.name for shard in again] == [shard.name for shard in pending[3:]]
    make(folder, again)
    assert sorted(ids(folder)) == [row["row_id"] for row in rows(50)]
    table = delta_tables.open_table(folder)
    assert table is not None
    before = {url: os.stat(storage.path_of(url)).st_mtime_ns for url in table.urls}
    more = plan(folder, rows(60))
    planned = [row for shard in more for row in work_plan.read_shard(folder, shard)]
    assert sorted(planned, key=lambda row: row["row_id"]) == rows(10, 50)
    make(folder, more)
    assert sorted(ids(folder)) == [row["row_id"] for row in rows(60)]
    assert {url: os.stat(storage.path_of(url)).st_mtime_ns for url in before} == before


def test_drivers_that_commit_at_once_put_each_file_into_the_table_once(tmp_path):
    """The one that is overtaken looks again; a late one that commits the same once more changes nothing."""
    folder = f"file://{tmp_path}/table"
    pending = plan(folder, rows(40), rows_per_shard=2)
    make(folder, pending, killed=True)
    files = delta_tables.whole_files(folder, [shard.name for shard in pending])
    table_schema = schema.with_fingerprint(TABLE, "f")
    parts = [files[:12], files[6:], files, files[3:9]]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: delta_tables.append(folder, table_schema, part), parts))
    assert sorted(ids(folder)) == [row["row_id"] for row in rows(40)]
    before = delta_tables.open_table(folder)
    delta_tables.append(folder, table_schema, files)
    assert delta_tables.open_table(folder) == before and before is not None and before.rows == 40
    assert plan(folder, rows(40)) == []


def test_a_replaced_table_keeps_its_former_versions_and_what_made_them(tmp_path):
    url = f"file://{tmp_path}/table"
    for number in range(3):
        table = pa.table({"row_id": [f"r{number}"], "data": [b""]}, schema=TABLE)
        file = delta_tables.write_file(url, f"part-{number}.parquet", [table], TABLE)
        delta_tables.replace(url, TABLE, [file], {"limit": str(number)})
    newest = delta_tables.open_table(url)
    assert newest is not None and ids(url) == ["r2"]
    former = delta_tables.open_table(url, newest.version - 1)
    assert former is not None and former.read()["row_id"].to_pylist() == ["r1"]
    assert [entry["limit"] for entry in DeltaTable(storage.path_of(url)).history(3)] == ["2", "1", "0"]


def test_rows_made_in_another_way_do_not_mix(tmp_path):
    folder = f"file://{tmp_path}/table"
    make(folder, plan(folder, rows(4)))
    with pytest.raises(ValueError, match="made with other settings or models"):
        work_plan.plan(folder, rows(4), "row_id", "g", 2)


def test_a_half_written_file_is_not_seen(tmp_path):
    folder = tmp_path / "table"
    pending = plan(f"file://{folder}", rows(10))
    (folder / f".{pending[0].name}.abc.partial").write_bytes(b"PAR1 and then the power went")
    make(f"file://{folder}", plan(f"file://{folder}", rows(10)))
    assert sorted(ids(f"file://{folder}")) == [row["row_id"] for row in rows(10)]


def test_a_walk_finds_each_file_once_whatever_links_there_are(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/one.bin").write_bytes(b"12345")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    assert list(storage.walk(f"file://{tmp_path}/a")) == [(f"file://{tmp_path}/a/b/one.bin", 5, "")]
    assert list(storage.walk(f"file://{tmp_path}/a/b/one.bin")) == [(f"file://{tmp_path}/a/b/one.bin", 5, "")]
    assert list(storage.walk(f"file://{tmp_path}/none")) == []


def test_row_groups_keep_to_their_limits(tmp_path):
    many = [{"row_id": str(i), "data": b"x"} for i in range(150)]
    assert [table.num_rows for table in work_plan.row_groups(many, TABLE)] == [64, 64, 22]
    assert schema.MAX_ROW_GROUP_BYTES <= 128 * 1024**2
    large = [{"row_id": str(i), "data": bytes(schema.MAX_ROW_GROUP_BYTES * 2 // 5)} for i in range(5)]
    assert [table.num_rows for table in work_plan.row_groups(large, TABLE)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data/clips", "relative"),
        ("s3://key:secret@bucket/x", "credentials"),
        ("http://example.org/x", "neither file:// nor s3://"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_urls_that_cannot_be_used_are_named_with_their_key(url, words):
    with pytest.raises(ValueError, match=words) as caught:
        storage.check_url(url, "output")
    assert str(caught.value).startswith("output:")
    assert "secret" not in str(caught.value)


def test_bfloat16_columns_come_back_as_they_were():
    import torch

    tensor = torch.randn(3, 4, 5).to(torch.bfloat16).float()
    columns = bf16_columns.to_columns("z", tensor)
    assert columns["z_shape"] == [3, 4, 5] and len(columns["z"]) == 2 * 60
    assert torch.equal(bf16_columns.from_columns(columns, "z"), tensor)
    with pytest.raises(ValueError, match="column z"):
        bf16_columns.from_columns({**columns, "z_shape": [3, 4, 6]}, "z")


def test_hashes_are_the_same_on_every_machine():
    assert hashing.stable_hash("a", 1) == hashing.stable_hash("a", 1) != hashing.stable_hash("a1")
    assert hashing.stable_id("clip", 5, 77) == f"{hashing.stable_hash('clip', 5, 77):016x}"
    assert 0 <= hashing.stable_hash("x") < 2**63
    assert json.loads(json.dumps(hashing.fingerprint(a=1))) != hashing.fingerprint(a=2)
