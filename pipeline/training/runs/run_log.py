"""History of a training, which checkpoints carry, and its losses by time and bucket.

loggers.py shows the numbers; the report is drawn from the history.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.training.runs.loggers import LoggedRun, loggers
from pipeline.training.state import ranks

TIME_BINS = 5
"""Number of equal bins of the times 0..1000 for which losses are reported separately."""


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
        sums, counts = ranks.all_reduced(self._sums).tolist()
        return {name: total / n for name, total, n in zip(names, sums, counts, strict=True) if n}


class Log:
    """The history of a run's steps, on all ranks; rank 0 passes it to the loggers too."""

    def __init__(
        self,
        output_url: str,
        name: str,
        total_steps: int,
        history: list[dict[str, Any]],
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log of a run.

        history: the steps so far, to which `step` appends. wandb: a project of Weights & Biases. settings:
        the run's config, shown there.
        """
        self.history = history
        run = LoggedRun(output_url, name, total_steps, len(history), wandb, settings or {})
        self._loggers = loggers(run) if ranks.rank() == 0 else []
        self._samples = sum(int(step["samples"]) for step in history)

    def step(
        self, step: int, stage: str, values: Mapping[str, float], details: Mapping[str, float] | None = None
    ) -> None:
        """Record a step's numbers, which include `seconds` and `samples`. Details are not in the history."""
        self.history.append({"step": step, "stage": stage, **values})
        self._samples += int(values["samples"])
        for logger in self._loggers:
            logger.step(step, stage, values, {**(details or {}), "samples_seen": self._samples})

    def validation(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Record scores and uint8 (H, W, 3) pictures of restored clips after `step` steps."""
        for logger in self._loggers:
            logger.validation(step, values, pictures)

    def flush(self) -> None:
        """Called at every checkpoint."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        self.flush()
        for logger in self._loggers:
            logger.close()
