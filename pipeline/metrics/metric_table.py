"""Every metric of a restored video: one entry says how it is called, printed, ranked and measured.

To add one, add an entry: with `of_frame` where a function measures it frame by frame, or with `weights` where
a network of `pipeline.metrics.metric_networks` does.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from numpy.typing import NDArray

from pipeline.metrics.niqe import niqe
from pipeline.metrics.psnr_ssim import Frame, cut_border, luma, psnr, ssim
from pipeline.metrics.warping import warping_error


@dataclass(frozen=True)
class FramePair:
    """A uint8 (H, W, 3) frame and the true one, if there is one, each with the frame before it."""

    frame: Frame
    truth: Frame | None
    before: Frame | None
    true_before: Frame | None
    border_px: int
    """cut off on each side before PSNR and SSIM"""

    @functools.cached_property
    def rgb(self) -> tuple[Frame, Frame]:
        """Both without their borders."""
        assert self.truth is not None
        return cut_border(self.frame, self.border_px), cut_border(self.truth, self.border_px)

    @functools.cached_property
    def luma(self) -> tuple[NDArray, NDArray]:
        """The luma of both without their borders."""
        left, right = self.rgb
        return luma(left), luma(right)


@dataclass(frozen=True)
class Metric:
    """One column of the tables."""

    name: str
    title: str
    of_frame: Callable[[FramePair], float | None] | None = None
    """its value for a frame, None where there is none; the clip's is the mean"""
    weights: str | None = None
    """the field of LearnedMetrics with its network's weights"""
    needs_truth: bool = False
    lower_is_better: bool = False
    decimals: int = 3

    @property
    def heading(self) -> str:
        """The title with an arrow towards the better."""
        return f"{self.title} {'↓' if self.lower_is_better else '↑'}"


def _niqe(pair: FramePair) -> float | None:
    value = niqe(pair.frame)  # None, or not finite, where the frame is too small or too flat
    return None if value is None or not math.isfinite(value) else value


def _warping_error(pair: FramePair) -> float | None:
    if pair.before is None:
        return None
    return warping_error(pair.before, pair.frame, pair.true_before, pair.truth)


_TABLE = (
    Metric("psnr_rgb", "PSNR RGB", lambda pair: psnr(*pair.rgb), needs_truth=True, decimals=2),
    Metric("psnr_y", "PSNR Y", lambda pair: psnr(*pair.luma), needs_truth=True, decimals=2),
    Metric("ssim_rgb", "SSIM RGB", lambda pair: ssim(*pair.rgb), needs_truth=True, decimals=4),
    Metric("ssim_y", "SSIM Y", lambda pair: ssim(*pair.luma), needs_truth=True, decimals=4),
    Metric("lpips", "LPIPS", weights="lpips", needs_truth=True, lower_is_better=True),
    Metric("dists", "DISTS", weights="dists", needs_truth=True, lower_is_better=True),
    Metric("niqe", "NIQE", _niqe, lower_is_better=True, decimals=2),
    Metric("musiq", "MUSIQ", weights="musiq", decimals=2),
    Metric("clip_iqa", "CLIP-IQA", weights="clip_iqa"),
    Metric("dover_technical_x100", "DOVER technical x100", weights="dover"),
    Metric("dover_overall", "DOVER overall", weights="dover"),
    Metric("warping_error", "warping error x1000", _warping_error, lower_is_better=True),
)
METRICS = {metric.name: metric for metric in _TABLE}
"""By name, in the order of the tables' columns."""
WITHOUT_WEIGHTS = tuple(metric.name for metric in _TABLE if metric.weights is None)
"""What needs no network."""


def metric(name: str) -> Metric:
    """The entry of a name; ValueError, with the known ones, if there is none."""
    if name not in METRICS:
        raise ValueError(f"metric: {name!r} is none of {', '.join(METRICS)}")
    return METRICS[name]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the tables' order, each once; ValueError for one that has no entry."""
    wanted = {metric(name).name for name in names}
    return tuple(name for name in METRICS if name in wanted)


def frame_scores(pair: FramePair) -> dict[str, float | None]:
    """Every metric that a function measures; None where it needs a truth that there is not."""
    return {
        entry.name: entry.of_frame(pair) if pair.truth is not None or not entry.needs_truth else None
        for entry in METRICS.values()
        if entry.of_frame is not None
    }
