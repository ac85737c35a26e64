"""Plan, then shards: how a stage divides its rows, skips what is done and survives a kill.

A plan assigns input rows by hash to shards. One task makes one shard and writes it as
`part-<plan>-<shard>.parquet`, whole or not at all; a file that is there means done. So a stage that is
run again makes only what is missing, and rows are neither lost nor written twice. Rows of a later plan
(new clips, a looser threshold) go to new files beside the old ones.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline import schema, storage

PLANS = "_plan"
PLAN_SCHEMA = pa.schema([("id", pa.string()), ("file", pa.string()), ("row", pa.string())])


@dataclasses.dataclass(frozen=True)
class Shard:
    """One unit of work: a few planned rows and the file that they become."""

    name: str
    rows: list[dict[str, Any]]

    def to_json(self) -> str:
        """What travels to the task that makes it."""
        return json.dumps(dataclasses.asdict(self))


def check_fingerprint(folder_url: str, fingerprint: str) -> None:
    """ValueError if the folder holds rows that were made in another way."""
    files = storage.parquet_files(folder_url)
    if not files:
        return
    found = (storage.read_schema(files[0]).metadata or {}).get(schema.FINGERPRINT_KEY, b"").decode()
    if found != fingerprint:
        raise ValueError(
            f"{folder_url}: holds rows made with other settings or models (fingerprint {found or 'none'}, "
            f"now {fingerprint}); write to another folder or remove this one"
        )


def read_plans(folder_url: str) -> list[pa.Table]:
    """Every plan that was ever written for a table's folder."""
    files = storage.list_files(storage.join(folder_url, PLANS))
    return [storage.read_table(url) for url, _, _ in files if url.endswith(".parquet")]


def plan(
    folder_url: str, rows: list[dict[str, Any]], id_column: str, fingerprint: str, rows_per_shard: int
) -> list[Shard]:
    """Plan the rows that no earlier plan holds, then return every planned shard that is still to make.

    A row is what a task needs to begin with; its `id_column` is its identity. The plan is written before
    any work starts (`_plan/<plan>.parquet`), so a stage that was killed finds the same shards again, and
    a late writer of the killed run can only write the same bytes to the same name.
    """
    check_fingerprint(folder_url, fingerprint)
    planned = read_plans(folder_url)
    known = {row_id for table in planned for row_id in table.column("id").to_pylist()}
    fresh = sorted((row for row in rows if row[id_column] not in known), key=lambda row: row[id_column])
    if fresh:
        name = schema.stable_id(fingerprint, *[row[id_column] for row in fresh])[:8]
        number = -(-len(fresh) // rows_per_shard)
        table = pa.Table.from_pylist(
            [
                {
                    "id": row[id_column],
                    "file": f"part-{name}-{schema.stable_hash(row[id_column]) % number:05d}.parquet",
                    "row": json.dumps(row),
                }
                for row in fresh
            ],
            schema=PLAN_SCHEMA,
        )
        storage.write_table(storage.join(folder_url, PLANS, f"{name}.parquet"), [table], PLAN_SCHEMA)
        planned.append(table)
    made = {url.rsplit("/", 1)[1] for url in storage.parquet_files(folder_url)}
    shards: dict[str, list[dict[str, Any]]] = {}
    for table in planned:
        for row in table.to_pylist():
            if row["file"] not in made:
                shards.setdefault(row["file"], []).append(json.loads(row["row"]))
    return [Shard(name, shards[name]) for name in sorted(shards)]


def row_groups(rows: list[dict[str, Any]], table_schema: pa.Schema) -> list[pa.Table]:
    """The rows as tables of at most 64 rows and about 128 MB each."""
    groups: list[list[dict[str, Any]]] = [[]]
    size = 0
    for row in rows:
        weight = sum(len(value) for value in row.values() if isinstance(value, bytes))
        full = len(groups[-1]) >= schema.MAX_ROW_GROUP_SAMPLES or size + weight > schema.MAX_ROW_GROUP_BYTES
        if groups[-1] and full:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += weight
    return [pa.Table.from_pylist(group, schema=table_schema) for group in groups if group]


def write_shard(folder_url: str, shard: Shard, rows: list[dict[str, Any]], table_schema: pa.Schema) -> int:
    """Write one shard's rows; returns the file's bytes."""
    url = storage.join(folder_url, shard.name)
    tables = row_groups(rows, table_schema)
    storage.write_table(url, tables, table_schema)
    return sum(table.nbytes for table in tables)


@dataclasses.dataclass
class ShardReport:
    """What one task says of its shard."""

    rows: int
    errors: int
    seconds: float
    bytes: int

    def as_row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_shard(
    folder_url: str,
    shard_json: str,
    table_schema: pa.Schema,
    make_rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Turn a shard's planned rows into output rows, write them, report. Runs in one task or actor."""
    start = time.monotonic()
    shard = Shard(**json.loads(shard_json))
    rows = make_rows(shard.rows)
    size = write_shard(folder_url, shard, rows, table_schema)
    errors = sum(1 for row in rows if row.get("error"))
    return ShardReport(len(rows), errors, time.monotonic() - start, size).as_row()


def count_reasons(reasons: list[str | None]) -> dict[str, int]:
    """How often each reason stands, most frequent first; the part before ':' counts."""
    counted = Counter(reason.split(":")[0] for reason in reasons if reason)
    return dict(counted.most_common())
