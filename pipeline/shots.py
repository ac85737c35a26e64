"""From a source to its clips: shot boundaries, cutting to a length, perceptual hashes.

Runs in the sandbox's child: one pass over small frames, nothing but numbers comes back. Cuts are found
with PySceneDetect's detectors on our own decoder's frames: AdaptiveDetector for hard cuts (a frame that
differs far more than its neighbours do, so fast motion is no cut), ThresholdDetector for fades through black.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

from pipeline import media

SCAN_SIDE_PX = 256
"""The longer side of the frames on which cuts are sought."""

_HASH_SIDE_PX = 32
_PROGRESS_FRAMES = 32
VERSION = 1
"""Goes up when the same file would give other clips."""


@dataclasses.dataclass(frozen=True)
class Cutting:
    """What decides where clips begin and end."""

    max_clip_frames: int
    min_clip_frames: int
    cut_ratio: float
    cut_difference: float
    fade_level: float


@dataclasses.dataclass
class _Scan:
    """One value per frame that was seen."""

    stamps: list[int] = dataclasses.field(default_factory=list)
    thumbnails: list[bytes] = dataclasses.field(default_factory=list)
    cuts: set[int] = dataclasses.field(default_factory=set)  # index of the first frame after the cut
    damaged: set[int] = dataclasses.field(default_factory=set)
    interlaced: int = 0
    end_pts: int = 0
    stopped: str = ""


def phash(grey: np.ndarray) -> str:
    """64-bit perceptual hash of a grey picture as 16 hex digits.

    The signs, against their median, of the 8x8 lowest frequencies of the 32x32 DCT: equal for copies at
    another size or bit rate up to a few bits.
    """
    small = cv2.resize(grey, (_HASH_SIDE_PX, _HASH_SIDE_PX), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])  # without the mean, which would shift the median
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def scan(path: str, cutting: Cutting, max_pixels: int) -> Iterator[dict[str, Any]]:
    """Yield `{"frames": n}` as the scan goes on, at last `{"clips": [...], "stopped": reason or ""}`.

    A clip is a dict of start_pts, end_pts, num_frames, fps, vfr, interlaced and phash. Frames that the
    decoder marks as damaged, or whose size differs from the first one's, belong to no clip.
    """
    result = _Scan()
    rate, time_base = Fraction(25), Fraction(1)
    detectors: list[Any] = [
        AdaptiveDetector(
            adaptive_threshold=cutting.cut_ratio, min_content_val=cutting.cut_difference, min_scene_len=1
        ),
        ThresholdDetector(threshold=cutting.fade_level, min_scene_len=1),
    ]
    try:
        convert, size = media.RgbConverter(SCAN_SIDE_PX), (0, 0)
        for stamp, frame, stream in media.decode_video(path, max_pixels=max_pixels):
            index = len(result.stamps)
            if index == 0:
                size, time_base = (frame.width, frame.height), Fraction(stream.time_base)
                rate = media.stream_fps(stream)
            result.stamps.append(stamp)
            result.end_pts = stamp + (frame.duration or media.frame_step(stream))
            result.interlaced += frame.interlaced_frame
            if frame.is_corrupt or (frame.width, frame.height) != size:
                result.damaged.add(index)
                result.thumbnails.append(b"")
                continue
            picture = cv2.cvtColor(convert(frame, stream), cv2.COLOR_RGB2BGR)
            _look(result, detectors, index, rate, picture)
            if index % _PROGRESS_FRAMES == 0:
                yield {"frames": index + 1}
    except ValueError as error:
        if not result.stamps:
            raise
        result.stopped = str(error)
    if result.stamps:
        for detector in detectors:
            result.cuts |= {
                cut.frame_num for cut in detector.post_process(_timecode(len(result.stamps), rate))
            }
    clips = [_clip(result, first, last, rate, time_base) for first, last in _pieces(result, cutting)]
    yield {"clips": clips, "stopped": result.stopped, "frames": len(result.stamps)}


def _timecode(index: int, rate: Fraction) -> FrameTimecode:
    return FrameTimecode(index, fps=float(rate))


def _look(result: _Scan, detectors: list[Any], index: int, rate: Fraction, picture: np.ndarray) -> None:
    """Show one small BGR frame to the detectors and keep its thumbnail."""
    for detector in detectors:
        result.cuts |= {cut.frame_num for cut in detector.process_frame(_timecode(index, rate), picture)}
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (_HASH_SIDE_PX, _HASH_SIDE_PX), interpolation=cv2.INTER_AREA)
    result.thumbnails.append(small.tobytes())


def _pieces(result: _Scan, cutting: Cutting) -> list[tuple[int, int]]:
    """[first, last) frame indices of the clips.

    Shots are cut into pieces of max_clip_frames from their start; a piece (so, a shot or its tail) with
    fewer than min_clip_frames is left out, unless nothing else is left of the source.
    """
    total = len(result.stamps)
    edges = sorted({0, total, *(cut for cut in result.cuts if cut < total)})
    edges = sorted({*edges, *result.damaged, *(index + 1 for index in result.damaged)})
    pieces = [
        (first, min(first + cutting.max_clip_frames, end))
        for start, end in itertools.pairwise(edges)
        if start not in result.damaged
        for first in range(start, end, cutting.max_clip_frames)
    ]
    long_enough = [(first, last) for first, last in pieces if last - first >= cutting.min_clip_frames]
    return long_enough or pieces


def _clip(result: _Scan, first: int, last: int, rate: Fraction, time_base: Fraction) -> dict[str, Any]:
    stamps = result.stamps[first:last]
    end = result.stamps[last] if last < len(result.stamps) else result.end_pts
    steps = np.diff([*stamps, end]) if len(stamps) > 1 else np.array([1])
    # Containers with coarse ticks (1 ms) make equal steps uneven by a tick.
    vfr = bool(steps.max() - steps.min() > max(2, 0.25 * np.median(steps)))
    fps = float(rate)
    if vfr:
        fps = float((len(stamps) - 1) / ((stamps[-1] - stamps[0]) * time_base))
    thumbnail = np.frombuffer(result.thumbnails[(first + last) // 2], np.uint8)
    return {
        "start_pts": stamps[0],
        "end_pts": end,
        "num_frames": last - first,
        "fps": fps,
        "vfr": vfr,
        "interlaced": result.interlaced * 2 > len(result.stamps),
        "phash": phash(thumbnail.reshape(_HASH_SIDE_PX, _HASH_SIDE_PX)),
    }


def scan_image(path: str, max_pixels: int) -> str:
    """The perceptual hash of a still picture."""
    picture = media.shrink(media.load_image(path, max_pixels), SCAN_SIDE_PX)
    return phash(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
