"""The Fréchet distance on Gaussians whose distance is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from pipeline.metrics import frechet


def features_of(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, D) rows whose sample mean and unbiased sample covariance are exactly these."""
    noise = np.random.default_rng(seed).standard_normal((count, len(mean)))
    white, _ = np.linalg.qr(noise - noise.mean(axis=0))
    return mean + white @ np.linalg.cholesky(covariance).T * np.sqrt(count - 1)


def test_gaussians_of_one_shape_differ_by_their_means_and_spreads():
    mean = np.linspace(-1, 2, 20)
    left = features_of(np.zeros(20), np.eye(20), 60, seed=0)
    right = features_of(mean, 9 * np.eye(20), 45, seed=1)
    assert frechet.frechet_distance(left, right) == pytest.approx(np.sum(mean**2) + 20 * (3 - 1) ** 2)


def test_any_two_gaussians_follow_the_formula():
    random = np.random.default_rng(2)
    a, b = (m @ m.T + 0.1 * np.eye(12) for m in random.standard_normal((2, 12, 12)))
    mean = random.standard_normal(12)
    left, right = features_of(mean, a, 40, seed=3), features_of(np.zeros(12), b, 50, seed=4)
    expected = np.sum(mean**2) + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet.frechet_distance(left, right) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(right, left) == pytest.approx(expected, rel=1e-9)


def test_fewer_clips_than_features_still_have_a_distance():
    features = np.random.default_rng(5).standard_normal((6, frechet.FEATURES))
    assert frechet.frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet_distance(features, features + 0.5) == pytest.approx(0.25 * frechet.FEATURES)


def test_one_clip_is_no_distribution():
    with pytest.raises(ValueError, match="at least two clips"):
        frechet.frechet_distance(np.zeros((1, 4)), np.zeros((3, 4)))


def test_what_is_no_torchscript_is_refused_in_one_line(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "i3d.pt")
    with pytest.raises(ValueError, match=r"i3d\.pt: no TorchScript file") as told:
        frechet.VideoFeatures(tmp_path / "i3d.pt")
    assert "\n" not in str(told.value)
