"""How well the small models restore unseen clips, compared with filters without weights: `make table`.

    python -m demo.table                        (weights: demo/weights, with vae/ and dit/)
    python -m demo.table --weights FOLDER --recipes realbasicvsr --steps 1

Makes the pairs of `demo.held_out` with `pipeline.evaluation.synthetic_pairs` (seed 0), restores the degraded
ones, measures all with `pipeline.evaluation.evaluate`, and prints a table for each recipe. The filter to beat
is the best of `baselines.GRID` on training clips degraded in the same way. Everything is kept below
out/table; a second run makes only the pairs and restored clips that are missing, and measures again.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from degradations.recipe import LIGHT, REALBASICVSR, RecipeConfig
from demo import held_out, pixel_cnn
from demo.held_out import HELD_OUT, TRAINING, Shot, shot_of
from pipeline.evaluation import (
    baselines,
    comparison_tables,
    evaluate,
    peers,
    synthetic_pairs,
)
from pipeline.metrics import metric_table
from pipeline.metrics.psnr_ssim import psnr
from pipeline.restoration import restore
from pipeline.runtime.job_config import parse
from pipeline.video import decoding
from pipeline.weights import weights_folder

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "demo" / "manifests"
"""What the pairs must be: drawn parameters and seeds, by recipe."""
RECIPES: dict[str, RecipeConfig] = {"realbasicvsr": REALBASICVSR, "light": LIGHT}
TITLES = {"none": "LQ", "median": "median 3x3", "mean3": "mean of 3 frames"}
GAINS = ("psnr_rgb", "ssim_rgb", "niqe")
BARS = {"psnr_rgb": 0.5, "ssim_rgb": 0.03}
"""What one step must gain over LQ on realbasicvsr."""


def title(filter_name: str) -> str:
    """A filter's name in the table."""
    kind, _, sigma = filter_name.partition(":")
    return TITLES.get(kind) or f"Gaussian blur, {sigma} px"


def make_pairs(shots: tuple[Shot, ...], recipe: str, out: Path) -> Path:
    """Folder with hq/, lq/ and manifest.json of these shots' clips."""
    made = out / "pairs"
    synthetic_pairs.run(
        synthetic_pairs.PairsConfig(
            output=f"file://{made}",
            folder=f"file://{out.parent / 'clips'}",
            max_frames=held_out.FRAMES,
            max_height=held_out.HEIGHT,
            max_width=held_out.WIDTH,
            video_recipe=RECIPES[recipe],
        )
    )
    records = json.loads((made / synthetic_pairs.MANIFEST).read_text())["pairs"]
    failed = [record["error"] for record in records if "error" in record]
    if failed or len(records) != sum(shot.clips for shot in shots):
        raise ValueError(f"{made}: {len(records)} pairs, {len(failed)} failed: {failed[:1]}")
    return made


def check_manifest(recipe: str, made: Path) -> str:
    """A line that says whether the pairs are those of the shipped manifest."""
    shipped = MANIFESTS / f"{recipe}.json"
    same = shipped.exists() and json.loads(shipped.read_text()) == json.loads(
        (made / synthetic_pairs.MANIFEST).read_text()
    )
    return f"pairs: {'those' if same else 'NOT those'} of demo/manifests/{recipe}.json"


def best_filter(made: Path) -> tuple[str, dict[str, float]]:
    """The filter of the grid with the highest mean PSNR (RGB) over training pairs, and each one's mean."""
    means = {}
    for name in ("none", *baselines.GRID):
        values = []
        for file in sorted((made / synthetic_pairs.LQ).iterdir()):
            truth = decoding.decode_frames(str(made / synthetic_pairs.HQ / file.name))
            filtered = baselines.by_name(name)(decoding.decode_frames(str(file)))
            values.append(np.mean([psnr(*pair) for pair in zip(filtered, truth, strict=True)]))
        means[name] = float(np.mean(values))
    return max(baselines.GRID, key=lambda name: means[name]), means


def run_filters(made: Path, out: Path, best: str) -> dict[str, str]:
    """Method to the folder of its results, for the degraded clips themselves and each filter shown."""
    methods = {TITLES["none"]: f"file://{made / synthetic_pairs.LQ}"}
    for name in dict.fromkeys(
        ("median", "mean3", best if best.startswith("gaussian") else "gaussian:1.0", best)
    ):
        target = out / "filtered" / name.replace(":", "_")
        if not target.exists():
            peers.baseline(name, made / synthetic_pairs.LQ, target)
        methods[title(name)] = f"file://{target}"
    return methods


