"""PSNR and SSIM of a frame against the true one, in RGB and in luma, with one stated definition.

The definition is the common one of restoration work (basicsr's `calculate_psnr` and `calculate_ssim`):

- uint8 frames of range 255, arithmetic in float64, `border_px` pixels cut off on every side first;
- PSNR of one frame is 10 log10(255^2 / MSE), the error averaged over pixels and channels together;
- SSIM (Wang et al. 2004) uses an 11x11 Gaussian window with sigma 1.5, population covariance, K1 0.01, K2
  0.03, and averages over the positions where the window lies inside the frame, then over channels;
- luma is MATLAB's `rgb2ycbcr` Y (BT.601, 16 to 235), not rounded.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_BT601_LUMA = np.array([65.481, 128.553, 24.966]) / 255


def full_reference_scores(restored: Frame, truth: Frame, border_px: int = 0) -> dict[str, float]:
    """psnr_rgb, psnr_y (dB, infinite for equal frames), ssim_rgb and ssim_y of two (H, W, 3) frames."""
    left, right = cut_border(restored, border_px), cut_border(truth, border_px)
    left_y, right_y = luma(left), luma(right)
    return {
        "psnr_rgb": psnr(left, right),
        "psnr_y": psnr(left_y, right_y),
        "ssim_rgb": ssim(left, right),
        "ssim_y": ssim(left_y, right_y),
    }


def cut_border(frame: Frame, border_px: int) -> Frame:
    """The frame without `border_px` pixels on each side."""
    height, width = frame.shape[:2]
    if min(height, width) - 2 * border_px < SSIM_WINDOW_PX:
        raise ValueError(
            f"a frame of {width}x{height} is too small for SSIM's window of {SSIM_WINDOW_PX} pixels"
            + (f" after cutting {border_px} at each side" if border_px else "")
        )
    return frame[border_px : height - border_px, border_px : width - border_px]


def luma(frame: Frame) -> NDArray[np.float64]:
    """(H, W, 3) uint8 RGB -> (H, W) BT.601 luma in 16..235, not rounded."""
    return 16.0 + frame.astype(np.float64) @ _BT601_LUMA


def psnr(left: NDArray, right: NDArray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of range 255; infinite if they are equal."""
    error = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def ssim(left: NDArray, right: NDArray) -> float:
    """Structural similarity of two (H, W) or (H, W, C) arrays of range 255: 1 if they are equal."""
    x, y = left.astype(np.float64), right.astype(np.float64)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x**2
    variance_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float(np.mean(luminance * structure))


def _window_mean(values: NDArray[np.float64]) -> NDArray:
    """Gaussian-weighted means at the positions where the whole window lies inside the frame."""
    kernel = cv2.getGaussianKernel(SSIM_WINDOW_PX, SSIM_SIGMA_PX)
    half = SSIM_WINDOW_PX // 2
    return np.asarray(cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel))[half:-half, half:-half]
