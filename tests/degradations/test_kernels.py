"""Kernels equal basicsr's, and filtering by the fast way equals filtering by the plain one."""

from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from degradations.kernels import KernelKind, blur, make_kernel

RECORDED = Path(__file__).parents[1] / "data" / "degradations" / "basicsr.npz"
KINDS: tuple[KernelKind, ...] = get_args(KernelKind)


def test_kernels_equal_basicsr_over_200_draws():
    with np.load(RECORDED) as recorded:
        parameters, kernels = recorded["parameters"], recorded["kernels"]
    assert len(parameters) == 200
    for (kind, size, *rest), expected in zip(parameters, kernels, strict=True):
        kernel = make_kernel(KINDS[int(kind)], int(size), *rest)
        padded = np.pad(kernel, (21 - int(size)) // 2)
        np.testing.assert_allclose(padded, expected, atol=1e-6, rtol=0, err_msg=KINDS[int(kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_fast_filter_is_within_a_level_of_the_plain_one(kind: KernelKind):
    with np.load(RECORDED) as recorded:
        image = recorded["image"]
    rng = np.random.default_rng(3)
    for _ in range(25):
        size = int(rng.choice(np.arange(7, 22, 2)))
        sigma_x, sigma_y = rng.uniform(0.2, 3, 2)
        angle, beta, omega = rng.uniform(-3, 3), rng.uniform(1, 2), rng.uniform(0.7, 3.1)
        done = blur(image, kind, size, sigma_x, sigma_y, angle, beta, omega)
        kernel = make_kernel(kind, size, sigma_x, sigma_y, angle, beta, omega)
        exact = cv2.filter2D(image.astype(np.float64), -1, kernel).clip(0, 255)
        difference = np.abs(done - exact)
        assert difference.mean() < 0.5 and difference.max() < 3.1  # 0.5 of it is rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 300)])
def test_flat_frames_stay_flat_however_small(kind: KernelKind, size: tuple[int, int]):
    frame = np.full((*size, 3), 77, np.uint8)
    assert np.array_equal(blur(frame, kind, 21, 2.0, 1.0, 0.5, 1.5, 1.0), frame)


def test_an_even_side_is_refused():
    with pytest.raises(ValueError, match="odd side, not 8"):
        make_kernel("iso", 8)