def run_ours(made: Path, out: Path, folder: Path, steps: int) -> dict[str, str]:
    """The same for our models with a number of steps, otherwise configured like configs/demo/restore.yaml."""
    target = f"file://{out / f'restored_{steps}'}"
    arguments = [
        "--config",
        str(ROOT / "configs/demo/restore.yaml"),
        f"--input=file://{made / synthetic_pairs.LQ}",
    ]
    arguments += [f"--output={target}", f"--model.vae=file://{folder}/vae"]
    arguments += [f"--model.weights=file://{folder}/dit", f"--sampling.steps={steps}"]
    summary = restore.run(parse(restore.RestoreConfig, "", [*arguments, "--actors=2", "--previews=0"]))
    if summary.errors:
        raise ValueError(f"{target}: {summary.errors} clips were not restored")
    return {f"ours, {steps} step{'s' if steps > 1 else ''}": target}


def run_cnn(made: Path, out: Path, folder: Path) -> dict[str, str]:
    """The same for the small network on pixels, if its weights are next to ours."""
    weights_url, target = f"file://{folder}/pixel_cnn", out / "pixel_cnn"
    if not (folder / "pixel_cnn").exists():
        return {}
    pixel_cnn.restore_folder(weights_url, made / synthetic_pairs.LQ, target)
    return {"small CNN on pixels, colour fix": f"file://{target}"}


def measured(made: Path, methods: dict[str, str], out: Path, vae: str | None) -> list[dict[str, Any]]:
    """The clips' rows of `pipeline.evaluation.evaluate`."""
    evaluate.run(
        evaluate.EvaluateConfig(
            methods=methods,
            output=f"file://{out}",
            truth=f"file://{made / synthetic_pairs.HQ}",
            reconstruct_with=vae,
            workers=2,
        )
    )
    rows = json.loads((out / f"{evaluate.RESULTS}.json").read_text())["clips"]
    failed = [row["error"] for row in rows if row["error"]]
    if failed:
        raise ValueError(f"{len(failed)} clips were not measured; the first: {failed[0]}")
    return rows


def by_shot(values: dict[str, float]) -> dict[str, Any]:
    """Mean over clips, with the standard error by shot.

    Clips of one shot are not independent samples, so the standard error is the deviation of the shots' means
    divided by the square root of their number.
    """
    if not values:
        return dict(comparison_tables.NOTHING)
    shots: dict[str, list[float]] = {}
    for clip, value in values.items():
        shots.setdefault(shot_of(clip), []).append(value)
    means = [np.mean(group) for group in shots.values()]
    error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return {"mean": float(np.mean(list(values.values()))), "standard_error": error, "clips": len(values)}


def table_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method as `comparison_tables.means` gives it, with standard errors by shot."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        entry: dict[str, Any] = {"method": method, "clips": len(own)}
        for metric in evaluate.METRICS:
            entry[metric] = by_shot({row["clip"]: row[metric] for row in own if row[metric] is not None})
        table.append(entry)
    return table


