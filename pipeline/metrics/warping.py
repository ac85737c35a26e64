"""Warping error: how far each frame is from the one before it, moved along the optical flow.

Flicker raises it. As Lai et al. 2018 ("Learning Blind Video Temporal Consistency") define it: the mean
squared difference, in units of [0, 1], over the pixels that both frames show; given times 1000. The flow is
OpenCV's DIS (Kroeger et al. 2016, preset medium) and comes from the true video where there is one, so that a
method cannot gain by inventing motion. Pixels count as hidden by Ruder et al. 2016: where the flows there and
back differ, and at motion boundaries.
"""

from typing import Any

import cv2
import numpy as np

MIN_SIDE_PX = 16
"""DIS needs patches; smaller frames have no warping error."""


def warping_error(
    earlier: np.ndarray, later: np.ndarray, true_earlier: np.ndarray | None, true_later: np.ndarray | None
) -> float | None:
    """1000 times the mean squared difference of `later` and `earlier` moved onto it.

    All arrays are uint8 (H, W, 3) RGB. Returns None if no pixel can be compared.
    """
    if min(later.shape[:2]) < MIN_SIDE_PX:
        return None
    from_frames = (
        (earlier, later) if true_earlier is None or true_later is None else (true_earlier, true_later)
    )
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in from_frames]
    estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    back = estimator.calc(grey[1], grey[0], None)  # where each pixel of `later` was
    there = estimator.calc(grey[0], grey[1], None)
    seen = visible(back, there)
    if not seen.any():
        return None
    difference = (later.astype(np.float32) - moved(earlier.astype(np.float32), back)) / 255
    return 1000 * float((difference**2).mean(axis=2)[seen].mean())


def moved(values: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) float values read at each pixel's position plus its flow (H, W, 2), bilinear."""
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        values, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def visible(back: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose flow leads inside the frame, and there back to them, away from its edges."""
    height, width = back.shape[:2]
    returned = moved(there, back)
    length = (back**2).sum(axis=2) + (returned**2).sum(axis=2)
    consistent = ((back + returned) ** 2).sum(axis=2) <= 0.01 * length + 0.5
    gradient = sum((np.gradient(back[..., axis], axis=along) ** 2) for axis in (0, 1) for along in (0, 1))
    smooth = gradient <= 0.01 * (back**2).sum(axis=2) + 0.002
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    x, y = columns + back[..., 0], rows + back[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return consistent & smooth & inside
