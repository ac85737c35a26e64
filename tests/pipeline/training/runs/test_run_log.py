"""What a training tells: its line, its events, its charts elsewhere."""

import importlib.machinery
import resource
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.training.runs import loggers, run_log
from tests.helpers.trainings import dit_config

STEP = {"loss": 0.5, "gradient_norm": 2.0, "samples": 8, "seconds": 0.25, "wait_share": 0.01}


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def events(output) -> EventAccumulator:
    read = EventAccumulator(str(output / "tensorboard" / "dit"))
    read.Reload()
    return read


def test_a_step_is_one_line_and_its_details_are_in_tensorboard(tmp_path, capsys):
    log = run_log.Log(f"file://{tmp_path}", "dit", 4, [])
    for step in range(2):
        log.step(step, "small", STEP, {"loss_by_time/200": 0.7})
    log.close()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("step 2/4 stage small loss 0.5 grad 2 samples 8 s 0.25 wait 0.01 eta")
    read = events(tmp_path)
    assert [event.value for event in read.Scalars("samples_seen")] == [8, 16]
    assert read.Scalars("loss_by_time/200")[0].value == pytest.approx(0.7)
    assert [row["step"] for row in log.history] == [0, 1]


def test_a_resumed_log_goes_on_counting_samples(tmp_path):
    log = run_log.Log(f"file://{tmp_path}", "dit", 4, [{"step": 0, "stage": "small", **STEP}])
    log.step(1, "small", STEP)
    log.close()
    assert events(tmp_path).Scalars("samples_seen")[-1].value == 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_curves_and_not_the_training(tmp_path, capsys):
    """No file may grow beyond 2 kB for a while: writes fail as they do on a full disk."""
    log = run_log.Log(f"file://{tmp_path}", "dit", 400, [])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for step in range(200):
            log.step(step, "small", STEP)
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TensorBoard")]
    assert told and "File too large" in told[0]
    assert [row["step"] for row in log.history] == list(range(200))

    log.flush()  # there is room again
    log.step(200, "small", STEP)
    log.close()
    assert [event.step for event in events(tmp_path).Scalars("loss")][-1] == 200


def test_validation_pictures_are_in_tensorboard(tmp_path, capsys):
    log = run_log.Log(f"file://{tmp_path}", "dit", 4, [])
    log.validation(2, {"psnr": 20.0}, {"one": np.zeros((8, 24, 3), np.uint8)})
    log.close()
    assert "validation after step 2: psnr 20" in capsys.readouterr().out
    read = events(tmp_path)
    assert read.Scalars("validation/psnr")[0].value == 20
    image = read.Images("validation/one")[0]
    assert (image.height, image.width) == (8, 24)


def test_losses_are_told_apart_by_time_and_by_bucket():
    breakdown = run_log.Breakdown(["a", "b"], torch.device("cpu"))
    breakdown.add(torch.tensor([1.0, 3.0]), torch.tensor([10.0, 150.0]), ["a", "a"])
    breakdown.add(torch.tensor([5.0]), torch.tensor([1000.0]), ["b"])
    assert breakdown.means() == {
        "loss_by_time/200": 2.0,
        "loss_by_time/1000": 5.0,
        "loss_by_bucket/a": 2.0,
        "loss_by_bucket/b": 5.0,
    }


def test_weights_and_biases_get_the_same_numbers_by_config(tmp_path, monkeypatch):
    logged, started = [], {}
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **settings: started.update(settings)
    fake.log = lambda values, step: logged.append((step, values))
    fake.Image = lambda picture: picture.shape
    fake.finish = lambda: logged.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    loggers.check_wandb("restoration")
    log = run_log.Log(f"file://{tmp_path}", "dit", 4, [], "restoration", {"seed": 3})
    log.step(0, "small", STEP)
    log.validation(1, {"psnr": 20.0}, {"one": np.zeros((8, 24, 3), np.uint8)})
    log.close()
    assert started["project"] == "restoration" and started["config"] == {"seed": 3}
    assert started["resume"] == "allow" and len(started["id"]) == 16
    assert logged[0][0] == 0 and logged[0][1]["loss"] == 0.5 and logged[0][1]["samples_seen"] == 8
    assert (0, {"validation/psnr": 20.0}) in logged and (0, {"validation/one": (8, 24, 3)}) in logged
    assert logged[-1] == "finished"


def test_weights_and_biases_without_its_package_stop_before_ray(tmp_path):
    with pytest.raises(ValueError, match=r"^wandb: the package is not installed here; pip install wandb"):
        dit_config("file:///data", tmp_path, wandb="restoration")
