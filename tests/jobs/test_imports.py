"""What a driver must not import before its first task, nor a process that does one kind of task.

With Ray up, ingest and filter get from the command to their first task within 5 s, the other jobs within 8 s
(`python -m benchmarks.startup`). What is named here costs too much of that, or is for the workers alone.
"""

import json

import pytest

from tests.helpers.processes import ROOT, output_of

WORKERS_ONLY = (
    "deepspeed",  # 2 s with what it compiles for; only ranks train
    "torch._dynamo",  # 3 s: torchvision, transformers and every optimiser bring it
    "torchvision",
    "open_clip",
    "transformers",
    "diffusers",
    "tensorboard",  # rank 0 writes the curves
    "matplotlib",  # for a figure at the end
    "scipy.stats",  # 1 s
    "scipy.sparse",  # for the filter's duplicates, at its end
    "aiohttp",  # for s3://, when it is asked for
    "botocore",
)
WITHOUT_RAY_TRAIN = (*WORKERS_ONLY, "ray.train")  # it brings Ray Data and pandas: 1 s
WITHOUT_TORCH = (*WITHOUT_RAY_TRAIN, "torch")  # 2 s

FORBIDDEN = {
    "jobs.convert": WITHOUT_RAY_TRAIN,
    "jobs.evaluate": WORKERS_ONLY,
    "jobs.figure": (*WITHOUT_TORCH, "ray"),
    "jobs.filter": WITHOUT_TORCH,
    "jobs.ingest": WITHOUT_TORCH,
    "jobs.pairs": WITHOUT_TORCH,
    "jobs.peer": WITHOUT_TORCH,
    "jobs.plan": WORKERS_ONLY,
    "jobs.precompute": WITHOUT_RAY_TRAIN,
    "jobs.restore": WITHOUT_RAY_TRAIN,
    "jobs.train_dit": WORKERS_ONLY,
    "jobs.train_vae": WORKERS_ONLY,
    "jobs.upgrade": WITHOUT_TORCH,
    "jobs.window_study": WORKERS_ONLY,
    # Of the processes that Ray starts, and of the decoding ones.
    "pipeline.training.state.control": WITHOUT_TORCH,
    "pipeline.training.runs.ray_train_controller": (*WORKERS_ONLY, "torch"),
    "pipeline.data.sample_pixels": WITHOUT_TORCH,
    "pipeline.video.decoding": (*WITHOUT_TORCH, "ray"),
    "pipeline.data.shots": (*WITHOUT_TORCH, "ray"),
    "pipeline.data.scorers.technical": (*WITHOUT_TORCH, "ray"),
}


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules that each name brings."""
    groups: list[tuple[list[str], list[str]]] = [
        ([], []),
        (["ray", "numpy", "pyarrow.parquet", "av", "cv2"], []),
        (["torch", "ray.train"], []),
    ]
    for name, forbidden in FORBIDDEN.items():
        allowed = 0 if "ray" in forbidden else 1 if {"ray.train", "torch"} & set(forbidden) else 2
        groups[allowed][1].append(name)
    told = output_of("tests.jobs.list_imports", json.dumps(groups))
    return {name: set(modules) for name, modules in map(json.loads, told.splitlines())}


def test_every_job_is_listed():
    jobs = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__"}
    assert jobs == {name for name in FORBIDDEN if name.startswith("jobs.")}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_process_imports_no_more_than_its_start_can_wait_for(imported, name):
    assert not imported[name] & set(FORBIDDEN[name])
