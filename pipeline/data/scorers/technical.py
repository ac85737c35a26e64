"""Scores of a clip that need no weights and show whether it is usable, whatever it shows.

Clips of one source are measured in one decode of it. Some frames of each clip are measured at full size, and
each of these is compared with its neighbour, shrunk to 320 px, for motion and repeated frames. Pictures are
full-range luma as coded (NIQE gets RGB), since converting every frame to RGB costs more than decoding it.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from pipeline.metrics import niqe
from pipeline.video import colour, decoding

VERSION = 2
"""Increased when the same clip would get other scores."""

SMALL_PX = 320
_DARK, _BRIGHT = 16, 239  # of 255: what counts as crushed or clipped
_SAME = 0.5  # mean difference of two frames, of 255, below which nothing moved

# Column names of scores/ and what they mean; the order of columns.
SCORES = {
    "sharpness": "variance of the Laplacian of luma (0 to 255), higher is sharper",
    "exposure": "mean luma, 0 to 255",
    "exposure_range": "largest minus smallest mean luma of the frames looked at: fades, flashes",
    "contrast": "standard deviation of luma, 0 to 255",
    "clipped_share": "share of pixels that are crushed to black or clipped to white",
    "motion": "mean difference of neighbouring frames at 320 px, 0 to 255",
    "static_share": "share of neighbouring frames without any difference",
    "border_share": "share of rows and columns at the edges that are black",
    "blockiness": "steps at the edges of 8x8 blocks over steps elsewhere, 1 where there are no blocks",
    "bits_per_pixel": "of the source's encoding",
    "niqe": "no-reference quality, lower is better",
}


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian of a uint8 (H, W) picture."""
    edges = cv2.Laplacian(grey, cv2.CV_16S)  # whole numbers, so that sums are exact and fast
    return cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - (cv2.sumElems(edges)[0] / edges.size) ** 2


def clipped_share(grey: np.ndarray) -> float:
    """Share of the pixels of a uint8 (H, W) picture that are almost black or almost white."""
    return 1 - cv2.countNonZero(cv2.inRange(grey, _DARK, _BRIGHT)) / grey.size


def border_share(grey: np.ndarray) -> float:
    """Shares of the height and of the width that are black from the edges inwards, added up, at most 1."""
    share = 0.0
    for lines in (grey.max(axis=1), grey.max(axis=0)):
        bright = np.flatnonzero(lines >= _DARK + 16)
        black = len(lines) if len(bright) == 0 else bright[0] + len(lines) - 1 - bright[-1]
        share += black / len(lines)
    return min(1.0, float(share))