def gains(rows: list[dict[str, Any]], method: str, than: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Mean difference of two methods on the clips of these kinds, by metric, with standard errors by shot."""
    wanted = {shot.name for shot in HELD_OUT if shot.kind in kinds}
    values = {
        name: {row["clip"]: row for row in rows if row["method"] == name and shot_of(row["clip"]) in wanted}
        for name in (method, than)
    }
    return {
        metric: by_shot(
            {
                clip: row[metric] - values[than][clip][metric]
                for clip, row in values[method].items()
                if row[metric] is not None and values[than][clip][metric] is not None
            }
        )
        for metric in GAINS
    }


def gain_lines(rows: list[dict[str, Any]], methods: list[str]) -> list[str]:
    """Lines of a table: what each method gains over LQ, on all clips and by kind."""
    lines = ["| gain over LQ | clips of | PSNR RGB | SSIM RGB | NIQE |", "|---|---|---:|---:|---:|"]
    groups = {"all": held_out.KINDS, **{kind: (kind,) for kind in held_out.KINDS}}
    for method in methods:
        for name, kinds in groups.items():
            found = gains(rows, method, TITLES["none"], kinds)
            cells = [_signed(found[metric], metric_table.metric(metric).decimals) for metric in GAINS]
            lines.append(f"| {method} | {name} | " + " | ".join(cells) + " |")
    return lines


def _signed(entry: dict[str, Any], decimals: int) -> str:
    if entry["mean"] is None:
        return "–"
    error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.{decimals}f}"
    return f"{entry['mean']:+.{decimals}f}{error}"


def verdict(rows: list[dict[str, Any]], ours: str, best: str) -> list[str]:
    """Lines that compare one-step results with the bars."""
    lines = []
    for metric, bar in BARS.items():
        gain = gains(rows, ours, TITLES["none"], held_out.KINDS)[metric]
        ahead = gains(rows, ours, title(best), held_out.KINDS)[metric]
        name, decimals = metric_table.metric(metric).title, metric_table.metric(metric).decimals
        reached = "reached" if gain["mean"] >= bar else "missed"
        lines.append(
            f"- {ours}: {name} {_signed(gain, decimals)} against LQ (aim {bar}: {reached}), "
            f"{_signed(ahead, decimals)} against {title(best)}, the best filter on training clips"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    weights: Path
    recipes: list[str]
    steps: list[int]
    out: Path


def about_clips() -> str:
    """How many clips and shots of which kind."""
    counts = {kind: sum(shot.clips for shot in HELD_OUT if shot.kind == kind) for kind in held_out.KINDS}
    return (
        f"{sum(counts.values())} held-out clips of {len(HELD_OUT)} shots of "
        f"{len({shot.source for shot in HELD_OUT})} sources ({counts['camera']} of a camera, "
        f"{counts['animation']} of an animation, {counts['pan']} pans over photographs), "
        f"{held_out.FRAMES} frames of at most {held_out.WIDTH}x{held_out.HEIGHT}"
    )


def one_recipe(recipe: str, options: Options, note: Callable[[str], None]) -> None:
    """Everything of one recipe; `note` takes the lines of the report."""
    out, training = options.out / "held_out" / recipe, options.out / "training" / recipe
    best, grid = best_filter(make_pairs(TRAINING, recipe, training))
    made = make_pairs(HELD_OUT, recipe, out)
    methods = run_filters(made, out, best) | run_cnn(made, out, options.weights)
    ours: dict[str, str] = {}
    for steps in options.steps:
        ours |= run_ours(made, out, options.weights, steps)
    rows = measured(made, methods | ours, out / "evaluation", f"file://{options.weights}/vae")
    order = [*methods, *ours, evaluate.CEILING]
    rows.sort(key=lambda row: order.index(row["method"]))
    note(f"\n## Recipe {recipe}\n\n{about_clips()}; {check_manifest(recipe, made)}.\n")
    note(comparison_tables.markdown_means(table_of(rows), evaluate.METRICS, evaluate.CEILING))
    note("\nMean over clips ± standard error by shot. Bicubic: n/a, LQ has the size of the truth already.\n")
    note("\n".join(gain_lines(rows, order[1:])))
    note(
        f"\nFilters on {sum(s.clips for s in TRAINING)} training clips, PSNR RGB: "
        + ", ".join(f"{title(name)} {value:.2f}" for name, value in grid.items())
        + f". Best: {title(best)}."
    )
    one_step = next((method for method in ours if method.endswith("1 step")), None)
    if one_step:
        note("\n".join(["", *verdict(rows, one_step, best)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, default=ROOT / "demo" / "weights", help="folder with vae/ and dit/"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 20], help="of the sampler")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "table")
    options = Options(**vars(parser.parse_args()))
    options = dataclasses.replace(options, weights=options.weights.resolve(), out=options.out.resolve())
    lines: list[str] = []
    try:
        for part in ("vae", "dit"):
            if not (options.weights / part / weights_folder.CONFIG_FILE).exists():
                raise ValueError(f"--weights: {options.weights} has no {part}/ with trained weights")
        held_out.fetch(options.out / "fetched")
        for shots, name in ((HELD_OUT, "held_out"), (TRAINING, "training")):
            held_out.cut(shots, options.out / "fetched", options.out / name / "clips")
        for recipe in options.recipes:
            one_recipe(recipe, options, lines.append)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    text = "\n".join(lines) + "\n"
    (options.out / "table.md").write_text(text)
    print(text)
    print(f"also in {options.out}/table.md")


if __name__ == "__main__":
    main()
