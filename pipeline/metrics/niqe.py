"""NIQE: how far a picture's local statistics lie from those of pristine photographs. Lower is better.

Mittal, Soundararajan, Bovik: "Making a Completely Blind Image Quality Analyzer", 2013. Two scales, blocks of
96x96; in each block the parameters of generalised Gaussians fitted to normalised luma and to products of
neighbours (36 numbers), compared as one Gaussian with the pristine one. `niqe_parameters.npz` (that
Gaussian and the 7x7 window) is the file of basicsr 1.4.2, Apache-2.0, (c) the BasicSR authors; the code is
our own. All blocks are fitted at once with sums, and shapes looked up by bisection, so that a 720p frame
takes some hundredths of a second instead of most of one.
"""

import functools
from pathlib import Path

import cv2
import numpy as np
from scipy.special import gamma

BLOCK_PX = 96
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
# MATLAB's imresize by one half: the cubic of a = -0.5, stretched by 2, at distances 0.25, 0.75, 1.25, 1.75.
_DISTANCES = np.array([1.75, 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75])
_CUBIC = np.where(
    _DISTANCES <= 1,
    1.5 * _DISTANCES**3 - 2.5 * _DISTANCES**2 + 1,
    -0.5 * _DISTANCES**3 + 2.5 * _DISTANCES**2 - 4 * _DISTANCES + 2,
)
_HALVING = _CUBIC / _CUBIC.sum()


@functools.cache
def _pristine() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean (36,), covariance (36, 36), window (7, 7)) of the pristine photographs' model."""
    with np.load(Path(__file__).with_name("niqe_parameters.npz")) as file:
        return file["mu_pris_param"].ravel(), file["cov_pris_param"], file["gaussian_window"]


@functools.cache
def _shapes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables for looking up generalised Gaussians by their shape alpha, on a grid of 0.001.

    They are alpha, the ratio E|x|^2 / E x^2 (which rises with alpha), and the factor sqrt(gamma(1/alpha) /
    gamma(3/alpha)) from deviation to scale.
    """
    alpha = np.arange(0.2, 10.001, 0.001)
    one, two, three = gamma(1 / alpha), gamma(2 / alpha), gamma(3 / alpha)
    return alpha, two**2 / (one * three), np.sqrt(one / three)


def luma(frame: np.ndarray) -> np.ndarray:
    """uint8 `(H, W, 3)` RGB to whole-numbered BT.601 luma in 16..235, float32 `(H, W)`, as MATLAB has it."""
    # Scaled down and up again in single precision, so that luma half-way between levels rounds as in basicsr.
    unit = frame.astype(np.float32) / np.float32(255)
    value = unit[..., 2] * 24.966 + unit[..., 1] * 128.553 + unit[..., 0] * 65.481 + 16.0
    return np.round(value.astype(np.float32) / np.float32(255) * np.float32(255))


def _halve(picture: np.ndarray) -> np.ndarray:
    """Half the size in each direction as MATLAB's imresize does it, in single precision."""
    height, width = picture.shape
    taps = _HALVING.astype(np.float32)
    padded = cv2.copyMakeBorder(picture / np.float32(255), 3, 4, 0, 0, cv2.BORDER_REFLECT)
    rows = sum(tap * padded[offset : offset + height : 2] for offset, tap in enumerate(taps))
    padded = cv2.copyMakeBorder(np.asarray(rows), 0, 0, 3, 4, cv2.BORDER_REFLECT)
    columns = sum(tap * padded[:, offset : offset + width : 2] for offset, tap in enumerate(taps))
    return np.asarray(columns) * np.float32(255)


def _fit(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asymmetric generalised Gaussians fitted to `(N, values)`: shape, left scale, right scale, each (N,)."""
    alphas, ratios, scales = _shapes()
    below = np.minimum(blocks, 0)
    count = blocks.shape[1]
    square_below = np.einsum("ij,ij->i", below, below)
    square = np.einsum("ij,ij->i", blocks, blocks)
    left = np.sqrt(square_below / np.count_nonzero(blocks < 0, axis=1))
    right = np.sqrt((square - square_below) / np.count_nonzero(blocks > 0, axis=1))
    mean_abs = (blocks.sum(axis=1) - 2 * below.sum(axis=1)) / count
    skew = left / right
    ratio = mean_abs**2 / (square / count) * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    above = np.clip(np.searchsorted(ratios, ratio), 1, len(ratios) - 1)
    nearest = np.where(ratio - ratios[above - 1] <= ratios[above] - ratio, above - 1, above)
    nearest = np.where(np.isnan(ratio), 0, nearest)  # as an argmin over NaN gives
    return alphas[nearest], left * scales[nearest], right * scales[nearest]


def _features(normalised: np.ndarray, block: int) -> np.ndarray:
    """18 numbers of each block: `(N, 18)` from a normalised picture whose sides are whole blocks."""
    rows, columns = normalised.shape[0] // block, normalised.shape[1] // block
    blocks = normalised.reshape(rows, block, columns, block).transpose(2, 0, 1, 3)
    blocks = np.ascontiguousarray(blocks.reshape(rows * columns, block, block))
    flat = blocks.reshape(rows * columns, -1)
    alpha, left, right = _fit(flat)
    features = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        products = blocks * np.roll(blocks, shift, axis=(1, 2))
        alpha, left, right = _fit(products.reshape(flat.shape))
        features += [alpha, (right - left) * (gamma(2 / alpha) / gamma(1 / alpha)), left, right]
    return np.stack(features, axis=1)


def _normalise(picture: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Luma minus its local mean, over its local deviation plus one (the paper's equation 1).

    Single precision on purpose: over a flat area the local mean then rounds to the luma itself, so that
    these pixels are zero and count neither as below nor as above it.
    """
    wide = picture.astype(np.float64)
    mean = cv2.filter2D(wide, -1, window, borderType=cv2.BORDER_REPLICATE).astype(np.float32)
    square = cv2.filter2D((picture * picture).astype(np.float64), -1, window, borderType=cv2.BORDER_REPLICATE)
    deviation = np.sqrt(np.abs(square.astype(np.float32) - mean * mean))
    return (picture - mean) / (deviation + 1)


def niqe(frame: np.ndarray) -> float | None:
    """NIQE of a uint8 `(H, W, 3)` RGB frame.

    Returns None for a frame smaller than two blocks of 96x96, or so flat that fewer than two blocks have
    statistics.
    """
    height, width = (side // BLOCK_PX * BLOCK_PX for side in frame.shape[:2])
    if height * width < 2 * BLOCK_PX**2:
        return None
    pristine_mean, pristine_covariance, window = _pristine()
    picture = luma(frame[:height, :width])
    with np.errstate(invalid="ignore", divide="ignore"):
        full = _features(_normalise(picture, window), BLOCK_PX)
        half = _features(_normalise(_halve(picture), window), BLOCK_PX // 2)
    features = np.concatenate([full, half], axis=1)
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return None
    difference = pristine_mean - np.nanmean(features, axis=0)
    inverse = np.linalg.pinv((pristine_covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(difference @ inverse @ difference))