def blockiness(grey: np.ndarray) -> float:
    """Mean step across the edges of the 8x8 grid over the mean step elsewhere, both directions averaged."""
    ratios = []
    for axis, one, other in ((0, grey[:, 1:], grey[:, :-1]), (1, grey[1:], grey[:-1])):
        if not one.size:
            continue
        sums = cv2.reduce(cv2.absdiff(one, other), axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
        steps = sums / grey.shape[axis]
        at_edge = np.arange(len(steps)) % 8 == 7
        if at_edge.any() and steps[~at_edge].size:
            ratios.append((steps[at_edge].mean() + 0.1) / (steps[~at_edge].mean() + 0.1))
    return float(np.mean(ratios)) if ratios else 1.0


def of_picture(grey: np.ndarray) -> dict[str, float]:
    """The scores that one picture has, from its luma."""
    mean, deviation = cv2.meanStdDev(grey)
    return {
        "sharpness": sharpness(grey),
        "exposure": float(mean[0, 0]),
        "contrast": float(deviation[0, 0]),
        "clipped_share": clipped_share(grey),
        "border_share": border_share(grey),
        "blockiness": blockiness(grey),
    }


def _spread(count: int, number: int) -> list[int]:
    """At most `number` of 0 to count - 1, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, max(0, count - 1), number).round()})


class _Converters:
    """One for each size, so that swscale keeps its tables."""

    def __init__(self) -> None:
        self.rgb = colour.RgbConverter()
        self.luma, self.small = colour.LumaConverter(), colour.LumaConverter()


class _Measured:
    """Accumulates one clip's measurements as its frames pass."""

    def __init__(self, num_frames: int, sampled_frames: int, niqe_frames: int) -> None:
        looked_at = _spread(num_frames - 1, sampled_frames)  # each has a frame after it
        between = np.linspace(0, len(looked_at) - 1, niqe_frames + 2)[1:-1].round()
        self._looked_at, self._niqe_at = set(looked_at), {looked_at[int(i)] for i in between}
        self._pictures: list[dict[str, float]] = []
        self._niqe: list[float] = []
        self._levels: list[float] = []
        self._differences: list[float] = []
        self._before: np.ndarray | None = None
        self.seen = 0

    def add(self, frame: Any, stream: Any, to: _Converters) -> None:
        """The next frame of the clip, as decoded."""
        index = self.seen
        self.seen += 1
        if index in self._looked_at:
            self._pictures.append(of_picture(to.luma(frame, stream)))
        if index in self._niqe_at and (value := niqe.niqe(to.rgb(frame, stream))) is not None:
            self._niqe.append(value)
        if index not in self._looked_at and index - 1 not in self._looked_at:
            return
        small = to.small(frame, stream, SMALL_PX)
        self._levels.append(cv2.mean(small)[0])
        if index - 1 in self._looked_at:
            assert self._before is not None
            self._differences.append(cv2.mean(cv2.absdiff(self._before, small))[0])
        self._before = small

    def scores(self) -> dict[str, float]:
        found = {name: float(np.mean([one[name] for one in self._pictures])) for name in self._pictures[0]}
        # The minimum, since a dark frame looks like border everywhere.
        found["border_share"] = min(one["border_share"] for one in self._pictures)
        if self._niqe:
            found["niqe"] = float(np.mean(self._niqe))
        if self._differences:
            found["exposure_range"] = max(self._levels) - min(self._levels)
            found["motion"] = float(np.mean(self._differences))
            found["static_share"] = float(np.mean([one < _SAME for one in self._differences]))
        return found


def measure_clips(
    clips: list[dict[str, Any]], path: str, sampled_frames: int, niqe_frames: int
) -> Iterator[dict[str, float]]:
    """Measure every score that can be determined for each row of clips/; runs in the decoding child.

    clips: consecutive clips of one source. sampled_frames: frames measured in each clip; niqe_frames: how
    many of those NIQE gets. Raises ValueError, after yielding the clips before it, if one does not decode.
    """
    if clips[0]["media"] == "image":
        picture = decoding.load_image(path)
        value = niqe.niqe(picture) if niqe_frames else None
        yield of_picture(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)) | (
            {} if value is None else {"niqe": value}
        )
        return
    to = _Converters()
    waiting = iter(clips)
    clip, measured = next(waiting), _Measured(clips[0]["num_frames"], sampled_frames, niqe_frames)
    for stamp, frame, stream in decoding.decode_video(path, clips[0]["start_pts"], clips[-1]["end_pts"]):
        if stamp < (clip["start_pts"] or 0):
            continue
        if clip["end_pts"] is not None and stamp >= clip["end_pts"]:
            break
        measured.add(frame, stream, to)
        if measured.seen == clip["num_frames"]:
            yield measured.scores()
            following = next(waiting, None)
            if following is None:
                return
            clip, measured = following, _Measured(following["num_frames"], sampled_frames, niqe_frames)
    raise ValueError(f"only {measured.seen} of the clip's {clip['num_frames']} frames decode")


def bits_per_pixel(clip: dict[str, Any]) -> float | None:
    """Bits per pixel of the whole source's encoding; None if the container does not state its bit rate."""
    pixels = clip["width"] * clip["height"]
    if clip["media"] == "image":
        return 8.0 * clip["source_bytes"] / pixels if clip["source_bytes"] else None
    if not clip["bit_rate"] or not clip["fps"]:
        return None
    return clip["bit_rate"] / (clip["fps"] * pixels)
