"""Recipes: what is drawn, that it repeats, and what it does to a clip."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
from jsonargparse import ArgumentParser
from skimage import data

from degradations import gallery
from degradations.config import LIGHT, REALBASICVSR, REALESRGAN, OrderConfig, RecipeConfig, operation_configs
from degradations.draws import ClipDraws, TimeMode
from degradations.operations import VideoCodec
from degradations.operations.protocol import Example
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
        assert not any(isinstance(operation, VideoCodec) for operation in operations)


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


def test_memory_layout_does_not_matter():
    clip = make_clip((3, 36, 52))
    drawn = draw(REALBASICVSR, 3, (3, 36, 52), 24.0)
    expected = apply(drawn, clip).lq
    locked = clip.copy()
    locked.flags.writeable = False
    for other in (
        np.asfortranarray(clip),
        np.repeat(clip, 2, axis=2)[:, :, ::2],
        clip[::-1].copy()[::-1],
        locked,
    ):
        assert np.array_equal(apply(drawn, other).lq, expected)


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), np.float32(24), 25])
def test_any_number_is_a_rate_and_goes_to_json(fps):
    drawn = draw(REALBASICVSR, np.int64(3), (2, np.int64(36), 52), fps)  # type: ignore[arg-type]
    assert from_json(to_json(drawn)) == drawn


@pytest.mark.parametrize(
    ("seed", "shape", "fps", "message"),
    [
        (-1, (2, 32, 32), 24.0, "seed: -1"),
        (1.5, (2, 32, 32), 24.0, "seed: 1.5"),
        (1, (0, 32, 32), 24.0, "shape: "),
        (1, (2, 32, 32, 3), 24.0, "shape: "),
        (1, (2, 32.5, 32), 24.0, "shape: "),
        (1, (2, 32, 32), None, "fps: None"),
        (1, (2, 32, 32), float("nan"), "fps: nan"),
        (1, (2, 32, 32), float("inf"), "fps: inf"),
    ],
)
def test_wrong_arguments_are_named(seed, shape, fps, message: str):
    with pytest.raises(ValueError, match=message):
        draw(REALBASICVSR, seed, shape, fps)


def test_json_of_another_length_is_refused():
    text = to_json(draw(REALBASICVSR, 3, (4, 36, 52), 24.0))
    with pytest.raises(ValueError, match="has 4 values, not 5"):
        from_json(text.replace("[4,36,52]", "[5,36,52]"))


def test_a_wrong_time_mode_or_step_is_named():
    with pytest.raises(ValueError, match="time: 'still' is none of walk"):
        dataclasses.replace(LIGHT, time="still")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"blur\.sigma_step_px"):
        dataclasses.replace(REALBASICVSR.first.blur, sigma_step_px=-1.0)  # type: ignore[type-var]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_4k_video_keeps_its_shape(name: str):
    picture = cv2.resize(data.coffee(), (3840, 2160), interpolation=cv2.INTER_CUBIC)
    frames = np.stack([np.roll(picture, 8 * t, axis=1) for t in range(3)])
    result = apply(draw(RECIPES[name], 5, frames.shape[:3], 24.0), frames)
    assert result.lq.shape == result.hq.shape == frames.shape
    # Worse than the source, but the same picture.
    error = np.abs(result.lq.astype(np.int16) - frames).mean()
    assert 0.5 < error < 40


@dataclasses.dataclass(frozen=True)
class Dim:
    gain: tuple[float, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        return (frame * self.gain[index]).astype(np.uint8)

    def summary(self) -> str:
        return f"dim {self.gain[0]}"


@dataclasses.dataclass(frozen=True)
class DimConfig:
    operations: ClassVar = (Dim,)

    gain: tuple[float, float]

    def draw(self, clip: ClipDraws) -> list[Dim]:
        return [Dim(clip.number(self.gain, step=0.01))]

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        return [Example("Dim", [(f"gain {gain}", [Dim((gain,))]) for gain in (0.9, 0.6, 0.3)])]


@dataclasses.dataclass(frozen=True)
class OrderWithDim(OrderConfig):
    dim: DimConfig | None = None


def test_a_further_degradation_is_one_file_and_one_field(monkeypatch, tmp_path):
    only_dim = OrderWithDim(None, None, None, None, None, DimConfig((0.4, 0.6)))
    recipe = RecipeConfig(first=only_dim, second=None, end=None, sharpen_truth=False)
    clip = make_clip((3, 16, 24))
    drawn = draw(recipe, 1, (3, 16, 24), 24.0)
    assert np.array_equal(apply(drawn, clip).lq[0], (clip[0] * drawn.operations[0].gain[0]).astype(np.uint8))
    with pytest.raises(ValueError, match="unknown operation 'Dim'; known: Blur, Resize"):
        from_json(to_json(drawn))
    monkeypatch.setattr("degradations.config.OrderConfig", OrderWithDim)
    monkeypatch.setattr("degradations.gallery.OrderConfig", OrderWithDim)
    assert from_json(to_json(drawn)) == drawn
    assert gallery.describe(drawn) == f"dim {drawn.operations[0].gain[0]}"
    rows = dict(gallery.operation_rows(make_clip((2, 320, 320)), 24.0))
    assert [caption for caption, _ in rows["Dim"]] == ["gain 0.9", "gain 0.6", "gain 0.3"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--order", type=OrderWithDim)
    (tmp_path / "order.yaml").write_text(
        "{blur: null, resize: null, noise: null, jpeg: null, codec: null, dim: {gain: [0.4, 0.6]}}"
    )
    parsed = parser.parse_args([f"--order={tmp_path / 'order.yaml'}"])
    assert parser.instantiate_classes(parsed).order == only_dim


def test_an_added_degradation_leaves_other_recipes_settings_as_they_are():
    order = LIGHT.first
    added = OrderWithDim(order.blur, order.resize, order.noise, order.jpeg, order.codec)
    assert LIGHT.settings() == dataclasses.asdict(LIGHT)
    assert dataclasses.replace(LIGHT, first=added).settings() == LIGHT.settings()
    dim = dataclasses.replace(added, dim=DimConfig((0.4, 0.6)))
    assert dataclasses.replace(LIGHT, first=dim).settings() != LIGHT.settings()


def test_every_degradation_is_described():
    described = (ROOT / "docs" / "degradations.md").read_text().lower()
    for config in operation_configs(OrderConfig):
        assert config.__name__.removesuffix("Config").lower() in described
