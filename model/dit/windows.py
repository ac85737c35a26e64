"""How a video's token grid is cut into attention windows.

Two rules, both without cyclic shift, mask or padding: at the borders the windows are simply smaller.

* `fixed_windows`: the paper's (section 3.1), a window of constant size, shifted by half a window.
* `released_windows`: the released SeedVR / SeedVR2 checkpoints': a window is a fixed fraction of a
  picture of 720p area, whatever the resolution, and a quarter of the length.

A rule is a function `(grid, window, shifted) -> list[Window]`; grids and windows are in patch tokens.
"""

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Literal

Grid = tuple[int, int, int]
Extent = int | Literal["full"]
WindowSize = tuple[Extent, Extent, Extent]
Window = tuple[slice, slice, slice]
WindowRule = Callable[[Grid, WindowSize, bool], list[Window]]

RELEASED_WINDOW: WindowSize = (4, 3, 3)
"""Window counts (T, H, W) of the released checkpoints, relative to a 720p picture."""


def fixed_windows(grid: Grid, window: WindowSize, shifted: bool) -> list[Window]:
    """The paper's windows of constant size, T outermost and W innermost.

    Regular edges are 0, w, 2w, ..., n. Shifted edges are 0, w // 2, w // 2 + w, ..., n on every axis
    longer than w // 2 (also where n <= w: n = w = 32 gives 16 + 16), empty windows dropped.
    An axis with extent "full" is never cut. Raises ValueError for an extent below 1.
    """
    t, h, w = (_fixed_edges(n, extent, shifted) for n, extent in zip(grid, window, strict=True))
    return list(product(t, h, w))


def _fixed_edges(n: int, extent: Extent, shifted: bool) -> list[slice]:
    if extent == "full":
        return [slice(0, n)]
    if extent < 1:
        raise ValueError(f"a window extent must be at least 1 token or 'full', not {extent}")
    half = extent // 2
    first = half if shifted and n > half else 0
    edges = [0, *range(first, n, extent), n]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def released_windows(grid: Grid, window: WindowSize, shifted: bool) -> list[Window]:
    """The released checkpoints' windows, W outermost and T innermost (their emission order).

    `window` counts windows, (4, 3, 3) in all released files: H and W windows are those of a 3 x 3 split of
    the equal-aspect grid with 3600 tokens (45 x 80, i.e. 720p); T windows are a quarter of min(T, 30).
    Source: SeedVR commit 673b563, `models/dit/window.py`; rounding is Python's (half to even).
    """
    frames, height, width = grid
    counts = [n if isinstance(n, int) else 1 for n in window]
    scale = math.sqrt(45 * 80 / (height * width))
    sizes = (
        math.ceil(min(frames, 30) / counts[0]),
        math.ceil(round(height * scale) / counts[1]),
        math.ceil(round(width * scale) / counts[2]),
    )
    t, h, w = (_released_edges(n, size, shifted) for n, size in zip(grid, sizes, strict=True))
    return [(ts, hs, ws) for ws in w for hs in h for ts in t]


def _released_edges(n: int, size: int, shifted: bool) -> list[slice]:
    # A shift of half a window exists only where there is more than one window; int() truncates, so an odd
    # size gives windows whose lengths alternate around it.
    offset = 0.5 if shifted and size < n else 0.0
    count = math.ceil((n - offset) / size) + (1 if offset else 0)
    slices = [
        slice(max(int((i - offset) * size), 0), min(int((i - offset + 1) * size), n)) for i in range(count)
    ]
    return [s for s in slices if s.stop > s.start]
