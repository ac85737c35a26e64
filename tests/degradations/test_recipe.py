"""Recipes: what is drawn, that it repeats, and what it does to a clip."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from degradations import recipe
from degradations.config import LIGHT, REALBASICVSR, REALESRGAN, RecipeConfig, TimeMode
from degradations.recipe import apply, draw, from_json, to_json

ROOT = Path(__file__).parents[2]
RECIPES = {"realbasicvsr": REALBASICVSR, "realesrgan": REALESRGAN, "light": LIGHT}


def make_clip(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_equals_constant(name: str):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=RecipeConfig)
    parsed = parser.parse_args([f"--recipe={ROOT / 'configs' / 'recipes' / name}.yaml"])
    assert parser.instantiate_classes(parsed).recipe == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("time", ["walk", "constant", "independent"])
def test_json_round_trip_and_same_bytes_again(name: str, time: TimeMode):
    config = dataclasses.replace(RECIPES[name], time=time)
    clip = make_clip((5, 48, 64))
    drawn = draw(config, 7, (5, 48, 64), 24.0)
    again = from_json(to_json(drawn))
    assert again == drawn
    first, second = apply(drawn, clip), apply(again, clip)
    assert first.lq.shape == clip.shape and first.lq.dtype == np.uint8
    assert np.array_equal(first.lq, second.lq) and first.measured == second.measured
    assert not np.array_equal(first.lq, apply(draw(config, 8, (5, 48, 64), 24.0), clip).lq)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 31), (2, 16, 200)])
def test_frame_count_and_size_are_kept(name: str, shape: tuple[int, int, int]):
    for seed in range(4):
        assert apply(draw(RECIPES[name], seed, shape, 30.0), make_clip(shape)).lq.shape == (*shape, 3)


def test_one_frame_gets_no_codec():
    for seed in range(20):
        operations = draw(REALBASICVSR, seed, (1, 64, 64), 24.0).operations
        assert not any(isinstance(operation, recipe.VideoCodec) for operation in operations)


def test_target_is_the_sharpened_truth_only_where_the_recipe_says_so():
    clip = np.repeat(np.kron([[0, 200], [200, 0]], np.ones((32, 32)))[None, ..., None], 2, axis=0)
    clip = np.repeat(clip, 3, axis=-1).astype(np.uint8) + 20
    for config in (REALBASICVSR, dataclasses.replace(REALBASICVSR, sharpen_truth=False)):
        hq = apply(draw(config, 0, (2, 64, 64), 24.0), clip).hq
        assert np.array_equal(hq, clip) != config.sharpen_truth


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32), np.uint8),
        np.zeros((3, 32, 32, 3), np.uint8),
        np.zeros((2, 32, 32, 4), np.uint8),
        [[0]],
    ],
)
def test_other_arrays_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames: got .*uint8 \(2, 32, 32, 3\)"):
        apply(draw(LIGHT, 0, (2, 32, 32), 24.0), frames)
