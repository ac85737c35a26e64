"""Which samples a training may use, as selection/ says; and that the others keep their order."""

import dataclasses
import shutil
import uuid

import numpy as np
import pyarrow as pa
import pytest

from pipeline.store import delta_tables, schema, storage
from pipeline.training.samples import latent_reader, selected
from pipeline.training.samples.sample_order import SampleStream, pack_step
from pipeline.training.state import checkpoint
from tests.helpers.ranks import process_group, train
from tests.helpers.recording_driver import recording_build
from tests.helpers.tiny_models import DIT
from tests.helpers.trainings import dit_config, stage_config
from tests.pipeline.training.samples.test_sample_order import index

REASON = "niqe too high: 9.1 > 6"


def select(data: str, rows: list[dict]) -> None:
    """A new version of selection/."""
    table, url = pa.Table.from_pylist(rows, schema=schema.SELECTION_SCHEMA), f"{data}/selection"
    file = delta_tables.write_file(url, f"part-{uuid.uuid4().hex}.parquet", [table], schema.SELECTION_SCHEMA)
    delta_tables.replace(url, schema.SELECTION_SCHEMA, [file], {})


def decision(clip: str, split: str = "train", reason: str | None = None) -> dict:
    return {"clip_id": clip, "keep": reason is None, "reject_reason": reason, "split": split}


@pytest.fixture
def one_rank(tmp_path):
    with process_group(f"{tmp_path}/store"):
        yield


def test_rejected_held_out_and_unknown_clips_are_idle_and_the_log_says_why(tmp_path, one_rank, capsys):
    data = f"file://{tmp_path}"
    samples = pa.table({"clip_id": ["a", "b", "b", "c", "d", "a"]})
    select(data, [decision("a"), decision("b"), decision("c")])
    select(data, [decision("a"), decision("b", reason=REASON), decision("c", "held_out")])
    version = selected.newest_version(data)
    found = selected.allowed(samples, data, version, "train", "one")
    assert found.tolist() == [True, False, False, False, False, True]
    told = capsys.readouterr().out
    assert f"stage one: 4 of 6 train samples are idle, as selection/ (version {version}) says: " in told
    for part in ("2 niqe too high", "1 now held_out", "1 not in selection/"):
        assert part in told
    before = selected.allowed(samples, data, version - 1, "train", "one")  # former versions can be read
    assert before.tolist() == [True, True, True, True, False, True]
    with pytest.raises(ValueError, match=r"stages\.one: selection/ .* allows no held_out sample"):
        selected.allowed(samples.slice(0, 3), data, version, "held_out", "one")
    with pytest.raises(ValueError, match="has no selection/; run filter first"):
        selected.newest_version(f"{data}/nothing")


def test_a_rejection_without_a_reason_is_one_all_the_same(tmp_path, one_rank):
    data, samples = f"file://{tmp_path}", pa.table({"clip_id": ["a", "b"]})
    select(data, [decision("a"), decision("b") | {"keep": False}])
    found = selected.allowed(samples, data, selected.newest_version(data), "train", "one")
    assert found.tolist() == [True, False]


def test_the_others_keep_their_order_and_their_positions():
    rows = latent_reader.sample_table(index(40))
    allowed = np.arange(40) % 3 != 0
    whole, part = SampleStream(rows, 1, DIT), SampleStream(rows, 1, DIT, allowed)
    numbers = whole.numbers(0, 120)
    assert part.numbers(0, 78).tolist() == numbers[allowed[numbers]][:78].tolist()
    position, drawn = 0, []
    for _ in range(6):
        packed = pack_step(part, position, 4, 600)
        positions = sorted(number for pack in packed.packs for number in pack)
        assert all(part[one].row == whole[one].row for one in positions)
        drawn += positions
        position = packed.next_position
    assert drawn == [one for one in range(position) if allowed[whole.numbers(one, 1)[0]]]


@pytest.mark.slow
def test_a_training_that_resumes_uses_no_clip_that_was_rejected_meanwhile(latents_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(storage.path_of(latents_root), root)
    data = f"file://{root}"
    stages = [stage_config(name, 4, ["1x64x64", "5x64x64"]) for name in ("one", "two")]
    config = dit_config(data, tmp_path / "out", stages=stages[:1], checkpoint_every=2)
    train(1, tmp_path / "first", (recording_build, config))

    def newest_state() -> dict:
        folder = next(iter(checkpoint._folders(f"{config.output}/checkpoints/dit")))
        return storage.read_json(f"{folder}/state.json")

    before = newest_state()["selection_version"]
    rows = in_rows(data, "selection")
    rejected = next(row for row in rows if row["split"] == "train")
    rejected |= {"keep": False, "reject_reason": REASON}
    select(data, rows)
    train(1, tmp_path / "second", (recording_build, dataclasses.replace(config, stages=stages)))
    state = newest_state()
    assert state["selection_version"] == before + 1
    clips = {row["sample_id"]: row["clip_id"] for row in in_rows(data, "latents/_index")}
    seen = [{clips[name] for name in names} for _, names in state["seen"]]
    assert len(seen) == 8
    assert any(rejected["clip_id"] in step for step in seen[:4])
    assert not any(rejected["clip_id"] in step for step in seen[4:])


def in_rows(data: str, name: str) -> list[dict]:
    table = delta_tables.read(f"{data}/{name}")
    assert table is not None
    return table.to_pylist()
