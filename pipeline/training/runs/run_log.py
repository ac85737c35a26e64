"""What a person sees of a training: one printed line a step, TensorBoard, Prometheus; W&B by config.

Rank 0 writes; all ranks keep the history, which checkpoints carry and the report draws from.
"""

import contextlib
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime import prometheus
from pipeline.store import schema, storage
from pipeline.training.runs import trainer

TIME_BINS = 5
"""Bins of equal width of the times 0..1000, in which losses are told apart."""
_SHORT_NAMES = {
    "tokens_per_second": "tokens/s",
    "crops_per_second": "crops/s",
    "learning_rate": "lr",
    "gradient_norm": "grad",
    "wait_share": "wait",
    "seconds": "s",
}


class Breakdown:
    """A step's losses by time and by bucket: sums and counts, over a rank's packs, then over all ranks."""

    def __init__(self, buckets: list[str], device: torch.device) -> None:
        self._buckets = buckets
        self._sums = torch.zeros(2, TIME_BINS + len(buckets), device=device)

    def add(self, losses: Tensor, timestep: Tensor, buckets: list[str]) -> None:
        """losses, timestep: (B,); buckets: of each sample."""
        by_time = (timestep / 1000 * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        by_bucket = torch.tensor([TIME_BINS + self._buckets.index(b) for b in buckets], device=losses.device)
        both = torch.stack([losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)])
        for bins in (by_time, by_bucket):
            self._sums.index_add_(1, bins, both)

    def means(self) -> dict[str, float]:
        """Over all ranks, of the bins that have a sample: loss_by_time/<upper end>, loss_by_bucket/<name>.

        Every rank must call it.
        """
        names = [f"loss_by_time/{round(1000 * (i + 1) / TIME_BINS)}" for i in range(TIME_BINS)]
        names += [f"loss_by_bucket/{bucket}" for bucket in self._buckets]
        sums, counts = trainer.all_reduced(self._sums).tolist()
        return {name: total / n for name, total, n in zip(names, sums, counts, strict=True) if n}


def check_wandb(project: str | None) -> None:
    """ValueError if Weights & Biases is asked for and its package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: the package is not installed here; pip install wandb, or leave wandb out")


class Log:
    """One printed line a step, TensorBoard events, metrics for Prometheus, Weights & Biases."""

    def __init__(
        self,
        output_url: str,
        name: str,
        total_steps: int,
        history: list[dict[str, Any]],
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """history: of the steps so far, which `step` goes on with. wandb: a project of Weights & Biases.
        settings: the run's config, shown there."""
        self.total_steps, self.history, self._name = total_steps, history, name
        self._url = storage.join(output_url, "tensorboard", name)
        self._local = storage.path_of(self._url) if self._url.startswith("file://") else tempfile.mkdtemp()
        writes = self._writes = trainer.rank() == 0
        self._writer: Any = None
        self._open()
        self._samples = sum(int(step["samples"]) for step in history)
        self._started, self._first = time.monotonic(), len(history)
        self._wandb: Any = None
        if wandb is not None and writes:
            self._wandb = importlib.import_module("wandb")
            run = schema.stable_id(output_url, name)  # a resumed run goes on in its own charts
            self._wandb.init(project=wandb, name=name, id=run, resume="allow", config=dict(settings or {}))

    def step(
        self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float] | None = None
    ) -> None:
        """Record a step's numbers, its `seconds` and `samples` among them. Details are not printed."""
        self.history.append({"step": step, "stage": stage, **values})
        self._samples += int(values["samples"])
        if not self._writes:
            return
        everything = {**values, **(details or {}), "samples_seen": self._samples}
        self._write(everything, step)
        prometheus.show_training(self._name, step, int(values["samples"]), values)
        done = len(self.history) - self._first
        eta_s = (time.monotonic() - self._started) / done * (self.total_steps - step - 1)
        shown = " ".join(f"{_SHORT_NAMES.get(key, key)} {value:.4g}" for key, value in values.items())
        print(f"step {step + 1}/{self.total_steps} stage {stage} {shown} eta {eta_s:.0f} s", flush=True)

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Numbers and uint8 (H, W, 3) pictures of restored clips after `step` steps."""
        if not self._writes:
            return
        self._write({f"validation/{key}": value for key, value in values.items()}, step - 1)
        with self._tolerated():
            for key, picture in pictures.items():
                if self._writer is not None:
                    self._writer.add_image(f"validation/{key}", picture, step - 1, dataformats="HWC")
        if self._wandb is not None:
            images = {f"validation/{key}": self._wandb.Image(picture) for key, picture in pictures.items()}
            self._wandb.log(images, step=step - 1)
        shown = " ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"validation after step {step}: {shown}", flush=True)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        with self._tolerated():
            for key, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def flush(self) -> None:
        """Bring the event files to where they belong; begin a new one if the last could not be written."""
        if not self._writes:
            return
        with self._tolerated():
            if self._writer is not None:
                self._writer.flush()
            if not self._url.startswith("file://"):
                for file in Path(self._local).iterdir():
                    storage.write_bytes(storage.join(self._url, file.name), file.read_bytes())
        if self._writer is None:
            self._open()

    def _open(self) -> None:
        if self._writes:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0 alone writes

            with self._tolerated():
                self._writer = SummaryWriter(self._local, purge_step=len(self.history))

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Curves are for people to look at: where their disk is full, training goes on without them."""
        try:
            yield
        except OSError as error:
            self._writer = None  # its thread has ended
            print(f"TensorBoard: no events in {self._url} until the next checkpoint: {error}", flush=True)

    def close(self) -> None:
        self.flush()
        if self._wandb is not None:
            self._wandb.finish()


def measured_peak(size: int = 1024, repeats: int = 8) -> float:
    """Operations per second of this rank's fp32 matrix products on the CPU, now: what a step could reach."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
