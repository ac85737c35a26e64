"""Both window rules: exact cases, and every token in exactly one window for any shape."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dit.packing import LayerWindows, equal_runs, packing_plan
from model.dit.windows import RELEASED_WINDOW, fixed_windows, released_windows

RELEASED = json.loads((Path(__file__).parents[2] / "data/parity/windows_a.json").read_text())
extents = st.one_of(st.integers(1, 12), st.just("full"))
grids = st.tuples(st.integers(1, 13), st.integers(1, 40), st.integers(1, 40))


def lengths(n: int, window: int | str, shifted: bool) -> list[int]:
    return [w.stop - w.start for w, _, _ in fixed_windows((n, 1, 1), (window, 1, 1), shifted)]


@pytest.mark.parametrize(
    ("n", "window", "shifted", "expected"),
    [
        (45, 32, False, [32, 13]),
        (64, 32, False, [32, 32]),
        (32, 32, True, [16, 16]),
        (45, 32, True, [16, 29]),
        (16, 32, True, [16]),
        (17, 32, True, [16, 1]),
        (80, 32, True, [16, 32, 32]),
        (6, 5, True, [2, 4]),
        (2, 5, True, [2]),
        (8, 5, True, [2, 5, 1]),
        (3, 1, True, [1, 1, 1]),
        (9, "full", True, [9]),
    ],
)
def test_fixed_rule_edges(n, window, shifted, expected):
    assert lengths(n, window, shifted) == expected


@pytest.mark.parametrize("case", RELEASED["cases"], ids=lambda case: "x".join(map(str, case["size"])))
@pytest.mark.parametrize("kind", ["regular", "shifted"])
def test_released_rule_is_the_released_one(case, kind):
    windows = released_windows(tuple(case["size"]), tuple(RELEASED["window"]), kind == "shifted")
    assert [[[s.start, s.stop] for s in window] for window in windows] == case[kind]


@settings(max_examples=500, deadline=None)
@given(grid=grids, window=st.tuples(extents, extents, extents))
def test_fixed_windows_cover_every_token_once(grid, window):
    for shifted in (False, True):
        blocks = fixed_windows(grid, window, shifted)
        assert (covered(grid, blocks) == 1).all()
        for block in blocks:
            for extent, size in zip(block, window, strict=True):
                assert extent.stop > extent.start and (size == "full" or extent.stop - extent.start <= size)


@settings(max_examples=500, deadline=None)
@given(grid=grids)
def test_released_windows_cover_every_token_once(grid):
    for shifted in (False, True):
        assert (covered(grid, released_windows(grid, RELEASED_WINDOW, shifted)) == 1).all()


def covered(grid, windows) -> torch.Tensor:
    count = torch.zeros(grid, dtype=torch.int64)
    for window in windows:
        count[window] += 1
    return count


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        fixed_windows((4, 4, 4), (0, 2, 2), False)


@settings(max_examples=50, deadline=None)
@given(shapes=st.lists(grids, min_size=1, max_size=4), window=st.tuples(extents, extents, extents))
def test_layers_hand_over_without_losing_a_token(shapes, window):
    """From packed order through regular and shifted layers back: every row comes home."""
    layers = tuple(LayerWindows(fixed_windows, window, shifted) for shifted in (False, True, True, False))
    plan = packing_plan(layers, shapes, [3] * len(shapes), torch.device("cpu"))
    rows = torch.arange(sum(t * h * w for t, h, w in shapes))
    x = rows
    for layout, reorder in zip(plan.layouts, plan.reorder, strict=True):
        x = x if reorder is None else x[reorder]
        assert torch.equal(x, layout.to_windows)
        assert sum(layout.window_lengths) == len(rows)
        # a sample's rows stay in its own stretch: what is per sample may be spread by counts alone
        for start, part in zip(
            starts(layout.tokens_per_sample), x.split(layout.tokens_per_sample), strict=True
        ):
            assert part.min() == start and part.max() == start + len(part) - 1
    assert torch.equal(x[plan.restore], rows)


def starts(counts) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def test_tables_are_made_once_per_set_of_shapes():
    layers = tuple(LayerWindows(fixed_windows, (1, 2, 2), shifted) for shifted in (False, True))
    a, b, c = (
        packing_plan(layers, shapes, [2], torch.device("cpu"))
        for shapes in ([(1, 4, 6)], [(1, 4, 6)], [(1, 6, 4)])
    )
    assert a is b and a is not c
    layers = tuple(LayerWindows(fixed_windows, (1, 2, 2), False) for _ in range(3))
    plan = packing_plan(layers, [(1, 4, 6)], [2], torch.device("cpu"))
    assert plan.layouts[0] is plan.layouts[2] and plan.reorder[1:] == (None, None)


def test_equal_runs():
    assert equal_runs([3, 3, 5, 3], [1, 1, 1, 2]) == [(2, 3, 1), (1, 5, 1), (1, 3, 2)]
