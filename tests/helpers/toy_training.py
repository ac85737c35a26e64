"""A third training on the loop: three toy networks, two optimisers, two moving averages, without Ray.

One engine moves an encoder and a decoder, the other a critic, every second step. As a program it runs on two
ranks, whole into FOLDER/a, killed twice and resumed into FOLDER/b: -m tests.helpers.toy_training FOLDER
"""

import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.store import hashing, storage
from pipeline.training.runs import loop, trainer
from pipeline.training.state import ranks
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.step_guard import FaultConfig
from tests.helpers.ranks import NoRequests, process_group

WIDTH, SAMPLES = 6, 8


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The settings that the loop reads."""

    output: str
    stages: tuple[int, ...] = (5, 7)
    """steps of each"""
    checkpoint_every: int = 3
    keep_last: int = 2
    keep_every: int = 0
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    wandb: str | None = None
    nan_from: int = 10**9
    """the step from which samples are not finite"""

    @property
    def total_steps(self) -> int:
        return sum(self.stages)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)
    return {"codec": nn.Sequential(encoder, nn.Tanh(), decoder), "critic": nn.Linear(WIDTH, 1)}


def build(config: ToyConfig) -> loop.Training:
    scale = trainer.ScaleConfig(num_workers=ranks.world_size(), zero_stage=2)
    optimiser = trainer.OptimiserConfig(ema_decay=0.9)
    engines = {
        name: trainer.make_engine(module, scale, optimiser, accumulation=1)
        for name, module in networks().items()
    }
    averages = {name: MovingAverage(engine, 0.9) for name, engine in engines.items()}

    def save_weights(url: str, state: loop.State) -> None:
        for name, average in averages.items():
            tensors = average.collected()
            if ranks.rank() == 0:
                values = {key: tensor.tolist() for key, tensor in tensors.items()}
                storage.write_json(f"{url}/{name}.json", values)

    return loop.Training(
        name="codec",
        device=torch.device("cpu"),
        engines=engines,
        averages=averages,
        fresh={"seen": 0},
        open_stage=functools.partial(open_stage, config, engines, averages),
        save_weights=save_weights,
    )


def samples(step: int) -> Tensor:
    """This rank's, (SAMPLES, WIDTH)."""
    seed = hashing.stable_hash("toy", step, ranks.rank())
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(seed))


def open_stage(
    config: ToyConfig, engines: dict[str, Any], averages: dict[str, MovingAverage], state: loop.State
) -> loop.Stage:
    @torch.no_grad()
    def held_out() -> dict[str, float]:
        x = samples(-1)
        codec, critic = (averages[name].gathered() for name in ("codec", "critic"))
        error = (functional_call(engines["codec"].module, codec, (x,)) - x).square().mean()
        return {"loss": float(ranks.all_reduced(error)), "critic": float(critic["bias"])}

    return loop.Stage(
        name=f"part {state['stage']}",
        steps=config.stages[state["stage"]],
        step=lambda: train_step(config, engines, state),
        held_out=held_out,
        held_out_set={"samples": SAMPLES},
        validate=lambda: (held_out(), {}),
        validate_every=4,
    )


def train_step(config: ToyConfig, engines: dict[str, Any], state: loop.State) -> loop.StepResult:
    start = time.monotonic()
    x = samples(state["step"])
    if state["step"] >= config.nan_from:
        x = x * torch.nan
    waited_s = time.monotonic() - start
    for engine in engines.values():
        trainer.set_learning_rate(engine, 0.02)
    codec, critic = engines["codec"], engines["critic"]
    loss = (codec(x) - x).square().mean()
    codec.backward(loss)
    codec.step()
    if state["step"] % 2:
        critic_loss = (critic(x).mean() - 1).square()
        critic.backward(critic_loss)
        critic.step()
    state["seen"] += len(x)
    mean = float(ranks.all_reduced(loss)) / ranks.world_size()
    return loop.StepResult(mean, len(x) * ranks.world_size(), 0.02, waited_s, {"seen": state["seen"]})


def dying(training: loop.Training, last_step: int) -> loop.Training:
    """The same, killed with SIGKILL when it begins step `last_step`."""

    def opened(state: loop.State) -> loop.Stage:
        stage = training.open_stage(state)

        def step() -> loop.StepResult:
            if state["step"] == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return stage.step()

        return dataclasses.replace(stage, step=step)

    return dataclasses.replace(training, open_stage=opened)


def run_rank(folder: Path, name: str, output: str, rank: int, last_step: int | None) -> None:
    with (folder / f"{name}-{rank}.log").open("w") as log, process_group(f"{folder}/{name}", rank, 2):
        os.dup2(log.fileno(), 1)

        def make(config: ToyConfig) -> loop.Training:
            return build(config) if last_step is None else dying(build(config), last_step)

        loop.run(make, ToyConfig(f"file://{folder}/{output}"), NoRequests())


def on_two_ranks(folder: Path, name: str, output: str, last_step: int | None = None) -> list[int | None]:
    """Exit codes of two ranks, forked: they need not import everything again."""
    fork = multiprocessing.get_context("fork")
    arguments = [(folder, name, output, rank, last_step) for rank in (0, 1)]
    processes = [fork.Process(target=run_rank, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")
    here = Path(sys.argv[1])
    codes = {
        "whole": on_two_ranks(here, "whole", "a"),
        # After a checkpoint within the first stage, then in the second one.
        "killed": on_two_ranks(here, "killed", "b", last_step=4),
        "killed again": on_two_ranks(here, "killed again", "b", last_step=8),
        "resumed": on_two_ranks(here, "resumed", "b"),
    }
    (here / "codes.json").write_text(json.dumps(codes))
