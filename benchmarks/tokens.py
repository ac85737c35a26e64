"""Cost in tokens: time and memory of a layer per token, while the picture grows to 8 windows' area.

    python -m benchmarks.tokens          (about 5 minutes on 2 cores; nothing else should run)

Mean of a regular and a shifted layer at the paper's width, fp32 on the CPU, 6 latent frames, 154 text tokens.
Full attention would cost 8 times as much per token at the end as at the start; window attention should be
flat. Prints a table, writes out/bench/tokens.json and a plot beside the counted operations, tokens.png.
"""

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.attention import TEXT, WINDOW, Layer, measure, operations, rounded
from model.windows import Grid

OUT = Path("out/bench")
GRIDS: tuple[Grid, ...] = ((6, 32, 32), (6, 32, 64), (6, 64, 64), (6, 64, 128))


def per_token(grid: Grid) -> dict[str, Any]:
    """Milliseconds, KiB and operations per token, mean of both layers."""
    seconds = gib = counted = 0.0
    for shifted in (False, True):
        layer = Layer(grid, WINDOW, shifted)
        with torch.no_grad():
            layer_seconds, layer_gib = measure(layer.ours, 2)
        seconds, gib, counted = seconds + layer_seconds, gib + layer_gib, counted + layer.operations
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "grid": grid,
        "tokens": tokens,
        "ms_per_token": 500 * seconds / tokens,
        "kib_per_token": gib / 2 / tokens * 2**20,
        "mflop_per_token": counted / 2 / tokens / 1e6,
        "full_mflop_per_token": operations([tokens], TEXT) / tokens / 1e6,
    }


def spread(rows: list[dict[str, Any]], key: str) -> float:
    """Largest over smallest, less 1."""
    values = [row[key] for row in rows]
    return max(values) / min(values) - 1


def plot(rows: list[dict[str, Any]]) -> None:
    """Each quantity per token, relative to one window's area."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    labels = {
        "ms_per_token": "time",
        "kib_per_token": "memory",
        "mflop_per_token": "operations (counted)",
        "full_mflop_per_token": "operations of full attention (counted)",
    }
    for key, label in labels.items():
        axes.plot(
            [row["tokens"] for row in rows], [row[key] / rows[0][key] for row in rows], "o-", label=label
        )
    axes.set(
        xlabel="patch tokens", ylabel="per token, relative to one window's area", xscale="log", ylim=(0, None)
    )
    axes.legend()
    figure.savefig(OUT / "tokens.png", dpi=120, bbox_inches="tight")


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for grid in GRIDS:
        rows.append(per_token(grid))
        print(rounded(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "time_spread": spread(rows, "ms_per_token"),
        "memory_spread": spread(rows, "kib_per_token"),
        "operations_spread": spread(rows, "mflop_per_token"),
    }
    print({key: f"{value:.1%}" for key, value in result.items() if isinstance(value, float)})
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "tokens.json").write_text(json.dumps(result, indent=1))
    plot(rows)


if __name__ == "__main__":
    main()
