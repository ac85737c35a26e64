"""Blur kernels: six bivariate families and the circular sinc, and how to apply one quickly.

The families and their formulae are those of BasicSR 1.4.2 (`basicsr/data/degradations.py`), which
Real-ESRGAN and RealBasicVSR both use. Every kernel is a square of odd side that sums to 1.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from scipy.special import j1

KernelKind = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"
]

# Largest sum of absolute weights that may be left out of a kernel: an error of at worst 255 times this, 2.6
# grey levels, and in practice 0.1 on average.
TOLERANCE = 0.01


class Separated(NamedTuple):
    """A kernel as a sum of outer products: `sum_i columns[i] rows[i]^T`, each vector of odd length."""

    columns: np.ndarray  # (rank, size) float64
    rows: np.ndarray  # (rank, size) float64


def make_kernel(  # noqa: PLR0913 - the published parameters of a kernel
    kind: KernelKind,
    size_px: int,
    sigma_x_px: float = 1.0,
    sigma_y_px: float = 1.0,
    rotation_rad: float = 0.0,
    beta: float = 1.0,
    omega_rad: float = np.pi,
) -> np.ndarray:
    """A kernel `(size_px, size_px)` float64 with sum 1.

    Isotropic kinds use `sigma_x_px` alone; `beta` is the shape of the generalized Gaussians
    (exp(-q^beta / 2)) and of the plateaus (1 / (1 + q^beta)), where q is the squared Mahalanobis
    distance; `omega_rad` is the cut-off of the sinc in radians a pixel.
    """
    if size_px < 1 or size_px % 2 == 0:
        raise ValueError(f"size_px: a kernel has an odd side, not {size_px}")
    axis = np.arange(size_px, dtype=np.float64) - size_px // 2
    x, y = np.meshgrid(axis, axis)
    if kind == "sinc":
        return _sinc(np.hypot(x, y), omega_rad)
    if sigma_x_px <= 0 or sigma_y_px <= 0:
        raise ValueError(f"sigma_x_px, sigma_y_px: {sigma_x_px}, {sigma_y_px}: both must be above 0")
    if not kind.endswith("aniso"):
        sigma_y_px, rotation_rad = sigma_x_px, 0.0
    along = (x * np.cos(rotation_rad) + y * np.sin(rotation_rad)) / sigma_x_px
    across = (y * np.cos(rotation_rad) - x * np.sin(rotation_rad)) / sigma_y_px
    distance2 = along * along + across * across
    if kind.startswith("plateau"):
        kernel = 1.0 / (1.0 + distance2**beta)
    elif kind.startswith("generalized"):
        kernel = np.exp(-0.5 * distance2**beta)
    else:
        kernel = np.exp(-0.5 * distance2)
    return kernel / kernel.sum()


def _sinc(radius: np.ndarray, omega_rad: float) -> np.ndarray:
    """The ideal circular low-pass filter, w J1(w r) / (2 pi r), cut to the square and normalised."""
    safe = np.where(radius == 0, 1.0, radius)
    kernel = omega_rad * j1(omega_rad * safe) / (2 * np.pi * safe)
    kernel[radius == 0] = omega_rad**2 / (4 * np.pi)
    return kernel / kernel.sum()


def _trim(kernel: np.ndarray, tolerance: float) -> np.ndarray:
    """The kernel without its outer rings, as long as what is lost stays within `tolerance`.

    The trimmed kernel is normalised again, so flat areas keep their value.
    """
    half = kernel.shape[0] // 2
    weights = np.abs(kernel)
    keep = half
    while keep > 1:
        inner = weights[half - keep + 1 : half + keep, half - keep + 1 : half + keep]
        if weights.sum() - inner.sum() > tolerance:
            break
        keep -= 1
    kernel = kernel[half - keep : half + keep + 1, half - keep : half + keep + 1]
    return kernel / kernel.sum()


def _separate(kernel: np.ndarray, tolerance: float) -> Separated:
    """The lowest-rank sum of separable kernels within `tolerance` of this one (singular values).

    All kernels here are symmetric about their centre, so each is a part that is even along both axes and a
    part that is odd along both. Apart, the two have exactly even or odd vectors, which OpenCV filters with
    in a third of the time of others.
    """
    columns, rows, strengths = [], [], []
    for sign in (1.0, -1.0):
        left, values, right = np.linalg.svd((kernel + sign * kernel[:, ::-1]) / 2)
        for column, value, row in zip(left.T, values, right, strict=True):
            columns.append((column + sign * column[::-1]) / 2 * value)
            rows.append((row + sign * row[::-1]) / 2)
            strengths.append(value)
    chosen: list[int] = []
    rest = kernel.copy()
    for index in np.argsort(strengths)[::-1]:
        chosen.append(index)
        rest -= np.outer(columns[index], rows[index])
        if np.abs(rest).sum() <= tolerance:
            break
    return Separated(np.array(columns)[chosen], np.array(rows)[chosen])


@lru_cache(maxsize=256)
def _plan(  # noqa: PLR0913 - the published parameters of a kernel
    kind: KernelKind,
    size_px: int,
    sigma_x_px: float,
    sigma_y_px: float,
    rotation_rad: float,
    beta: float,
    omega_rad: float,
) -> Separated:
    """The kernel, trimmed and separated.

    Cached, because a blur that does not change over time asks for the same kernel at every frame.
    """
    kernel = make_kernel(kind, size_px, sigma_x_px, sigma_y_px, rotation_rad, beta, omega_rad)
    return _separate(_trim(kernel, TOLERANCE / 2), TOLERANCE / 2)


def blur(  # noqa: PLR0913 - the published parameters of a kernel
    frame: np.ndarray,
    kind: KernelKind,
    size_px: int,
    sigma_x_px: float,
    sigma_y_px: float,
    rotation_rad: float,
    beta: float,
    omega_rad: float,
) -> np.ndarray:
    """`frame` (H, W, 3) uint8 filtered by the kernel, borders mirrored without repeating the edge.

    Within a grey level, rounding included, of filtering with the whole kernel in floating point (mean 0.1).
    """
    columns, rows = _plan(kind, size_px, sigma_x_px, sigma_y_px, rotation_rad, beta, omega_rad)
    if len(rows) == 1:
        return cv2.sepFilter2D(frame, -1, rows[0], columns[0])
    total = cv2.sepFilter2D(frame, cv2.CV_32F, rows[0], columns[0])
    for row, column in zip(rows[1:-1], columns[1:-1], strict=True):
        cv2.add(total, cv2.sepFilter2D(frame, cv2.CV_32F, row, column), dst=total)
    last = cv2.sepFilter2D(frame, cv2.CV_32F, rows[-1], columns[-1])
    return cv2.add(total, last, dtype=cv2.CV_8U)
