"""The paper's tables 3 and 4: time per iteration, and quality after equal steps, by window size.

Trains the transformer of a `train_dit` config once for each window size, with everything else equal, and
reads each run's history: the median seconds per iteration (without the first steps) and the held-out loss
after the last step. With `pairs`, each network is also tried on a benchmark of `jobs.pairs`, which it
restores in one step and which is measured as in `jobs.evaluate`. A run that is started again resumes from its
newest checkpoint.
"""

import dataclasses
import re
import statistics
from typing import Any

from model.dit.windows import WindowSize
from pipeline.evaluation import comparison_tables, evaluate, published, synthetic_pairs
from pipeline.metrics import metric_table
from pipeline.metrics.metric_networks import LearnedMetrics
from pipeline.restoration import restore
from pipeline.restoration.restore_file import Encoding
from pipeline.restoration.sampling_config import Sampling
from pipeline.runtime import stage
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.runs import train_dit, trainer
from pipeline.weights.backbones import ModelConfig

RESULTS = "windows"
_WARM_UP_STEPS = 3
_OF_TRAINING = {"window", "seconds_per_iteration", "steps", "held_out_loss"}
"""What a row has beside metrics."""
_WINDOW = re.compile(r"(\d+)x(\d+|full)(?:x(\d+))?")


@dataclasses.dataclass(frozen=True)
class WindowStudyConfig:
    """What `jobs.window_study` reads."""

    training: train_dit.TrainDitConfig
    """Training run that is repeated for every window size; its windows and its output folder are replaced."""
    windows: list[str]
    """Window sizes to compare, in latent pixels as the paper writes them: 5x64x64, 1x8x8 or 3xfull."""
    output: Url
    """Absolute URL of the folder for the tables; each run has a subfolder with its window's name."""
    pairs: Url | None = None
    """Absolute URL of a folder that `jobs.pairs` wrote, which each trained network restores and is measured
    on; null compares only time and held-out loss."""
    vae: Url | None = None
    """URL of the autoencoder's weights for restoring the pairs; give it together with `pairs`."""
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(steps=1))
    """How the pairs are restored; the default takes one step."""
    learned: LearnedMetrics = dataclasses.field(default_factory=LearnedMetrics)
    """Weights of the metrics that are networks; the paper's table 4 reports DOVER."""

    def __post_init__(self) -> None:
        check_urls(self)
        if self.training.model is None:
            raise ValueError("training.model: the window is part of the shape; give a shape, not `initial`")
        if not self.windows:
            raise ValueError("windows: empty; name at least one, such as 5x64x64")
        for window in self.windows:
            training_of(self, window)  # raises ValueError for a bad one
        if (self.pairs is None) != (self.vae is None):
            raise ValueError("pairs, vae: to restore, give both")


def window_size(name: str) -> WindowSize:
    """(frames, height, width) in latent pixels of "5x64x64" or "3xfull"; ValueError for anything else."""
    found = _WINDOW.fullmatch(name)
    if found is None or (found[2] == "full") != (found[3] is None):
        raise ValueError(f"windows: {name!r} is no window; write 5x64x64 or 3xfull")
    if found[2] == "full":
        return int(found[1]), "full", "full"
    return int(found[1]), int(found[2]), int(found[3])


def training_of(config: WindowStudyConfig, window: str) -> train_dit.TrainDitConfig:
    """The run of one window size."""
    model = config.training.model
    assert model is not None
    return dataclasses.replace(
        config.training,
        model=dataclasses.replace(model, windows=(window_size(window),)),
        output=storage.join(config.output, window),
    )


def measure_training(url: str) -> dict[str, Any]:
    """Seconds per iteration and held-out loss, from a run's history."""
    history = storage.read_json(storage.join(url, "weights", train_dit.NAME, trainer.HISTORY))
    last = history["steps"][-1]["stage"]
    seconds = [step["seconds"] for step in history["steps"] if step["stage"] == last][_WARM_UP_STEPS:]
    return {
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "steps": len(history["steps"]),
        "held_out_loss": history["held_out"][-1]["after"],
    }


def measure_quality(config: WindowStudyConfig, window: str) -> dict[str, Any]:
    """Metrics of the restored pairs: mean of each."""
    assert config.pairs is not None and config.vae is not None
    root = storage.join(config.output, window)
    model = ModelConfig(storage.join(root, "weights", train_dit.NAME), vae=config.vae)
    low_quality, restored = storage.join(config.pairs, synthetic_pairs.LQ), storage.join(root, "restored")
    restore.run(
        restore.RestoreConfig(
            input=low_quality,
            output=restored,
            model=model,
            sampling=config.sampling,
            encoding=Encoding(codec="ffv1"),
            previews=0,
        )
    )
    evaluation = evaluate.EvaluateConfig(
        methods={window: restored},
        output=storage.join(root, "evaluation"),
        truth=storage.join(config.pairs, synthetic_pairs.HQ),
        learned=config.learned,
    )
    evaluate.run(evaluation)
    result = storage.read_json(storage.join(evaluation.output, f"{evaluate.RESULTS}.json"))
    return {metric: result["means"][0][metric]["mean"] for metric in evaluation.metrics}


def published_number(table: int, window: str) -> float | None:
    """The value of the paper's table 3 or 4 for a window."""
    rows = (row for row in published.numbers() if row["table"] == table and row["method"] == window)
    return next((row["value"] for row in rows), None)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Both tables in one, with the paper's numbers next to ours."""
    metrics = metric_table.in_order({key for row in rows for key in row} - _OF_TRAINING)
    head = ["window", "s/iteration", "paper's table 3", "steps", "held-out loss"]
    head += [*(metric_table.metric(name).heading for name in metrics), "paper's table 4 (DOVER x100)"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [_text(row["seconds_per_iteration"], 3), _text(published_number(3, row["window"]), 2)]
        cells += [str(row["steps"]), _text(row["held_out_loss"], 4)]
        cells += [comparison_tables.value_text(row.get(name), name) for name in metrics]
        cells.append(_text(published_number(4, row["window"]), 3))
        lines.append(f"| {row['window']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def run(config: WindowStudyConfig) -> stage.Summary:
    """Study every window in turn; the tables are rewritten after each."""

    def work(summary: stage.Summary) -> None:
        rows: list[dict[str, Any]] = []
        for window in config.windows:
            one = training_of(config, window)
            train_dit.run(one)
            row = {"window": window, **measure_training(one.output)}
            rows.append(row | (measure_quality(config, window) if config.pairs is not None else {}))
            storage.write_json(storage.join(config.output, f"{RESULTS}.json"), rows)
            storage.write_bytes(storage.join(config.output, f"{RESULTS}.md"), markdown(rows).encode())
        print(markdown(rows), flush=True)
        summary.rows_in = summary.rows_kept = len(rows)

    return stage.run_stage("window_study", config.output, work)
