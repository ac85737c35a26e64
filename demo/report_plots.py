"""The pictures of a run's report: histograms, loss curves, contact sheets, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from pipeline.video import encoding

_BLUE, _RED = "#4a76a8", "#c0392b"
_CELL_WIDTH, _CELL_HEIGHT, _GAP = 320, 240, 6
_HISTOGRAM_BINS = 24


def write_picture(path: Path, picture: np.ndarray) -> None:
    """uint8 (H, W, 3) RGB as PNG."""
    path.write_bytes(encoding.png(picture))


def histogram(path: Path, name: str, values: Sequence[float], threshold: dict[str, float | None]) -> None:
    """Counts of clips over one score, with a red line at each end of its threshold {min, max}."""
    figure, axes = plt.subplots(figsize=(4.2, 2.6), dpi=110)
    axes.hist(values, bins=_HISTOGRAM_BINS, color=_BLUE)
    for key in ("min", "max"):
        limit = threshold.get(key)
        if limit is not None:
            axes.axvline(limit, color=_RED, linewidth=1.8, label=f"{key} {limit:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.set_title(name, fontsize=10, parse_math=False)
    axes.set_ylabel("clips", fontsize=9)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def loss_curve(path: Path, title: str, steps: list[dict[str, Any]]) -> None:
    """Loss of every step, one colour a stage; their losses are of different tasks and not comparable."""
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=110)
    for stage in dict.fromkeys(str(step["stage"]) for step in steps):
        own = [step for step in steps if str(step["stage"]) == stage]
        axes.plot([step["step"] for step in own], [step["loss"] for step in own], linewidth=1, label=stage)
    if steps and all(step["loss"] > 0 for step in steps):
        axes.set_yscale("log")
    if steps:
        axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def contact_sheet(rows: list[tuple[np.ndarray, np.ndarray]], pairs_per_line: int = 2) -> np.ndarray:
    """Pairs (HQ, LQ) of uint8 (H, W, 3), each fitted into a cell, HQ left of LQ, as one picture."""
    lines = -(-len(rows) // pairs_per_line)
    pair_width = 2 * _CELL_WIDTH + 4 * _GAP
    height, width = lines * (_CELL_HEIGHT + _GAP), min(len(rows), pairs_per_line) * pair_width
    sheet = np.full((height, width, 3), 255, np.uint8)
    for index, pair in enumerate(rows):
        top = index // pairs_per_line * (_CELL_HEIGHT + _GAP)
        for column, frame in enumerate(pair):
            left = index % pairs_per_line * pair_width + column * (_CELL_WIDTH + _GAP)
            _paste(sheet, frame, top, left)
    return sheet


def _paste(sheet: np.ndarray, frame: np.ndarray, top: int, left: int) -> None:
    height, width = frame.shape[:2]
    scale = min(_CELL_HEIGHT / height, _CELL_WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    fitted = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    top, left = top + (_CELL_HEIGHT - size[1]) // 2, left + (_CELL_WIDTH - size[0]) // 2
    sheet[top : top + size[1], left : left + size[0]] = fitted
