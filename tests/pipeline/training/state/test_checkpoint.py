"""Checkpoints: exact on as many ranks, readable on any number and by any ZeRO stage, valid or passed over."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.store import storage
from pipeline.training.state import checkpoint
from pipeline.training.state.control import StoppedError
from tests.helpers import object_store
from tests.helpers.object_store import BUCKET
from tests.helpers.ranks import Run, on_ranks, process_group

STAGES = (1, 2, 3)


def plain(run: Run) -> list:
    losses, average = run.result()
    return [losses, {name: tensor.tolist() for name, tensor in average.items()}]


def folders(url: str) -> list[str]:
    return sorted(folder.rpartition("/")[2] for folder in checkpoint._folders(f"{url}/checkpoints/net"))


def whole_and_resumed(folder: str) -> dict:
    """By stage: six steps; and the same from the checkpoint after three, by another engine."""
    found = {}
    for stage in STAGES:
        url = f"file://{folder}/{stage}"
        found[f"whole {stage}"] = plain(Run(url, stage).train(6))
        if torch.distributed.get_rank() == 0:
            (newest,) = Path(folder, str(stage), "checkpoints", "net").glob("checkpoint_00000006-*")
            shutil.rmtree(newest)
            shutil.copytree(Path(folder, str(stage)), Path(folder, f"{stage} at 3"))
        torch.distributed.barrier()
        found[f"resumed {stage}"] = plain(Run(url, stage).train(6))
    return found


def resumed(folder: str, stages: dict[int, int]) -> dict:
    """Six steps, from a checkpoint after three by another number of ranks and, at last, another stage."""
    found = {}
    for wrote, reads in stages.items():
        run = Run(f"file://{folder}/{wrote} at 3", reads)
        assert run.state["step"] == 3
        found[reads] = plain(run.train(6))
    return found


def difference(found: list, expected: list) -> float:
    losses = [abs(a - b) for a, b in zip(found[0], expected[0], strict=True)]
    weights = [
        (torch.tensor(found[1][name]) - torch.tensor(value)).abs().max().item()
        for name, value in expected[1].items()
    ]
    return max(losses + weights)


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_of_any_number_of_ranks_and_any_zero_stage(tmp_path):
    two = on_ranks(2, tmp_path / "a", whole_and_resumed, str(tmp_path / "two"))
    one = on_ranks(1, tmp_path / "b", whole_and_resumed, str(tmp_path / "one"))
    for found in (two, one):
        for stage in STAGES:
            assert difference(found[f"resumed {stage}"], found[f"whole {stage}"]) <= 1e-6
            assert difference(found[f"whole {stage}"], two["whole 1"]) <= 1e-4
    same = {stage: stage for stage in STAGES}
    other = {1: 3, 2: 1, 3: 2}
    fewer = on_ranks(1, tmp_path / "c", resumed, str(tmp_path / "two"), same)
    more = on_ranks(2, tmp_path / "d", resumed, str(tmp_path / "one"), other)
    for found in (*fewer.values(), *more.values()):
        assert difference(found, two["whole 1"]) <= 1e-4


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    with process_group(str(tmp_path_factory.mktemp("group") / "store")):
        yield


@pytest.mark.slow
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(group, tmp_path, capsys):
    url = f"file://{tmp_path}"
    whole = Run(url).train(12)
    assert [name[:19] for name in folders(url)] == ["checkpoint_00000009", "checkpoint_00000012"]
    newest = next(tmp_path.glob("checkpoints/net/checkpoint_00000012-*"))
    part = newest / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    run = Run(url)
    assert run.state["step"] == 9 and "part-00000.safetensors missing or damaged" in capsys.readouterr().out
    assert difference(plain(run.train(12)), plain(whole)) <= 1e-6
    # Killed while saving: COMPLETE was to be the last.
    for folder in tmp_path.glob("checkpoints/net/checkpoint_00000012-*"):
        (folder / "COMPLETE").unlink()
    assert Run(url).state["step"] == 9
    (tmp_path / "checkpoints" / "net" / folders(url)[0] / "state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint there is whole; remove the folder"):
        Run(url)


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(group, tmp_path, capsys, monkeypatch):
    url = f"file://{tmp_path}"
    run = Run(url).train(3)
    write = checkpoint.write_part

    def full(url, tensors):
        write(url, tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_part", full)
    run.train(6)
    told = capsys.readouterr().out
    assert "step 6: no checkpoint saved, the one before stays valid: rank 0: [Errno 28] No space left" in told
    assert [name[:19] for name in folders(url)] == ["checkpoint_00000003"]
    run.train(9)
    with pytest.raises(RuntimeError, match=r"step 12: 3 checkpoints in a row were not saved: .*No space"):
        run.train(12)
    monkeypatch.undo()
    again = Run(url)
    assert again.state["step"] == 3
    again.train(6)
    assert len(folders(url)) == 2


@pytest.mark.slow
def test_every_nth_checkpoint_is_kept_beside_the_last_ones(group, tmp_path):
    run = Run(f"file://{tmp_path}")
    run.checkpoints.keep_last, run.checkpoints.keep_every = 1, 4
    run.train(11, every=2)
    assert [int(name[11:19]) for name in folders(f"file://{tmp_path}")] == [4, 8, 10]


@pytest.mark.slow
def test_checkpoints_on_s3_and_what_a_reader_finds_in_them(group, tmp_path):
    with object_store.running_store() as (host, port), object_store.reached_through(f"http://{host}:{port}"):
        whole = Run(f"s3://{BUCKET}/run").train(7)
        run = Run(f"s3://{BUCKET}/run")
        assert run.state["step"] == 6
        name = folders(f"s3://{BUCKET}/run")[-1]
        folder = f"s3://{BUCKET}/run/checkpoints/net/{name}"
        state, average = checkpoint.read_checkpoint(folder, "net", average=True)
        assert state["step"] == 6
        assert all(torch.equal(average[name], tensor) for name, tensor in run.average.collected().items())
        _, raw = checkpoint.read_checkpoint(folder, "net", average=False)
        expected = run.engine.module.state_dict()
        assert raw.keys() == expected.keys() and all(torch.equal(raw[name], expected[name]) for name in raw)
        assert difference(plain(run.train(7)), plain(whole)) <= 1e-6
    with pytest.raises(ValueError, match="no checkpoint of net here"):
        checkpoint.read_checkpoint(f"file://{tmp_path}", "net", average=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_changes_nothing_and_many_in_a_row_end_the_run(group, tmp_path, stage):
    run = Run(f"file://{tmp_path}", stage, spike_factor=20.0, skips_in_row=3).train(25)
    before = run.average.collected()
    masters = [one.master.clone() for one in run.average.fragments]
    for factor in (float("nan"), 1e4):
        run.step(factor)
    assert run.state["skipped"] == 2
    for one, master in zip(run.average.fragments, masters, strict=True):
        assert torch.equal(one.master, master)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.average.collected().items())
    run.step()
    assert run.state["skipped_in_row"] == 0
    assert not torch.equal(run.average.fragments[0].master, masters[0])
    run.step(float("inf"))
    run.step(float("nan"))
    with pytest.raises(StoppedError, match="step 31: 3 steps in a row were skipped"):
        run.step(1e6)


@pytest.mark.slow
def test_the_optimiser_in_the_hosts_memory_gives_the_same(group, tmp_path):
    expected = plain(Run(f"file://{tmp_path}/a", 2).train(4))
    Run(f"file://{tmp_path}/b", 2, offload=True).train(3)
    again = Run(f"file://{tmp_path}/b", 2, offload=True)
    assert again.state["step"] == 3
    assert difference(plain(again.train(4)), expected) <= 1e-5
    assert storage.exists(f"file://{tmp_path}/b/checkpoints/net")
