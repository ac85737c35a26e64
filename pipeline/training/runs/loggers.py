"""Destinations of a training's numbers; a new one is a class like `Logger` and a line in `loggers`."""

import contextlib
import dataclasses
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.runtime import prometheus
from pipeline.store import hashing, storage

_SHORT_NAMES = {
    "tokens_per_second": "tokens/s",
    "crops_per_second": "crops/s",
    "learning_rate": "lr",
    "gradient_norm": "grad",
    "wait_share": "wait",
    "seconds": "s",
}


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """Facts about the run that loggers use."""

    output_url: str
    name: str
    """Name of the network being trained: dit or vae."""
    total_steps: int
    first_step: int
    """Step at which the run was resumed, or 0."""
    wandb: str | None
    """Project of Weights & Biases, if any."""
    settings: Mapping[str, Any]
    """the run's config"""


class Logger(Protocol):
    """One destination. Rank 0 calls these methods, in the order of steps."""

    def step(self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float]) -> None:
        """Log a step's numbers (from step 0). values: those to read; details: additional ones."""

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log scores and uint8 (H, W, 3) pictures after `step` steps."""

    def flush(self) -> None:
        """Called at every checkpoint."""

    def close(self) -> None:
        """Called at the end, after a last flush."""


def loggers(run: LoggedRun) -> list[Logger]:
    """All destinations of a run's numbers."""
    kinds: list[Callable[[LoggedRun], Logger]] = [PrintedLines, Tensorboard, Prometheus]
    if run.wandb is not None:
        kinds.append(WeightsAndBiases)
    return [kind(run) for kind in kinds]


class PrintedLines:
    """Prints one line per step."""

    def __init__(self, run: LoggedRun) -> None:
        self.run, self._started = run, time.monotonic()

    def step(self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float]) -> None:
        done, left = step + 1 - self.run.first_step, self.run.total_steps - step - 1
        eta_s = (time.monotonic() - self._started) / done * left
        head = f"step {step + 1}/{self.run.total_steps} stage {stage}"
        print(f"{head} {_line(values)} eta {eta_s:.0f} s", flush=True)

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        print(f"validation after step {step}: {_line(values)}", flush=True)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _line(values: Mapping[str, float]) -> str:
    return " ".join(f"{_SHORT_NAMES.get(key, key)} {value:.4g}" for key, value in values.items())


class Tensorboard:
    """Event files below <output>/tensorboard/<name>."""

    def __init__(self, run: LoggedRun) -> None:
        self._url = storage.join(run.output_url, "tensorboard", run.name)
        self._local = storage.path_of(self._url) if self._url.startswith("file://") else tempfile.mkdtemp()
        self._writer: Any = None
        self._open(run.first_step)

    def _open(self, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0 alone writes

        self._next_step = next_step
        with self._tolerated():
            self._writer = SummaryWriter(self._local, purge_step=next_step)

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Curves only serve people: where their disk is full, training goes on without them."""
        try:
            yield
        except OSError as error:
            self._writer = None  # its thread has ended
            print(f"TensorBoard: no events in {self._url} until the next checkpoint: {error}", flush=True)

    def step(self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float]) -> None:
        self._next_step = step + 1
        self._write({**values, **details}, step)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        with self._tolerated():
            for key, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(key, value, step)

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self._write({f"validation/{key}": value for key, value in values.items()}, step - 1)
        with self._tolerated():
            for key, picture in pictures.items():
                if self._writer is not None:
                    self._writer.add_image(f"validation/{key}", picture, step - 1, dataformats="HWC")

    def flush(self) -> None:
        """Publish the event file; start a new one if the last could not be written."""
        with self._tolerated():
            if self._writer is not None:
                self._writer.flush()
            if not self._url.startswith("file://"):
                for file in Path(self._local).iterdir():
                    storage.write_bytes(storage.join(self._url, file.name), file.read_bytes())
        if self._writer is None:
            self._open(self._next_step)

    def close(self) -> None:
        pass


class Prometheus:
    """The gauges and counters of pipeline/runtime/prometheus.py."""

    def __init__(self, run: LoggedRun) -> None:
        self._name = run.name

    def step(self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float]) -> None:
        prometheus.show_training(self._name, step, int(values["samples"]), values)

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class WeightsAndBiases:
    """Logs to a Weights & Biases project; a resumed run continues its own charts."""

    def __init__(self, run: LoggedRun) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        own_id = hashing.stable_id(run.output_url, run.name)
        self._wandb.init(
            project=run.wandb, name=run.name, id=own_id, resume="allow", config=dict(run.settings)
        )

    def step(self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float]) -> None:
        self._wandb.log({**values, **details}, step=step)

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self._wandb.log({f"validation/{key}": value for key, value in values.items()}, step=step - 1)
        images = {f"validation/{key}": self._wandb.Image(picture) for key, picture in pictures.items()}
        self._wandb.log(images, step=step - 1)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._wandb.finish()


def check_wandb(project: str | None) -> None:
    """ValueError if Weights & Biases is asked for and its package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: the package is not installed here; pip install wandb, or leave wandb out")
