"""What is drawn: branch probabilities of the table, bounds of the walk, sizes of the resizes."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from degradations.config import REALBASICVSR, REALESRGAN
from degradations.operations import (
    Blur,
    BlurConfig,
    CodecConfig,
    GaussianNoise,
    Jpeg,
    PoissonNoise,
    Resize,
    VideoCodec,
)
from degradations.recipe import Degradation, draw

DRAWS = 10_000
SHAPE = (1, 128, 96)


@pytest.fixture(scope="module")
def images() -> list[Degradation]:
    return [draw(REALESRGAN, seed, SHAPE, 24.0) for seed in range(DRAWS)]


@pytest.fixture(scope="module")
def clips() -> list[Degradation]:
    return [draw(REALBASICVSR, seed, (2, 128, 96), 24.0) for seed in range(DRAWS)]


def assert_frequencies(kinds: Iterable, expected: dict) -> None:
    """Each kind's frequency within 4 standard errors of its probability."""
    counted = Counter(kinds)
    total = sum(counted.values())
    assert total > 1000 and set(counted) <= set(expected)
    for kind, probability in expected.items():
        error = np.sqrt(probability * (1 - probability) / total)
        assert abs(counted[kind] / total - probability) <= 4 * error + 1e-12, kind


def of_type(drawn: Degradation, cls: type) -> list:
    return [operation for operation in drawn.operations if isinstance(operation, cls)]


KERNELS = {"iso": 0.405, "aniso": 0.225, "generalized_iso": 0.108, "generalized_aniso": 0.027}
KERNELS |= {"plateau_iso": 0.108, "plateau_aniso": 0.027, "sinc": 0.1}


