"""Warping error on known motion: none for what only moves, the known value for flicker, more for noise."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.metrics.warping import moved, warping_error
from pipeline.video import decoding

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    photo = decoding.load_image(str(ROOT / "demo/media/coffee.jpg"))
    return cv2.GaussianBlur(cv2.resize(photo, (260, 200), interpolation=cv2.INTER_AREA), (0, 0), 1.5)


def shifted(picture: np.ndarray, x: int, y: int) -> np.ndarray:
    """A window of 160x120 that moves over the picture."""
    return np.ascontiguousarray(picture[30 + y : 150 + y, 40 + x : 200 + x])


def test_a_still_video_has_none(picture):
    frame = shifted(picture, 0, 0)
    assert warping_error(frame, frame, None, None) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("x", "y"), [(3, 0), (-4, 2), (0, 6)])
def test_what_only_moves_has_next_to_none(picture, x, y):
    earlier, later = shifted(picture, 0, 0), shifted(picture, x, y)
    still = 1000 * float(((earlier.astype(float) - later) ** 2).mean() / 255**2)
    along_the_flow = warping_error(earlier, later, None, None)
    assert along_the_flow is not None and along_the_flow < 0.05 * still


def test_flicker_of_a_known_size_has_its_known_error(picture):
    earlier = (shifted(picture, 0, 0) // 2 + 60).astype(np.uint8)
    later = (shifted(picture, 3, 1) // 2 + 60).astype(np.uint8)
    truth = warping_error(earlier, later, earlier, later)
    brighter = warping_error(earlier, later + np.uint8(10), earlier, later)
    assert truth is not None and brighter is not None
    assert brighter - truth == pytest.approx(1000 * (10 / 255) ** 2, rel=0.2)


def test_the_flow_is_the_truths(picture):
    """A method that stands still where the truth moves is found out."""
    earlier, later = shifted(picture, 0, 0), shifted(picture, 5, 0)
    frozen = warping_error(earlier, earlier, earlier, later)
    follows = warping_error(earlier, later, earlier, later)
    assert frozen is not None and follows is not None and frozen > 10 * follows


def test_moved_reads_where_the_flow_points():
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    flow = np.zeros((4, 5, 2), np.float32)
    flow[..., 0] = 1
    assert np.array_equal(moved(values, flow)[:, :4], values[:, 1:])


def test_frames_too_small_for_the_flow_have_none():
    frame = np.zeros((8, 40, 3), np.uint8)
    assert warping_error(frame, frame, None, None) is None
