"""For any shape, seed and recipe: the clip keeps its shape, and its bytes depend on the seed alone."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from degradations.config import LIGHT, REALBASICVSR, REALESRGAN
from degradations.recipe import apply, draw, from_json, to_json

shapes = st.tuples(st.integers(1, 4), st.integers(1, 48), st.integers(1, 48))
recipes = st.sampled_from([REALBASICVSR, REALESRGAN, LIGHT])
times = st.sampled_from(["walk", "constant", "independent"])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**63 - 1), recipe=recipes, time=times, fps=st.floats(1, 240))
def test_any_clip(shape, seed, recipe, time, fps):
    recipe = dataclasses.replace(recipe, time=time)
    clip = np.random.default_rng(seed % 1000).integers(0, 256, (*shape, 3), dtype=np.uint8)
    kept = clip.copy()
    drawn = draw(recipe, seed, shape, fps)
    assert drawn == draw(recipe, seed, shape, fps)
    assert from_json(to_json(drawn)) == drawn and "NaN" not in to_json(drawn)
    done = apply(drawn, clip)
    assert done.lq.shape == done.hq.shape == (*shape, 3) and done.lq.dtype == done.hq.dtype == np.uint8
    assert np.array_equal(clip, kept)  # the input is left alone
    assert np.array_equal(done.lq, apply(from_json(to_json(drawn)), clip).lq)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**62), recipe=st.sampled_from([REALBASICVSR, REALESRGAN]))
def test_two_seeds_give_different_bytes(seed, recipe):
    clip = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    first, second = (apply(draw(recipe, number, (2, 40, 56), 24.0), clip).lq for number in (seed, seed + 1))
    assert not np.array_equal(first, second)
