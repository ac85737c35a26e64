"""Trainings with DeepSpeed on some ranks of this machine, without Ray."""

import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from pipeline.training.runs import loop, trainer
from pipeline.training.state import deepspeed_adapter, ranks
from pipeline.training.state.checkpoint import Checkpoints
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.step_guard import FaultConfig, StepGuard

OPTIMISER = trainer.OptimiserConfig(weight_decay=0.1, ema_decay=0.9)
SAMPLES = 8


class Net(nn.Module):
    """Odd sizes, so that hardly a parameter falls whole into one rank's share; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 13), nn.SiLU(), nn.Linear(13, 5), nn.SiLU(), nn.Linear(5, 1))
        self.register_buffer("centre", torch.tensor([0.25]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x - self.centre)


@contextlib.contextmanager
def process_group(store: str, rank: int = 0, world: int = 1) -> Iterator[None]:
    """A group of ranks, in this process for the time being; several may follow each other."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    deepspeed_adapter.join_ranks("gloo")
    try:
        yield
    finally:
        from deepspeed.utils import groups  # slow to import, not for those who only collect tests

        dist.destroy_process_group()
        groups._WORLD_GROUP = None  # DeepSpeed would take it for that of the next group


class Run:
    """One rank's training, from where its URL stands."""

    def __init__(self, url: str, stage: int = 2, offload: bool = False, **faults: Any) -> None:
        world = dist.get_world_size()
        scale = trainer.ScaleConfig(num_workers=world, zero_stage=stage, offload_optimiser=offload)
        self.engine = trainer.make_engine(Net(), scale, OPTIMISER, accumulation=2 // world)
        self.average = MovingAverage(self.engine, OPTIMISER.ema_decay)
        self.checkpoints = Checkpoints(url, "net", {"net": self.engine}, {"net": self.average}, 2, 0)
        self.state = self.checkpoints.resume({"step": 0, "losses": []})
        self.guard = StepGuard(self.engine, FaultConfig(**faults), self.state)

    def step(self, factor: float = 1.0) -> None:
        """factor: of the loss."""
        rank, world = dist.get_rank(), dist.get_world_size()
        x = torch.randn(SAMPLES, 7, generator=torch.Generator().manual_seed(self.state["step"]))
        trainer.set_learning_rate(self.engine, 0.02)
        loss = torch.zeros(())
        for share in x.chunk(2)[rank::world]:
            part = (self.engine(share).squeeze(1) - share.sin().sum(dim=1)).square().mean()
            loss += part.detach() / 2
            self.engine.backward(part * factor)
            self.engine.step()
        if self.guard.took_step(self.state["step"]):
            self.average.update(self.state["step"])
        self.state["losses"].append(float(ranks.all_reduced(loss)))
        self.state["step"] += 1

    def train(self, steps: int, every: int = 3) -> "Run":
        """Up to `steps` in all, with a save every `every`."""
        while self.state["step"] < steps:
            self.step()
            if self.state["step"] % every == 0:
                self.checkpoints.save(self.state)
        return self

    def result(self) -> tuple[list[float], dict[str, torch.Tensor]]:
        """Every step's loss, and the moving average."""
        return self.state["losses"], self.average.collected()


def _rank(rank: int, world: int, folder: str, work: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with process_group(f"{folder}/store", rank, world):
        found = work(*arguments)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


def on_ranks(world: int, folder: Path, work: Any, *arguments: Any) -> Any:
    """What `work` gives on rank 0 of a fresh group of processes, through JSON.

    They are forked from one process that has imported what ranks import, which takes each several seconds.
    """
    folder.mkdir(parents=True)
    multiprocessing.set_forkserver_preload(["tests.helpers.rank_imports"])
    processes.start_processes(
        _rank, (world, str(folder), work, arguments), nprocs=world, start_method="forkserver"
    )
    return json.loads((folder / "found.json").read_text())


class NoRequests:
    """To a loop: nobody outside asks for anything."""

    def requests(self, device: torch.device) -> tuple[bool, bool]:
        return False, False

    def saved(self, over: bool = False) -> None:
        pass


Build = Callable[[Any], loop.Training]


def _train(trainings: list[tuple[Build, Any]]) -> None:
    for build, config in trainings:
        loop.run(build, config, NoRequests())


def train(world: int, folder: Path, *trainings: tuple[Build, Any]) -> None:
    """Each of these trainings (what builds it, its config) to its end, one after the other."""
    on_ranks(world, folder, _train, list(trainings))
