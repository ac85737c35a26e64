"""Each operation does what the field's code does: noise in distribution, the others in values."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import poisson

from degradations.operations import GaussianNoise, Jpeg, PoissonNoise, Resize, UnsharpMask, sharpen_truth

RECORDED = Path(__file__).parents[1] / "data" / "degradations" / "basicsr.npz"


def noise_of(operation: GaussianNoise | PoissonNoise, frame: np.ndarray, index: int = 0) -> np.ndarray:
    return operation.apply(frame, index).astype(np.int16) - frame


def assert_moments(noise: np.ndarray, mean: float, variance: float, correlation: float) -> None:
    """The mean, the variance and the correlation of channels, each within 4 standard errors."""
    count = noise[..., 0].size
    flat = noise.reshape(-1, 3).astype(np.float64)
    excess = np.mean((flat - flat.mean()) ** 4) / flat.var() ** 2 - 1  # standard error of a variance
    independent = count * (3 if correlation == 0 else 1)
    assert abs(flat.mean() - mean) < 4 * np.sqrt(variance / independent)
    assert abs(flat.var() - variance) < 4 * variance * np.sqrt(excess / independent)
    measured = np.asarray(np.corrcoef(flat.T))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(measured[one, other] - correlation) < 4 / np.sqrt(count)


@pytest.mark.parametrize("sigma", [1.0, 7.5, 25.0])
@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise(sigma: float, grey: bool):
    frame = np.full((500, 600, 3), 128, np.uint8)
    noise = noise_of(GaussianNoise((sigma,), (grey,), seed=5), frame)
    assert_moments(noise, 0.0, sigma**2 + 1 / 12, float(grey))  # rounding adds 1/12
    within = np.mean(np.abs(noise) <= np.floor(sigma))  # a bell, not only its variance
    exact = np.mean(np.abs(np.rint(np.random.default_rng(0).normal(0, sigma, 10**6))) <= np.floor(sigma))
    assert abs(within - exact) < 0.005


def test_gaussian_noise_stronger_than_a_signed_byte():
    frame = np.full((300, 300, 3), 128, np.uint8)
    noise = noise_of(GaussianNoise((60.0,), (False,), seed=5), frame)
    assert noise.min() == -128 and noise.max() == 127
    assert abs(np.mean(np.abs(noise) > 90) - 0.1314) < 0.01  # P(|N(0, 1)| > 1.508)


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_has_basicsr_moments(grey: bool):
    with np.load(RECORDED) as recorded:
        levels, moments = recorded["poisson_levels"], recorded["poisson_moments"]
    for level, row in zip(levels.tolist(), moments, strict=True):
        frame = np.full((600, 600, 3), level, np.uint8)
        frame[0, :100] = np.arange(100)[:, None] * 2 + 1  # 100 or 101 levels: n is 128
        noise = noise_of(PoissonNoise((1.0,), (grey,), seed=9), frame)[1:]
        counts = np.arange(600)
        weights = poisson.pmf(counts, level / 255 * 128)
        rounded = np.rint(counts * 255 / 128).clip(0, 255) - level  # the law itself, on whole levels
        mean = float(np.sum(weights * rounded))
        variance = float(np.sum(weights * (rounded - mean) ** 2))
        assert_moments(noise, mean, variance, float(grey))
        theirs = row[4] if grey else row[1]
        samples = 599 * 600 * (1 if grey else 3)
        # both are samples; ours is also rounded
        assert abs(noise.var() - theirs) < 4 * np.sqrt(2) * theirs * np.sqrt(2 / samples) + 0.2


def test_poisson_scale_scales_and_black_stays_black():
    frame = np.full((400, 400, 3), 60, np.uint8)
    frame[:50] = 0
    weak = noise_of(PoissonNoise((0.3,), (False,), seed=1), frame)
    strong = noise_of(PoissonNoise((0.6,), (False,), seed=1), frame)
    assert not weak[:50].any() and not strong[:50].any()
    assert 1.8 < strong[50:].std() / weak[50:].std() < 2.2


def test_noise_differs_by_frame_and_seed_and_repeats():
    frame = np.full((64, 64, 3), 128, np.uint8)
    for cls in (GaussianNoise, PoissonNoise):
        noise = cls((1.0, 1.0), (False, False), seed=1)
        first = noise.apply(frame, 0)
        assert np.array_equal(first, noise.apply(frame, 0))
        assert not np.array_equal(first, noise.apply(frame, 1))
        assert not np.array_equal(first, cls((1.0,), (False,), seed=2).apply(frame, 0))


@pytest.mark.parametrize(
    ("name", "flag"), [("area", cv2.INTER_AREA), ("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)]
)
def test_resize_is_the_stated_opencv_mode(name, flag: int):
    with np.load(RECORDED) as recorded:
        image = recorded["image"]
    for height, width in ((50, 61), (140, 150), (96, 200)):
        done = Resize((name,), (height,), (width,)).apply(image, 0)
        assert np.array_equal(done, cv2.resize(image, (width, height), interpolation=flag))


def test_jpeg_is_close_to_basicsr_and_keeps_channels_apart():
    with np.load(RECORDED) as recorded:
        image, qualities, expected = recorded["image"], recorded["jpeg_qualities"], recorded["jpeg"]
    for quality, theirs in zip(qualities.tolist(), expected, strict=True):
        # basicsr's DiffJPEG holds the standard's luma table transposed: ours on the transposed picture
        done = Jpeg((quality,)).apply(np.ascontiguousarray(image.swapaxes(0, 1)), 0).swapaxes(0, 1)
        assert np.abs(done.astype(np.float32) - theirs).mean() < 2.0
        upright = Jpeg((quality,)).apply(image, 0).astype(np.float32)
        assert abs(np.abs(upright - image).mean() - np.abs(theirs.astype(np.float32) - image).mean()) < 0.2
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 250
    assert np.abs(Jpeg((90,)).apply(red, 0).astype(int) - red).max() < 6


def test_unsharp_mask_is_close_to_basicsr():
    with np.load(RECORDED) as recorded:
        image, theirs = recorded["image"], recorded["sharpened"].astype(np.float32)
    done = UnsharpMask().apply(image)
    assert np.abs(theirs - image).mean() > 3.0  # it does something
    assert np.abs(done - theirs).mean() < 1.0
    assert np.array_equal(sharpen_truth(image[None])[0], done)
