"""The numbers of the SeedVR paper (CVPR 2025), tables 1 to 4, as data: `published.csv`.

Columns: table, dataset, method, metric, value. Table 1: quality on six sets. Table 2: autoencoders (`VAE` for
the dataset). Table 3: seconds per training iteration for window sizes (frames x height x width in latent
pixels). Table 4: DOVER on YouHQ40 for window sizes. The paper says neither its PSNR's colours nor its
SSIM's; they are set beside PSNR in RGB and SSIM in luma, which is what pyiqa's `psnr` and `ssim` compute and
what later papers on these sets used. Its DOVER is the technical score times 100.
"""

import csv
import functools
from pathlib import Path
from typing import Any

OURS_FOR = {"psnr": "psnr_rgb", "ssim": "ssim_y"}
"""The paper's names of metrics where they differ from those of our columns."""

METRICS = ("psnr_rgb", "ssim_y", "lpips", "dists", "niqe", "musiq", "clip_iqa", "dover_technical_x100")
"""Table 1's columns by the names here, in its order."""


@functools.cache
def numbers() -> tuple[dict[str, Any], ...]:
    """All rows; `table` as int, `value` as float."""
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return tuple(
            {**row, "table": int(row["table"]), "value": float(row["value"])} for row in csv.DictReader(file)
        )


def datasets() -> list[str]:
    """The sets of table 1."""
    return list(dict.fromkeys(row["dataset"] for row in numbers() if row["table"] == 1))


def autoencoders() -> list[dict[str, Any]]:
    """Rows of table 2: the method and its values, with temporal_compression None for image models.

    The values are parameters_m, temporal_compression, spatial_compression, latent_channels, psnr, ssim, lpips
    and rfvd. The paper gives neither the clips nor their number, length and size, so the ranking can be
    reproduced and the numbers cannot.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in numbers():
        if row["table"] == 2:
            rows.setdefault(row["method"], {"method": row["method"]})[row["metric"]] = row["value"]
    return list(rows.values())


def rows_of(dataset: str, metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """Table 1's rows of one set, shaped as `comparison_tables.means`: a mean or None for each metric."""
    found = [row for row in numbers() if row["table"] == 1 and row["dataset"] == dataset]
    if not found:
        raise ValueError(f"{dataset!r} is none of the paper's sets: {', '.join(datasets())}")
    table = []
    for method in dict.fromkeys(row["method"] for row in found):
        values = {OURS_FOR.get(r["metric"], r["metric"]): r["value"] for r in found if r["method"] == method}
        entry: dict[str, Any] = {"method": f"{method} (paper)", "clips": None, "errors": 0}
        for metric in metrics:
            entry[metric] = {"mean": values.get(metric), "standard_error": None, "clips": None}
        table.append(entry)
    return table
