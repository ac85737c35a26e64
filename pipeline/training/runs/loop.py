"""The loop of every training: stages of steps, checkpoints, skipped steps, held-out loss, validation, logs.

What a training does in a step is a function in its `Training`; the loop depends on no network and no loss. A
run that is started again with the same output resumes from its newest checkpoint.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.store import storage
from pipeline.training.runs import run_log, trainer
from pipeline.training.state import control, ranks
from pipeline.training.state.checkpoint import Checkpoints
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.step_guard import FaultConfig, StepGuard, step_guards

State = dict[str, Any]
"""What a checkpoint stores besides tensors, as JSON. The loop's keys are step, stage, stage_step, history,
held_out, validation and guards; a training adds its own."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Result of a step; numbers are over all ranks."""

    loss: float
    """Mean over the step's samples."""
    samples: int
    learning_rate: float
    waited_s: float
    """Seconds that this rank waited for its data."""
    terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers for the step's line and the history."""
    per_second: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers, to be divided by the step's seconds."""
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Numbers for the charts only."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, opened at one of its steps. Every rank calls the same functions in the same order."""

    name: str
    steps: int
    step: Callable[[], StepResult]
    """Forward, backward and the engines' optimiser steps; the step's numbers are in the state."""
    held_out: Callable[[], Mapping[str, float]]
    """The moving averages' `loss` on fixed held-out samples, and other measures of it."""
    held_out_set: Mapping[str, Any]
    """Size and hash that identify the held-out set."""
    validate: Callable[[], tuple[Mapping[str, float], Mapping[str, np.ndarray]]] = lambda: ({}, {})
    """Mean scores, and uint8 (H, W, 3) pictures by name."""
    validate_every: int = 0
    """Steps of the run between two validations (0: none)."""
    close: Callable[[], None] = lambda: None
    """Called after the last step."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything specific to one training, on one rank."""

    name: str
    """Name of its folders in checkpoints/, weights/ and tensorboard/, and of its main engine."""
    device: torch.device
    engines: Mapping[str, Any]
    averages: Mapping[str, MovingAverage]
    """Moving averages by the name of their engine."""
    fresh: State
    """What it adds to the state of a new run."""
    open_stage: Callable[[State], Stage]
    """Opens the stage with index `state["stage"]` at its step `state["stage_step"]`."""
    save_weights: Callable[[str, State], None]
    """Writes the averages to a URL when all stages are done."""


class RunConfig(Protocol):
    """The settings that the loop reads from a training's config, a dataclass."""

    @property
    def output(self) -> str: ...
    @property
    def stages(self) -> Sequence[Any]: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_last(self) -> int: ...
    @property
    def keep_every(self) -> int: ...
    @property
    def faults(self) -> FaultConfig: ...
    @property
    def wandb(self) -> str | None: ...


class Control(Protocol):
    """Requests to the loop from outside: `control.WorkerControl`."""

    def requests(self, device: torch.device) -> tuple[bool, bool]: ...
    def saved(self, over: bool = False) -> None: ...


def start(build: Callable[[Any], Training], config: Any, name: str) -> None:
    """Run a training on its workers until it ends, from the driver. `build` makes one rank's part of it."""

    def on_rank(actor: Any) -> dict[str, Any] | None:
        return control.outcome(lambda: run(build, config, control.WorkerControl(actor)))

    trainer.start_trainer(on_rank, config.scale, config.output, name)


def run(build: Callable[[Any], Training], config: RunConfig, requests: Control) -> None:
    """Train all stages from the newest checkpoint on, on every rank; then write the weights.

    Raises StoppedError if a stop was requested or too many steps in a row are skipped.
    """
    training = build(config)
    checkpoints = Checkpoints(
        config.output, training.name, training.engines, training.averages, config.keep_last, config.keep_every
    )
    begin = {"step": 0, "stage": 0, "stage_step": 0, "history": [], "held_out": []}
    state = checkpoints.resume({**begin, **training.fresh})
    guards = step_guards(training.engines, config.faults, state)
    settings = dataclasses.asdict(config)  # type: ignore[call-overload]
    log = run_log.Log(
        config.output, training.name, config.total_steps, state["history"], config.wandb, settings
    )

    def save() -> None:
        log.flush()
        checkpoints.save(state)
        requests.saved()

    while state["stage"] < len(config.stages):
        stage = training.open_stage(state)
        if len(state["held_out"]) == state["stage"]:
            state["held_out"].append({"stage": stage.name, **stage.held_out_set})
            _measure(stage, state, "before")
        while state["stage_step"] < stage.steps:
            _step(training, stage, guards, state, log)
            if stage.validate_every and state["step"] % stage.validate_every == 0:
                means, pictures = stage.validate()
                state.setdefault("validation", []).append({"step": state["step"], **means})
                log.validation(state["step"], means, pictures)
            asked_to_save, asked_to_stop = requests.requests(training.device)
            if asked_to_save or state["step"] % config.checkpoint_every == 0:
                save()
            if asked_to_stop:
                told = f"saved at step {state['step']} and left; started again, it goes on"
                raise control.StoppedError(told, failed=False)
        stage.close()
        _measure(stage, state, "after")
        state |= {"stage": state["stage"] + 1, "stage_step": 0}
        save()
    log.close()
    requests.saved(over=True)
    _finish(training, config, state)


def _step(
    training: Training, stage: Stage, guards: Mapping[str, StepGuard], state: State, log: run_log.Log
) -> None:
    """Make one step of all engines, update the averages if the weights moved, and record it."""
    start = time.monotonic()
    done = stage.step()
    moved = {name: guard.took_step(state["step"]) for name, guard in guards.items()}
    for name, average in training.averages.items():
        if moved[name]:
            average.update(state["step"])
    seconds = time.monotonic() - start
    norms = {
        "gradient_norm" if name == training.name else f"gradient_norm/{name}": guard.norm
        for name, guard in guards.items()
        if guard.norm is not None
    }
    values = {
        "loss": done.loss,
        **norms,
        "learning_rate": done.learning_rate,
        "samples": done.samples,
        "seconds": seconds,
        **{key: amount / seconds for key, amount in done.per_second.items()},
        "wait_share": done.waited_s / seconds,
        **done.terms,
        "skipped": sum(guard.state["skipped"] for guard in guards.values()),
    }
    log.step(state["step"], stage.name, values, done.details)
    state["step"] += 1
    state["stage_step"] += 1


def _measure(stage: Stage, state: State, when: str) -> None:
    """Put the held-out loss into the stage's row as `when`, other measures as <measure>_<when>."""
    measures = stage.held_out()
    named = {when if key == "loss" else f"{key}_{when}": value for key, value in measures.items()}
    state["held_out"][-1] |= named
    if ranks.rank() == 0:
        told = " ".join(f"{key} {value:.4f}" for key, value in measures.items())
        print(f"held out, {when} stage {stage.name}: {told}", flush=True)


def _finish(training: Training, config: RunConfig, state: State) -> None:
    url = storage.join(config.output, trainer.WEIGHTS, training.name)
    training.save_weights(url, state)
    if ranks.rank() == 0:
        history = {"steps": state["history"], "held_out": state["held_out"]}
        history["validation"] = state.get("validation", [])
        storage.write_json(storage.join(url, trainer.HISTORY), history)
