"""Driver memory and rows/s of the data stages' own work while the number of clips grows to a million.

    python -m benchmarks.scale            (about 20 minutes on 2 cores, 2 GB of disk; prints a table)

Synthetic manifest, clips/ and scores/ (50 clips a source, 20% error rows, some rejected by thresholds, some
duplicates, 3 buckets) go through ingest's listing, filter's thresholding and precompute's planning, each in a
process of its own whose peak memory is read at its end. At the largest size the planning is killed half way
and run again. Writes out/bench/scale.json and the curve, scale.png.
"""

import argparse
import csv
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.memory import reset_peak, status_bytes
from model.text_encoders import TINY_ENCODERS
from pipeline.data import cropping, ingest, precompute
from pipeline.data import filter as filter_stage
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.data.kept_clips import KeptClips
from pipeline.runtime import stage, work_plan
from pipeline.store import delta_tables, hashing, schema, storage

OUT = Path("out/bench")
SIZES = (100_000, 300_000, 1_000_000)
PHASES = ("listing", "thresholding", "planning")
CLIPS_A_SOURCE = 50
COST = "cost.json"
_FILE_ROWS = 4096
_FINGERPRINT = "scale"
THRESHOLDS = {"sharpness": Threshold(min=5.0), "niqe": Threshold(max=9.5), "motion": Threshold(max=0.99)}
BUCKETS = [cropping.Bucket(1, 256, 256), cropping.Bucket(5, 256, 256), cropping.Bucket(21, 768, 768)]


def clips_and_scores(first: int, count: int) -> tuple[pa.Table, pa.Table]:
    """Rows [first, first + count) of the synthetic tables."""
    draw = np.random.default_rng(first)
    numbers = np.arange(first, first + count)
    ids = [hashing.stable_id("clip", int(number)) for number in numbers]
    source = numbers // CLIPS_A_SOURCE
    image = source % 10 == 0
    broken = draw.random(count) < 0.2
    # A tenth of the clips have a duplicate in another source.
    hashed = np.where(draw.random(count) < 0.1, numbers % 100_000, numbers)
    columns: dict[str, list[Any]] = {
        "clip_id": ids,
        "uri": [f"s3://bucket/raw/{number:07d}.mp4" for number in source],
        "source_id": [hashing.stable_id("source", int(number)) for number in source],
        "source_bytes": [10_000_000] * count,
        "media": ["image" if one else "video" for one in image],
        "start_pts": (numbers % CLIPS_A_SOURCE * 61_952).tolist(),
        "end_pts": (numbers % CLIPS_A_SOURCE * 61_952 + 61_952).tolist(),
        "time_base": ["1/12800"] * count,
        "start_s": (numbers % CLIPS_A_SOURCE * 4.84).tolist(),
        "num_frames": np.where(image, 1, 121).tolist(),
        "fps": [25.0] * count,
        "width": draw.choice([640, 1280, 1920], count).tolist(),
        "height": draw.choice([360, 720, 1080], count).tolist(),
        "rotation": [0] * count,
        "phash": [f"{hashing.stable_hash('hash', int(number)):016x}" for number in hashed],
        "caption": ["a person walks along a river"] * count,
        "error": ["FFmpeg cannot read it: Invalid data" if one else None for one in broken],
    }
    empty = [None] * count
    clips = pa.table(
        {name: columns.get(name, empty) for name in schema.CLIPS_SCHEMA.names}, schema=schema.CLIPS_SCHEMA
    )
    values = {name: draw.random(count) * 10 for name in filter_stage.SCORES_SCHEMA.names[1:-1]}
    values["motion"] = draw.random(count)
    scores = pa.table(
        {"clip_id": ids, **values, "error": pa.array(empty, pa.string())}, schema=filter_stage.SCORES_SCHEMA
    )
    return clips, scores


def make_data(root: Path, count: int) -> None:
    """manifest.csv, clips/, scores/ and text/ of `count` clips."""
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "bytes"])
        writer.writerows(
            [f"{number // 1000:04d}/{number:07d}.mp4", "a person walks along a river", 10_000_000 + number]
            for number in range(count)
        )
    for first in range(0, count, _FILE_ROWS):
        clips, scores = clips_and_scores(first, min(_FILE_ROWS, count - first))
        for name, table in ((schema.CLIPS, clips), (schema.SCORES, scores)):
            delta_tables.write(f"file://{root}/{name}", f"part-{first:08d}.parquet", [table], table.schema)
    config = FilterConfig(data=str(root), thresholds=THRESHOLDS, held_out_share=0.01)
    filter_stage.rebuild_selection(config, [], stage.Summary("filter"))


