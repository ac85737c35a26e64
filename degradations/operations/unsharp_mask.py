"""Sharpening of the truth, which is no degradation: what recipes train towards."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class UnsharpMask:
    """Sharpening of the truth: frame + weight (frame - blurred) where that difference passes the threshold.

    RealBasicVSR and Real-ESRGAN: a 51x51 kernel with OpenCV's sigma for it, 8 pixels, weight 0.5,
    threshold 10 of 255; the mask of what passes is blurred in the same way.
    """

    sigma_px: float = 8.0
    weight: float = 0.5
    threshold: float = 10.0

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8, sharpened."""
        blurred = _wide_gaussian(frame, self.sigma_px)
        _, mask = cv2.threshold(cv2.absdiff(frame, blurred), self.threshold, 255, cv2.THRESH_BINARY)
        mask = _wide_gaussian(mask, self.sigma_px)
        sharp = cv2.addWeighted(frame, 1 + self.weight, blurred, -self.weight, 0)
        # Apart, so that both stay uint8.
        brighter = cv2.multiply(cv2.subtract(sharp, frame), mask, scale=1 / 255)
        darker = cv2.multiply(cv2.subtract(frame, sharp), mask, scale=1 / 255)
        return cv2.subtract(cv2.add(frame, brighter), darker)


def sharpen_truth(frames: np.ndarray, mask: UnsharpMask | None = None) -> np.ndarray:
    """`frames` (T, H, W, 3) uint8 after the unsharp mask: what recipes with `sharpen_truth` train towards."""
    mask = mask or UnsharpMask()
    return np.stack([mask.apply(frame) for frame in frames])


def _wide_gaussian(frame: np.ndarray, sigma_px: float) -> np.ndarray:
    """A Gaussian of 4 pixels or more on a quarter of the size: 8 times faster than 51 taps.

    The box that shrinks and the triangle that grows again are part of the wanted variance:
    (4^2 - 1) / 12 and 4^2 / 6.
    """
    height, width = frame.shape[:2]
    small = cv2.resize(frame, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    variance = (sigma_px**2 - (4**2 - 1) / 12 - 4**2 / 6) / 4**2
    small = cv2.GaussianBlur(small, (0, 0), float(np.sqrt(max(variance, 0.01))))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
