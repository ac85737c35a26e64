"""Scores of a clip that need no weights: what makes a clip useless whatever it shows.

Motion and repeated frames are measured between neighbouring frames shrunk to 320 px; the others on a few
frames of full size, averaged. All pictures are uint8 RGB as displayed.
"""

import itertools
from typing import Any

import cv2
import numpy as np

from pipeline import media
from pipeline.scores import niqe

SMALL_PX = 320
_DARK, _BRIGHT = 16, 239  # of 255: what counts as crushed or clipped
_SAME = 0.5  # mean difference of two frames, of 255, below which nothing moved

# Column names of scores/ and what they mean; the order of columns.
SCORES = {
    "sharpness": "variance of the Laplacian of luma (0 to 255), higher is sharper",
    "exposure": "mean luma, 0 to 255",
    "exposure_range": "largest minus smallest mean luma of a frame within the clip: fades, flashes",
    "contrast": "standard deviation of luma, 0 to 255",
    "clipped_share": "share of pixels that are crushed to black or clipped to white",
    "motion": "mean difference of neighbouring frames at 320 px, 0 to 255",
    "static_share": "share of neighbouring frames without any difference",
    "border_share": "share of rows and columns at the edges that are black",
    "blockiness": "steps at the edges of 8x8 blocks over steps elsewhere, 1 where there are no blocks",
    "bits_per_pixel": "of the source's encoding",
    "niqe": "no-reference quality, lower is better",
}


def luma(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def sharpness(grey: np.ndarray) -> float:
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def clipped_share(grey: np.ndarray) -> float:
    return float(((grey < _DARK) | (grey > _BRIGHT)).mean())


def border_share(grey: np.ndarray) -> float:
    """Share of the height and of the width, added, that is black from the edges inwards, at most 1."""
    share = 0.0
    for lines in (grey.max(axis=1), grey.max(axis=0)):
        bright = np.flatnonzero(lines >= _DARK + 16)
        black = len(lines) if len(bright) == 0 else bright[0] + len(lines) - 1 - bright[-1]
        share += black / len(lines)
    return min(1.0, float(share))


def blockiness(grey: np.ndarray) -> float:
    """Mean step across the edges of the 8x8 grid over the mean step elsewhere, both directions averaged."""
    picture = grey.astype(np.float32)
    ratios = []
    for steps in (
        np.abs(np.diff(picture, axis=1)).mean(axis=0),
        np.abs(np.diff(picture, axis=0)).mean(axis=1),
    ):
        at_edge = np.arange(len(steps)) % 8 == 7
        if at_edge.any() and steps[~at_edge].size:
            ratios.append((steps[at_edge].mean() + 0.1) / (steps[~at_edge].mean() + 0.1))
    return float(np.mean(ratios)) if ratios else 1.0


def measure_clip(clip: dict[str, Any], path: str, sampled_frames: int, niqe_frames: int) -> dict[str, float]:
    """Every score of one row of clips/ that can be told; runs in the decoding child.

    sampled_frames: frames of full size that are measured; niqe_frames: how many of those NIQE gets.
    """
    if clip["media"] == "image":
        return _of_pictures([media.load_image(path)], niqe_frames)
    wanted = {int(i) for i in np.linspace(0, clip["num_frames"] - 1, sampled_frames).round()}
    chosen: list[np.ndarray] = []
    small: list[np.ndarray] = []
    # Only what is looked at closely becomes RGB: converting costs more than decoding.
    to_rgb, to_luma = media.RgbConverter(), media.LumaConverter()
    frames = media.decode_video(path, clip["start_pts"], clip["end_pts"])
    for index, (_, frame, stream) in enumerate(frames):
        if index in wanted:
            chosen.append(to_rgb(frame, stream))
        small.append(to_luma(frame, stream, SMALL_PX))
    if not chosen or len(small) < clip["num_frames"]:
        raise ValueError(f"only {len(small)} of the clip's {clip['num_frames']} frames decode")
    return {**_of_pictures(chosen, niqe_frames), **_of_motion(small)}


def _of_pictures(frames: list[np.ndarray], niqe_frames: int) -> dict[str, float]:
    greys = [luma(frame) for frame in frames]
    found = {
        "sharpness": float(np.mean([sharpness(grey) for grey in greys])),
        "exposure": float(np.mean([grey.mean() for grey in greys])),
        "contrast": float(np.mean([grey.std() for grey in greys])),
        "clipped_share": float(np.mean([clipped_share(grey) for grey in greys])),
        # The least: one dark frame has no borders to speak of.
        "border_share": float(np.min([border_share(grey) for grey in greys])),
        "blockiness": float(np.mean([blockiness(grey) for grey in greys])),
    }
    picked = [frames[int(i)] for i in np.linspace(0, len(frames) - 1, niqe_frames + 2)[1:-1].round()]
    values = [value for value in map(niqe.niqe, picked) if value is not None]
    return {**found, "niqe": float(np.mean(values))} if values else found


def _of_motion(small: list[np.ndarray]) -> dict[str, float]:
    """From every frame's luma at 320 px."""
    if len(small) < 2:
        return {}
    pairs = itertools.pairwise(small)
    differences = [float(cv2.absdiff(before, after).mean()) for before, after in pairs]
    levels = [float(picture.mean()) for picture in small]
    return {
        "exposure_range": max(levels) - min(levels),
        "motion": float(np.mean(differences)),
        "static_share": float(np.mean([difference < _SAME for difference in differences])),
    }


def bits_per_pixel(clip: dict[str, Any]) -> float | None:
    """Of the whole source's encoding; None where the container does not tell."""
    pixels = clip["width"] * clip["height"]
    if clip["media"] == "image":
        return 8.0 * clip["source_bytes"] / pixels if clip["source_bytes"] else None
    if not clip["bit_rate"] or not clip["fps"]:
        return None
    return clip["bit_rate"] / (clip["fps"] * pixels)
