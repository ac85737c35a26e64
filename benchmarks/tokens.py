"""Cost in tokens: time and memory of a layer per token, while the picture grows to 8 windows' area.

    python -m benchmarks.tokens          (about 5 minutes on 2 cores; nothing else should run)

Mean of a regular and a shifted layer at the paper's width, fp32 on the CPU, 6 latent frames, 154 text tokens.
Full attention would cost 8 times as much per token at the end as at the start; window attention should be
flat. Prints a table, writes out/bench/tokens.json and a plot beside the counted FLOPs, tokens.png.
"""

import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.attention import TEXT, WINDOW, Layer, layer_flops, measure, rounded, window_lengths
from model.dit.windows import Grid

OUT = Path("out/bench")
GRIDS: tuple[Grid, ...] = ((6, 32, 32), (6, 32, 64), (6, 64, 64), (6, 64, 128))
ROUNDS = 2


def measure_all(rounds: int) -> dict[tuple[Grid, bool], tuple[float, float]]:
    """Best seconds and peak GiB of every (grid, shifted).

    The sizes take turns instead of repeating in a row, since the speed of a shared machine changes by the
    minute.
    """
    best: dict[tuple[Grid, bool], tuple[float, float]] = {}
    for key in [(grid, shifted) for _ in range(rounds) for grid in GRIDS for shifted in (False, True)]:
        layer = Layer(key[0], WINDOW, key[1])
        with torch.no_grad():
            seconds, gib = measure(layer.ours)
        print(f"{key}: {seconds:.2f} s", flush=True)
        earlier = best.get(key, (seconds, gib))
        best[key] = (min(seconds, earlier[0]), max(gib, earlier[1]))
    return best


def per_token(grid: Grid, best: dict[tuple[Grid, bool], tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds, KiB and FLOPs per token, mean of both layers."""
    seconds, gib = (sum(best[grid, shifted][i] for shifted in (False, True)) for i in (0, 1))
    tokens = grid[0] * grid[1] * grid[2]
    counted = sum(layer_flops(window_lengths(grid, WINDOW, shifted), TEXT) for shifted in (False, True))
    return {
        "grid": grid,
        "tokens": tokens,
        "ms_per_token": 500 * seconds / tokens,
        "kib_per_token": gib / 2 / tokens * 2**20,
        "mflop_per_token": counted / 2 / tokens / 1e6,
        "full_mflop_per_token": layer_flops([tokens], TEXT) / tokens / 1e6,
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
        "mflop_per_token": "FLOPs (counted)",
        "full_mflop_per_token": "FLOPs of full attention (counted)",
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
    best = measure_all(ROUNDS)
    rows = [per_token(grid, best) for grid in GRIDS]
    for row in rows:
        print(rounded(row))
    result = {
        "rows": rows,
        "time_spread": spread(rows, "ms_per_token"),
        "memory_spread": spread(rows, "kib_per_token"),
        "flops_spread": spread(rows, "mflop_per_token"),
    }
    print({key: f"{value:.1%}" for key, value in result.items() if isinstance(value, float)})
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "tokens.json").write_text(json.dumps(result, indent=1))
    plot(rows)


if __name__ == "__main__":
    main()
