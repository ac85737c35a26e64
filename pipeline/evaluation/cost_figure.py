"""Quality against cost, like the paper's figure 1: one dot per method at its seconds per frame and quality.

Reads `evaluation.json` of `jobs.evaluate`, which holds both. A dot's area stands for its number of
parameters, and its peak memory is written next to it. Writes `figure1.png` and `figure1.md`.
"""

import dataclasses
import io
import math
from typing import Any

from pipeline.evaluation import comparison_tables
from pipeline.metrics import metric_table
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls

RESULTS = "evaluation.json"
_LEAST_AREA, _AREA_PER_ROOT_M = 40.0, 12.0


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """What `jobs.figure` reads."""

    evaluation: Url
    """Absolute URL of the folder that `jobs.evaluate` wrote."""
    output: Url
    """Absolute URL of the folder to which figure1.png and figure1.md are written."""
    metric: str = "psnr_rgb"
    """Metric on the vertical axis, a column of the evaluation; the paper's figure shows
    dover_technical_x100."""

    def __post_init__(self) -> None:
        check_urls(self)
        metric_table.metric(self.metric)  # says which there are


@dataclasses.dataclass(frozen=True)
class Dot:
    """One method."""

    method: str
    seconds_per_frame: float
    quality: float
    parameters_m: float | None
    peak_memory_gib: float | None

    @property
    def remark(self) -> str:
        """What is known of its size and memory."""
        known = []
        if self.parameters_m is not None:
            known.append(f"{self.parameters_m:.4g}M")
        if self.peak_memory_gib is not None:
            known.append(f"{self.peak_memory_gib:.2f} GiB")
        return ", ".join(known)


def dots(result: dict[str, Any], metric: str) -> list[Dot]:
    """The methods whose quality and seconds a frame are known. ValueError if there are none."""
    found = []
    for row in result["means"]:
        cost = result["costs"].get(row["method"]) or {}
        quality = (row.get(metric) or {}).get("mean")
        if quality is not None and cost.get("seconds_per_frame"):
            size = cost.get("parameters_m"), cost.get("peak_memory_gib")
            found.append(Dot(row["method"], cost["seconds_per_frame"], quality, *size))
    if not found:
        raise ValueError(
            f"evaluation: no method has both {metric} and its seconds a frame; results of jobs.restore and "
            "jobs.peer have the latter"
        )
    return found


def markdown(found: list[Dot], metric: str) -> str:
    """The figure's numbers as a table."""
    title = metric_table.metric(metric).heading
    lines = [
        f"| method | {title} | s a frame | parameters M | peak memory GiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for dot in sorted(found, key=lambda dot: dot.seconds_per_frame):
        values = (
            comparison_tables.value_text(dot.quality, metric),
            f"{dot.seconds_per_frame:.4f}",
            "–" if dot.parameters_m is None else f"{dot.parameters_m:.4g}",
            "–" if dot.peak_memory_gib is None else f"{dot.peak_memory_gib:.2f}",
        )
        lines.append(f"| {dot.method} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def picture(found: list[Dot], metric: str) -> bytes:
    """The figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    for dot in found:
        area = _LEAST_AREA + _AREA_PER_ROOT_M * math.sqrt(dot.parameters_m or 0)
        axes.scatter([dot.seconds_per_frame], [dot.quality], s=area, alpha=0.7)
        text = f"{dot.method}\n{dot.remark}".strip()
        place = (dot.seconds_per_frame, dot.quality)
        axes.annotate(text, place, xytext=(7, 5), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.2)
    if metric_table.metric(metric).lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel("seconds a frame")
    axes.set_ylabel(metric_table.metric(metric).heading)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


def run(config: FigureConfig) -> None:
    """Write and print it."""
    url = storage.join(config.evaluation, RESULTS)
    if not storage.exists(url):
        raise ValueError(f"evaluation: there is no {RESULTS} in {config.evaluation}; run jobs.evaluate first")
    found = dots(storage.read_json(url), config.metric)
    text = markdown(found, config.metric)
    storage.write_bytes(storage.join(config.output, "figure1.png"), picture(found, config.metric))
    storage.write_bytes(storage.join(config.output, "figure1.md"), text.encode())
    print(text, flush=True)
