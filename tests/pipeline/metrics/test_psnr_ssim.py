"""PSNR and SSIM against hand-made cases, against basicsr and against scikit-image with the same settings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from pipeline.metrics import psnr_ssim
from tests.reference.record_psnr import BORDERS, SIZES, frame_pair

RECORDED = Path(__file__).parents[2] / "data" / "scores" / "psnr.json"


def frames(height: int = 48, width: int = 64, noise: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    truth = np.stack([x * 3, y * 5, (x + y) * 2], axis=-1) % 256
    other = np.clip(truth + rng.normal(0, noise, truth.shape), 0, 255)
    return other.round().astype(np.uint8), truth.astype(np.uint8)


def test_psnr_of_a_known_error():
    truth = np.full((16, 16, 3), 100, np.uint8)
    off_by_five = truth + 5
    assert psnr_ssim.psnr(off_by_five, truth) == pytest.approx(20 * math.log10(255 / 5))


def test_luma_is_bt601_with_its_range():
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    assert psnr_ssim.luma(corners)[0] == pytest.approx([16.0, 235.0, 81.481])


def test_equal_frames_give_infinity_and_one():
    _, truth = frames()
    scores = psnr_ssim.full_reference_scores(truth, truth)
    assert math.isinf(scores["psnr_rgb"]) and math.isinf(scores["psnr_y"])
    assert scores["ssim_rgb"] == pytest.approx(1) and scores["ssim_y"] == pytest.approx(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("border", BORDERS)
def test_numbers_are_basicsrs(size: tuple[int, int], border: int):
    recorded = json.loads(RECORDED.read_text())[f"{size[0]}x{size[1]}, border {border}"]
    scores = psnr_ssim.full_reference_scores(*frame_pair(*size), border_px=border)
    assert scores == pytest.approx(recorded, abs=1e-4) and set(scores) == set(recorded)


@pytest.mark.parametrize("size", [(48, 64), (11, 11), (37, 53)])
def test_ssim_equals_scikit_images(size: tuple[int, int]):
    other, truth = frames(*size)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    scores = psnr_ssim.full_reference_scores(other, truth)
    expected_rgb = structural_similarity(other, truth, channel_axis=2, **settings)
    expected_y = structural_similarity(psnr_ssim.luma(other), psnr_ssim.luma(truth), **settings)
    assert scores["ssim_rgb"] == pytest.approx(expected_rgb, abs=1e-9)
    assert scores["ssim_y"] == pytest.approx(expected_y, abs=1e-9)


def test_the_border_is_left_out():
    other, truth = frames()
    damaged = other.copy()
    damaged[:4], damaged[-4:], damaged[:, :4], damaged[:, -4:] = 0, 255, 0, 255
    clean = psnr_ssim.full_reference_scores(other, truth, border_px=4)
    assert psnr_ssim.full_reference_scores(damaged, truth, border_px=4) == clean
    assert psnr_ssim.full_reference_scores(damaged, truth)["psnr_rgb"] < clean["psnr_rgb"]


def test_frames_too_small_for_the_window_are_refused():
    small = np.zeros((14, 40, 3), np.uint8)
    with pytest.raises(ValueError, match=r"40x14 is too small .* after cutting 2"):
        psnr_ssim.full_reference_scores(small, small, border_px=2)