@pytest.mark.parametrize("recipe", ["images", "clips"])
def test_branches_of_both_tables(recipe: str, request: pytest.FixtureRequest):
    drawn: list[Degradation] = request.getfixturevalue(recipe)
    first_blurs = [of_type(one, Blur)[0] for one in drawn]
    assert_frequencies((blur.kind[0] for blur in first_blurs), KERNELS)
    assert_frequencies((blur.size_px[0] for blur in first_blurs), dict.fromkeys(range(7, 22, 2), 1 / 8))
    noises = [of_type(one, GaussianNoise) + of_type(one, PoissonNoise) for one in drawn]
    assert all(len(pair) == 2 for pair in noises)
    every = [noise for pair in noises for noise in pair]
    assert_frequencies((type(noise) for noise in every), {GaussianNoise: 0.5, PoissonNoise: 0.5})
    assert_frequencies((noise.grey[0] for noise in every), {True: 0.4, False: 0.6})
    interpolations = [resize.interpolation[0] for one in drawn for resize in of_type(one, Resize)[:-1]]
    assert_frequencies(interpolations, dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    # second blur at 0.8 and final sinc at 0.8, each apart from the other
    assert_frequencies((len(of_type(one, Blur)) - 1 for one in drawn), {0: 0.04, 1: 0.32, 2: 0.64})


def test_up_down_keep(images: list[Degradation]):
    for place, base, shares in ((0, 128, (0.2, 0.7, 0.1)), (1, 32, (0.3, 0.4, 0.3))):
        heights = [of_type(one, Resize)[place].height_px[0] for one in images]
        ways = [(height > base) - (height < base) for height in heights]
        # a factor within 1/base above 1 rounds to no change, hence growing is a little rarer
        missed = shares[0] / (base * (0.5 if place == 0 else 0.2))
        expected = {1: shares[0] - missed, -1: shares[1], 0: shares[2] + missed}
        assert_frequencies(ways, expected)


def test_order_at_the_end(images: list[Degradation], clips: list[Degradation]):
    def compressed_last(drawn: Degradation, cls: type) -> bool:
        shrink = max(index for index, one in enumerate(drawn.operations[:-1]) if isinstance(one, Resize))
        return max(index for index, one in enumerate(drawn.operations) if isinstance(one, cls)) > shrink

    assert_frequencies((compressed_last(one, Jpeg) for one in images), {True: 0.5, False: 0.5})
    assert_frequencies((compressed_last(one, VideoCodec) for one in clips), {True: 0.5, False: 0.5})


def test_codecs_and_rates(clips: list[Degradation]):
    codecs = [codec for one in clips for codec in of_type(one, VideoCodec)]
    assert len(codecs) == 2 * DRAWS
    assert_frequencies((codec.encoder for codec in codecs), {"libx264": 2 / 3, "mpeg4": 1 / 3})
    rates = np.array([codec.bits_per_pixel for codec in codecs]) * 65536
    assert rates.min() >= 1e4 - 1 and rates.max() <= 1e5 + 1
    assert abs(rates.mean() - 5.5e4) < 4 * 9e4 / np.sqrt(12 * len(rates))


def test_uniform_ranges(images: list[Degradation]):
    def check(values: list[float], low: float, high: float) -> None:
        array = np.array(values)
        assert low - 1e-5 <= array.min() and array.max() <= high + 1e-5
        assert abs(array.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * len(array))

    blurs: list[Blur] = [of_type(one, Blur)[0] for one in images]
    check([blur.sigma_x_px[0] for blur in blurs], 0.2, 3.0)
    check([blur.rotation_rad[0] for blur in blurs], -np.pi, np.pi)
    check([blur.beta[0] for blur in blurs if blur.kind[0].startswith("generalized")], 0.5, 4.0)
    check([blur.beta[0] for blur in blurs if blur.kind[0].startswith("plateau")], 1.0, 2.0)
    check([blur.omega_rad[0] for blur in blurs if blur.size_px[0] < 13], np.pi / 3, np.pi)
    check([blur.omega_rad[0] for blur in blurs if blur.size_px[0] >= 13], np.pi / 5, np.pi)
    first_noise = [
        next(o for o in one.operations if isinstance(o, GaussianNoise | PoissonNoise)) for one in images
    ]
    check([noise.sigma[0] for noise in first_noise if isinstance(noise, GaussianNoise)], 1.0, 30.0)
    check([noise.scale[0] for noise in first_noise if isinstance(noise, PoissonNoise)], 0.05, 3.0)
    check([float(of_type(one, Jpeg)[0].quality[0]) for one in images], 30, 95)


def test_walk_stays_in_bounds_and_steps_over_500_frames():
    moved = set()
    for seed in range(6):
        for operation in draw(REALBASICVSR, seed, (500, 256, 256), 24.0).operations:
            checks: list[tuple[str, float, float, float]] = []
            if isinstance(operation, Blur):
                checks = [("sigma_x_px", 0.2, 3, 0.02), ("sigma_y_px", 0.2, 3, 0.02), ("beta", 0.5, 4, 0.1)]
                checks += [
                    ("rotation_rad", -np.pi, np.pi, 0.31416),
                    ("omega_rad", np.pi / 5, np.pi + 1e-4, 0.0628),
                ]
            elif isinstance(operation, GaussianNoise):
                checks = [("sigma", 1, 30, 0.1)]
            elif isinstance(operation, PoissonNoise):
                checks = [("scale", 0.05, 3, 0.005)]
            elif isinstance(operation, Jpeg):
                checks = [("quality", 30, 95, 4)]  # 3, and rounding
            for name, low, high, step in checks:
                values = np.array(getattr(operation, name))
                assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5, name
                assert np.abs(np.diff(values)).max() <= step + 2e-5, name
                if np.ptp(values) > 0:
                    moved.add(name)
            for name in ("kind", "size_px", "grey", "interpolation"):
                assert len(set(getattr(operation, name, "-"))) == 1
    assert moved == {
        "sigma_x_px",
        "sigma_y_px",
        "beta",
        "rotation_rad",
        "omega_rad",
        "sigma",
        "scale",
        "quality",
    }


def test_resize_walk_moves_by_steps_and_stays_even():
    sizes = [of_type(draw(REALBASICVSR, seed, (60, 400, 640), 24.0), Resize) for seed in range(30)]
    for first, second, *_ in sizes:
        for resize, low, high in ((first, 0.15, 1.5), (second, 0.15 * 0.3, 1.5 * 1.2)):
            heights, widths = np.array(resize.height_px), np.array(resize.width_px)
            assert not (heights % 2).any() and not (widths % 2).any()
            assert low * 400 - 2 <= heights.min() and heights.max() <= high * 400
            # both sides lose less than 2 to evenness, twice
            np.testing.assert_allclose(widths, 1.6 * heights, atol=8)
        assert np.abs(np.diff(first.height_px)).max() <= 0.015 * 400 + 2
    assert any(len(set(first.height_px)) > 5 for first, *_ in sizes)


def test_second_resize_changes_both_sides():
    """A public variant divides a scale by itself here and never narrows."""
    config = dataclasses.replace(REALBASICVSR.second.resize, up=0.0, down=1.0)  # type: ignore[union-attr, type-var]
    second = dataclasses.replace(REALBASICVSR.second, resize=config)  # type: ignore[type-var]
    recipe = dataclasses.replace(REALBASICVSR, second=second, time="constant")
    heights = []
    for seed in range(50):
        first, then, *_ = of_type(draw(recipe, seed, (2, 512, 768), 24.0), Resize)
        height, width = then.height_px[0] / first.height_px[0], then.width_px[0] / first.width_px[0]
        assert 0.25 < height <= 1 and abs(height - width) < 0.03
        heights.append(height)
    assert min(heights) < 0.5  # it does narrow


@pytest.mark.parametrize("time", ["constant", "independent"])
def test_other_time_modes(time):
    recipe = dataclasses.replace(REALBASICVSR, time=time)
    blur = next(o for o in draw(recipe, 3, (40, 64, 64), 24.0).operations if isinstance(o, Blur))
    varied = len(set(blur.sigma_x_px)) > 1 and len(set(blur.kind)) > 1
    assert varied == (time == "independent")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurConfig((3.0, 0.2)), "blur.sigma_px"),
        (lambda: BlurConfig((0.2, 3.0), kernels={"iso": 0.4}), "blur.kernels: .*sum to 1"),
        (lambda: BlurConfig((0.2, 3.0), kernels={"box": 1.0}), "unknown box"),
        (lambda: BlurConfig((0.2, 3.0), sizes_px=(8,)), "blur.sizes_px"),
        (lambda: CodecConfig({"libx264": 1.0}, probability=1.5), "codec.probability"),
        (lambda: dataclasses.replace(REALBASICVSR.end, shrink=0), "end.shrink"),  # type: ignore[type-var]
    ],
)
def test_wrong_settings_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_recipe_that_names_its_kinds_in_another_order_draws_the_same():
    def turned(weights: dict) -> dict:
        return dict(reversed(list(weights.items())))

    first = REALBASICVSR.first
    assert first.blur is not None and first.codec is not None
    blur = dataclasses.replace(first.blur, kernels=turned(first.blur.kernels))
    codec = dataclasses.replace(first.codec, encoders=turned(first.codec.encoders))
    recipe = dataclasses.replace(REALBASICVSR, first=dataclasses.replace(first, blur=blur, codec=codec))
    for seed in range(50):
        assert draw(recipe, seed, (3, 64, 64), 24.0) == draw(REALBASICVSR, seed, (3, 64, 64), 24.0)
