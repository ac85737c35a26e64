"""Utilisation of a training's processors: its FLOPs over their peak."""

import time
from typing import Any

import torch

from model import flops
from pipeline.training.samples.batch import Batch
from pipeline.training.state import ranks


def tera_flops(model_config: Any, batch: Batch) -> float:
    """Counted 10^12 FLOPs of a pack's forward and backward passes; nothing recomputed counts."""
    samples = zip(batch.video_shapes, batch.text_lengths, strict=True)
    counted = sum(flops.forward_flops(model_config, shape, n).total for shape, n in samples)
    return flops.TRAINING_OVER_FORWARD * counted / 1e12


def measured_peak(size: int = 1024, repeats: int = 8) -> float:
    """FLOPs per second of this rank's fp32 matrix products on the CPU, now: what a step could reach."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_of_all_ranks(peak_tflops: float | None, device: torch.device) -> float | None:
    """10^12 FLOPs a second of all workers: given of one, measured on CPUs; None: unknown."""
    if peak_tflops is None and device.type != "cpu":
        return None
    own = peak_tflops or measured_peak() / 1e12
    return float(ranks.all_reduced(torch.tensor([own], device=device)))
