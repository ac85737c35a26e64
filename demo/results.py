"""The demo's results: out/demo/summary.json and out/demo/report.html with its pictures."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from demo import report_plots
from demo.report import (
    CEILING,
    FILES,
    Comparison,
    Picture,
    Pictures,
    write_report,
)
from pipeline.restoration.vae_reconstruction import reconstruct
from pipeline.store import delta_tables, schema
from pipeline.video import decoding
from pipeline.weights import weights_folder

FILTER_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo" / "filter.yaml"
MODELS = {"vae": "autoencoder", "dit": "transformer"}
RESTORED_ENDINGS = (".mp4", ".mkv", ".png")
SHOWN_PAIRS = 12
_COMPARED_FRAMES = 5  # 4n+1; the last of them is shown, which the autoencoder makes from the ones before

Reconstruct = Callable[[list[np.ndarray]], np.ndarray]


def collect(out: Path, stages: list[dict[str, Any]], total: dict[str, Any], short: bool) -> None:
    """Gather what the stages left below `out`; write summary.json and report.html."""
    summary = summarise(out, stages, total, short)
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    files = out / FILES
    files.mkdir(exist_ok=True)
    pairs = [pair for pair in _json(out / "pairs" / "manifest.json", {}).get("pairs", []) if pair.get("file")]
    pictures = Pictures(
        scores=score_pictures(out, files),
        pairs=pair_pictures(out, files, pairs[:SHOWN_PAIRS]),
        losses=loss_pictures(out, files),
        comparisons=comparisons(out, files, pairs),
    )
    write_report(summary, pictures, out)


def summarise(out: Path, stages: list[dict[str, Any]], total: dict[str, Any], short: bool) -> dict[str, Any]:
    """The content of summary.json."""
    training = {}
    for model in MODELS:
        history = _history(out, model)
        training[model] = {"steps": len(history["steps"]), "held_out": history["held_out"]}
        for key in ("imbalance", "wait_share", "utilisation"):
            values = [step[key] for step in history["steps"] if key in step]
            if values:
                training[model][key] = sum(values) / len(values)
    return {
        "stages": stages,
        "training": training,
        "metrics": _json(out / "evaluation" / "evaluation.json", {}).get("means", []),
        "total": total,
        "short": short,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
    }


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def _history(out: Path, model: str) -> dict[str, Any]:
    path = out / "data" / "weights" / model / "history.json"
    return {"steps": [], "held_out": [], **_json(path, {})}


def score_pictures(out: Path, files: Path) -> list[Picture]:
    """A histogram of each score that has a value."""
    folder = out / "data" / schema.SCORES
    table = delta_tables.read(f"file://{folder}") if folder.exists() else None
    if table is None:
        return []
    thresholds = filter_thresholds()
    made: list[Any] = []
    for name in table.schema.names:
        if name in ("clip_id", "error"):
            continue
        values = [
            value for value in table.column(name).to_pylist() if value is not None and np.isfinite(value)
        ]
        if values:
            file = f"score_{len(made)}.png"
            report_plots.histogram(files / file, name, values, thresholds.get(name) or {})
            made.append(Picture(file, f"{name}: {len(values)} of {len(table)} clips"))
    return made


def filter_thresholds(config: Path = FILTER_CONFIG) -> dict[str, dict[str, float | None]]:
    """{score: {min, max}} of the demo's filter."""
    found = yaml.safe_load(config.read_text()) if config.exists() else None
    return (found or {}).get("thresholds") or {}


def loss_pictures(out: Path, files: Path) -> list[Picture]:
    made = []
    for model, name in MODELS.items():
        steps = _history(out, model)["steps"]
        if steps:
            file = f"loss_{model}.png"
            report_plots.loss_curve(files / file, f"{name}: training loss", steps)
            made.append(Picture(file, f"Training loss of the {name}, {len(steps)} steps"))
    return made


def pair_pictures(out: Path, files: Path, pairs: list[dict[str, Any]]) -> list[Picture]:
    """One contact sheet of the pairs' middle frames."""
    rows = []
    for pair in pairs:
        middle = pair.get("frames", 1) // 2
        paths = [out / "pairs" / kind / pair["file"] for kind in ("hq", "lq")]
        if all(path.exists() for path in paths):
            high, low = (_frame(path, middle) for path in paths)
            if high is not None and low is not None:
                rows.append((high, low))
    if not rows:
        return []
    report_plots.write_picture(files / "pairs.png", report_plots.contact_sheet(rows))
    return [Picture("pairs.png", f"HQ and LQ of {len(rows)} pairs")]


def comparisons(out: Path, files: Path, pairs: list[dict[str, Any]]) -> list[Comparison]:
    """One frame of every version of every pair that was restored."""
    rebuild = _rebuilder(out)
    made = []
    for number, pair in enumerate(pairs):
        name = pair["name"]
        truth = _frames(out / "pairs" / "hq" / pair["file"], _COMPARED_FRAMES)
        restored = _restored_file(out, pair["file"])
        if not truth or restored is None:
            continue
        index = len(truth) - 1
        shown = {
            "LQ": _frame(out / "pairs" / "lq" / pair["file"], index),
            "restored": _frame(restored, index),
            CEILING: rebuild(truth) if rebuild else None,
            "truth": truth[index],
        }
        pictures = {}
        for version, frame in shown.items():
            if frame is not None:
                file = f"clip_{number}_{''.join(filter(str.isalpha, version)).lower()}.png"
                report_plots.write_picture(files / file, frame)
                pictures[version] = file
        height, width = truth[0].shape[:2]
        what = "image" if pair.get("media") == "image" else f"frame {index + 1} of {pair.get('frames', '?')}"
        made.append(Comparison(name, f"{what}, {width} x {height}", pictures))
    return made


def _restored_file(out: Path, file: str) -> Path | None:
    stem = out / "restored" / os.path.splitext(file)[0]
    candidates = (stem.with_name(stem.name + ending) for ending in RESTORED_ENDINGS)
    return next((path for path in candidates if path.exists()), None)


def _rebuilder(out: Path) -> Reconstruct | None:
    """A function from frames to the last of them, reconstructed; None without a trained autoencoder."""
    folder = out / "data" / "weights" / "vae"
    if not (folder / weights_folder.CONFIG_FILE).exists():
        return None
    vae = weights_folder.load_vae(f"file://{folder}")

    def rebuild(frames: list[np.ndarray]) -> np.ndarray:
        return list(reconstruct(vae, frames))[-1][-1]

    return rebuild


def _frames(path: Path, count: int) -> list[np.ndarray]:
    """The first frames of a file, as many as it has; none if it cannot be read."""
    try:
        return list(decoding.decode_frames(str(path), max_frames=count))
    except (ValueError, OSError):
        return []


def _frame(path: Path, index: int) -> np.ndarray | None:
    try:
        return _nth(decoding.decode_frames(str(path)), index)
    except (ValueError, OSError):
        return None


def _nth(frames: Iterable[np.ndarray], index: int) -> np.ndarray | None:
    return next(islice(frames, index, None), None)