def work(phase: str, root: Path) -> int:
    """Do one phase's work; returns its rows."""
    if phase == "listing":
        listed = ingest.IngestConfig(
            input="s3://bucket/raw", output=f"{root}", manifest=f"{root}/manifest.csv"
        )
        folder = f"file://{root}/listing"
        return work_plan.plan(folder, ingest.list_sources(listed), "source_id", _FINGERPRINT, 64).rows
    if phase == "thresholding":
        summary = stage.Summary("filter")
        config = FilterConfig(data=str(root), thresholds=THRESHOLDS, held_out_share=0.01)
        filter_stage.rebuild_selection(config, [], summary)
        return summary.rows_in
    config = precompute.PrecomputeConfig(
        data=str(root), vae=f"{root}/vae", text=TINY_ENCODERS, buckets=BUCKETS
    )
    rows = precompute.plan_rows(config, KeptClips(config.data), config.data)
    return work_plan.plan(f"file://{root}/planning", rows, "sample_id", _FINGERPRINT, 64).rows


def measure(phase: str, root: Path) -> None:
    """Do a phase's work in this process and write what it cost."""
    begin, libraries = time.monotonic(), reset_peak()
    rows = work(phase, root)
    seconds, peak = time.monotonic() - begin, status_bytes("VmHWM")
    cost = {
        "rows": rows,
        "seconds": seconds,
        "rows_per_s": rows / seconds,
        "peak_gib": peak / 2**30,
        "above_libraries_mib": (peak - libraries) / 2**20,
    }
    (root / COST).write_text(json.dumps(cost))


def start(phase: str, root: Path) -> multiprocessing.process.BaseProcess:
    """A phase in a process of its own, forked from one that has imported everything."""
    multiprocessing.set_forkserver_preload(["benchmarks.scale"])
    process = multiprocessing.get_context("forkserver").Process(target=measure, args=(phase, root))
    process.start()
    return process


def measured(phase: str, root: Path) -> dict[str, Any]:
    """What a phase cost, in its own process."""
    process = start(phase, root)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{phase} failed")
    return json.loads((root / COST).read_text())


def plans_of(folder: str) -> delta_tables.Table | None:
    return delta_tables.open_table(storage.join(folder, work_plan.PLANS))


def planned_ids(folder: str) -> list[str]:
    plans = plans_of(folder)
    return [] if plans is None else plans.read(["id"])["id"].to_pylist()


def plan_files(folder: str) -> int:
    plans = plans_of(folder)
    return 0 if plans is None else len(plans.files)


def killed_and_run_again(root: Path, phase: str) -> dict[str, Any]:
    """A phase with a SIGKILL half way, then once more: its cost, and whether it planned the same rows."""
    folder = f"file://{root}/{phase}"
    whole = planned_ids(folder)
    files = plan_files(folder)
    storage.remove_folder(folder)
    process = start(phase, root)
    while plan_files(folder) < max(1, files // 2):
        if process.exitcode is not None:
            raise RuntimeError(f"{phase} ended before it could be killed")
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = len(planned_ids(folder))
    again = measured(phase, root)
    after = planned_ids(folder)
    same = len(after) == len(set(after)) and set(after) == set(whole)
    return {**again, "rows_before_the_kill": kept, "same_rows_none_twice": same}


def run(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Every phase at every size, and again after a kill at the largest."""
    curve: list[dict[str, Any]] = []
    again: dict[str, Any] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="openseedvr-scale-") as folder:
            make_data(Path(folder), size)
            for phase in PHASES:
                found = {"clips": size, "phase": phase, **measured(phase, Path(folder))}
                curve.append(found)
                print(found, flush=True)
            if size == sizes[-1]:
                again = {
                    phase: killed_and_run_again(Path(folder), phase) for phase in ("listing", "planning")
                }
                print(again, flush=True)
    return {"curve": curve, "after_a_kill": again, **growth(curve)}


def growth(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """By phase, from the smallest to the largest size: what memory and rows/s became of 1."""
    found: dict[str, Any] = {"memory_growth": {}, "memory_growth_mib": {}, "speed_ratio": {}}
    for phase in PHASES:
        rows = [row for row in curve if row["phase"] == phase]
        found["memory_growth"][phase] = rows[-1]["peak_gib"] / rows[0]["peak_gib"]
        found["memory_growth_mib"][phase] = rows[-1]["above_libraries_mib"] - rows[0]["above_libraries_mib"]
        found["speed_ratio"][phase] = rows[-1]["rows_per_s"] / rows[0]["rows_per_s"]
    return {**found, "peak_gib": max(row["peak_gib"] for row in curve)}


def plot(curve: list[dict[str, Any]]) -> None:
    import matplotlib  # takes time and memory that the measured processes would have too

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for phase in PHASES:
        rows = [row for row in curve if row["phase"] == phase]
        for axis, key in zip(axes, ("peak_gib", "rows_per_s"), strict=True):
            axis.plot([row["clips"] for row in rows], [row[key] for row in rows], "o-", label=phase)
    axes[0].set(xlabel="clips", ylabel="peak memory of the driver, GiB", xscale="log", ylim=(0, None))
    axes[1].set(xlabel="clips", ylabel="rows/s", xscale="log", ylim=(0, None))
    axes[0].legend()
    figure.savefig(OUT / "scale.png", dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of clips")
    arguments = parser.parse_args()
    result = run(tuple(arguments.sizes))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "scale.json").write_text(json.dumps(result, indent=1))
    plot(result["curve"])
    print(json.dumps({key: value for key, value in result.items() if key != "curve"}, indent=1))


if __name__ == "__main__":
    main()
