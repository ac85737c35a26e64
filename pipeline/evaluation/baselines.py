"""Filters without weights: the baselines that a network has to beat.

A filter maps uint8 (H, W, 3) frames, one after the other, to as many frames of the same size. Commands name
it as `none`, `median`, `mean3` or `gaussian:1.3` (the standard deviation in pixels).
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np

Filter = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
SIGMAS_PX = (0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0)
GRID = ("median", "mean3", *(f"gaussian:{sigma}" for sigma in SIGMAS_PX))
"""Filters to compare with; the best of them is chosen on training clips."""


def by_name(name: str) -> Filter:
    """ValueError for an unknown name."""
    kind, _, value = name.partition(":")
    if kind == "gaussian" and value:
        return functools.partial(_each, functools.partial(gaussian, sigma_px=float(value)))
    simple: dict[str, Filter] = {
        "none": iter,
        "median": functools.partial(_each, median),
        "mean3": mean_of_three,
    }
    if name not in simple:
        raise ValueError(f"filter: {name!r} is none of {', '.join(simple)}, gaussian:SIGMA")
    return simple[name]


def median(frame: np.ndarray) -> np.ndarray:
    """3x3 median of each channel."""
    return cv2.medianBlur(frame, 3)


def gaussian(frame: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur."""
    return cv2.GaussianBlur(frame, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101)


def mean_of_three(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The mean of each frame and its neighbours in time; the first and last frames have only one."""
    window: deque[np.ndarray] = deque(maxlen=3)
    for index, frame in enumerate(itertools.chain(frames, (None,))):
        if frame is not None:
            window.append(frame)
        elif len(window) == 3:
            window.popleft()  # the last frame has no later one
        if index and window:
            mean = np.mean(np.stack(window), axis=0, dtype=np.float32)
            yield np.asarray(mean).round().astype(np.uint8)


def _each(change: Callable[[np.ndarray], np.ndarray], frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    return map(change, frames)
