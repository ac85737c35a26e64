"""From a source to its clips: shot boundaries, cutting to a length, perceptual hashes.

`scan` looks at each frame of a time span (in the sandbox's child: small pictures, nothing but numbers comes
back); `join` puts the spans of one source together; `cut` decides where clips begin and end, from the
whole source's numbers, so that a source scanned in parts gives the clips of one pass.

Cuts are found with PySceneDetect's detectors on our own decoder's frames: AdaptiveDetector for hard cuts (a
frame that differs far more than its neighbours, so fast motion is not a cut), ThresholdDetector for fades
through black.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

from pipeline.video import colour, decoding

SCAN_SIDE_PX = 256
"""The longer side of the frames on which cuts are sought."""

OVERLAP_S = 2.0
"""A span is scanned from this long before its beginning: far longer than earlier frames have an effect, and
so that the two scans of the overlap can be compared."""

_MAX_SPANS = 2000  # a week in spans of 5 minutes; a longer duration comes from a forged header
_HASH_SIDE_PX = 32
_PROGRESS_FRAMES = 32
_DAMAGED, _INTERLACED = 1, 2
VERSION = 1
"""Increased when the same file would give other clips."""


@dataclasses.dataclass(frozen=True)
class Cutting:
    """The settings that decide where clips begin and end."""

    max_clip_frames: int
    min_clip_frames: int
    cut_ratio: float
    cut_difference: float
    fade_level: float


@dataclasses.dataclass(frozen=True)
class Source:
    """What a scan has to know about the whole source, from its probe."""

    size: tuple[int, int]  # coded (width, height) of the first frame
    fps: Fraction
    time_base: Fraction


FRAME = np.dtype(
    [
        ("stamp", np.int64),  # in ticks
        ("end", np.int64),  # stamp + the frame's own duration
        ("score", np.float64),  # PySceneDetect's difference to the frame before; 0 for a damaged one
        ("level", np.float64),  # mean of the picture, 0 to 255
        ("phash", np.uint64),
        ("flags", np.uint8),
    ]
)
"""One frame as a scan sees it: 41 bytes. A clip's hash is its middle frame's."""


class _FrameScore(ContentDetector):
    """The library's measure of how far a frame is from the one before, without its decision."""

    def score(self, timecode: FrameTimecode, picture: np.ndarray) -> float:
        return self._calculate_frame_score(timecode, picture)


class _HardCuts(AdaptiveDetector):
    """The library's decision, on scores that were measured before."""

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        return float(frame_img)


def _hash_bits(grey: np.ndarray) -> int:
    """64-bit perceptual hash of a grey picture.

    The signs, against their median, of the 8x8 lowest frequencies of the 32x32 DCT: equal for copies at
    another size or bit rate up to a few bits.
    """
    small = cv2.resize(grey, (_HASH_SIDE_PX, _HASH_SIDE_PX), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])  # without the mean, which would shift the median
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def scan(
    path: str, max_pixels: int, source: Source, start_pts: int | None = None, end_pts: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield `{"frames": array of FRAME}` from time to time.

    The last item also has "stopped": the reason why scanning stopped before the end, or "". start_pts,
    end_pts: the span to scan, or the whole source if None. Frames that the decoder marks as damaged, or whose
    size differs from the source's, are flagged and belong to no clip.
    """
    convert, detector = colour.RgbConverter(SCAN_SIDE_PX), _FrameScore()
    found: list[tuple[Any, ...]] = []
    seen, stopped = False, ""
    try:
        for stamp, frame, stream in decoding.decode_video(path, start_pts, end_pts, max_pixels=max_pixels):
            end = stamp + (frame.duration or decoding.frame_step(stream))
            flags = _INTERLACED * frame.interlaced_frame
            if frame.is_corrupt or (frame.width, frame.height) != source.size:
                found.append((stamp, end, 0.0, 0.0, 0, flags | _DAMAGED))
            else:
                picture = cv2.cvtColor(convert(frame, stream), cv2.COLOR_RGB2BGR)
                grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
                score = detector.score(_timecode(len(found), source.fps), picture)
                found.append((stamp, end, score, float(np.mean(picture)), _hash_bits(grey), flags))
            if len(found) == _PROGRESS_FRAMES:
                yield {"frames": np.array(found, FRAME)}
                found, seen = [], True
    except ValueError as error:
        if not found and not seen:
            raise
        stopped = str(error)
    yield {"frames": np.array(found, FRAME), "stopped": stopped}


def spans(start_pts: int, duration_s: float | None, segment_s: float, time_base: Fraction) -> list[int]:
    """Where the spans of a source begin, in ticks.

    There is a single span if the source's length is unknown, not much over one span, or implausible.
    """
    count = round((duration_s or 0.0) / segment_s)
    if not 1 < count <= _MAX_SPANS:
        return [start_pts]
    ticks = round(segment_s / time_base)
    return [start_pts + i * ticks for i in range(count)]


def join(parts: list[np.ndarray], begins: list[int], time_base: Fraction) -> np.ndarray | None:
    """Join the frames of consecutive spans as if they had been scanned in one pass.

    Returns None if the scans disagree where they overlap: seeking in this file is unreliable, so only a
    single pass can tell.

    parts: FRAME arrays, each scanned from OVERLAP_S before its beginning; begins: the beginnings, in ticks.
    """
    overlap = round(OVERLAP_S / time_base)
    joined = [parts[0]]
    for before, part, begin in zip(parts, parts[1:], begins[1:], strict=False):
        one = before[before["stamp"] >= begin - overlap]
        other = part[part["stamp"] < begin]
        # The first score of a span has nothing to compare with, and damage may show in one scan only.
        if len(other) < 2 or not np.array_equal(one[1:], other[1:]) or one["stamp"][0] != other["stamp"][0]:
            return None
        joined.append(part[part["stamp"] >= begin])
    return np.concatenate(joined)


def _timecode(index: int, rate: Fraction) -> FrameTimecode:
    return FrameTimecode(index, fps=float(rate))


def _cuts(frames: np.ndarray, cutting: Cutting, rate: Fraction) -> set[int]:
    """Index of the first frame after each cut."""
    hard = _HardCuts(
        adaptive_threshold=cutting.cut_ratio, min_content_val=cutting.cut_difference, min_scene_len=1
    )
    fades = ThresholdDetector(threshold=cutting.fade_level, min_scene_len=1)
    cuts: set[int] = set()
    for index in np.flatnonzero(frames["flags"] & _DAMAGED == 0):
        timecode = _timecode(int(index), rate)
        found = [*hard.process_frame(timecode, frames["score"][index])]
        found += fades.process_frame(timecode, frames["level"][index])
        cuts |= {cut.frame_num for cut in found}
    return cuts


def cut(frames: np.ndarray, cutting: Cutting, source: Source) -> list[dict[str, Any]]:
    """The clips of a source's frames: start_pts, end_pts, num_frames, fps, vfr, interlaced, phash of each."""
    damaged = {int(index) for index in np.flatnonzero(frames["flags"] & _DAMAGED)}
    edges = {0, len(frames), *(cut for cut in _cuts(frames, cutting, source.fps) if cut < len(frames))}
    interlaced = int((frames["flags"] & _INTERLACED != 0).sum()) * 2 > len(frames)
    pieces = _pieces(sorted(edges), damaged, cutting)
    return [_clip(frames, first, last, interlaced, source) for first, last in pieces]


def _pieces(edges: list[int], damaged: set[int], cutting: Cutting) -> list[tuple[int, int]]:
    """The clips as [first, last) frame indices.

    Shots are cut into pieces of max_clip_frames from their start; a piece (a shot or the end of one) shorter
    than min_clip_frames is left out, unless the source has nothing else.
    """
    edges = sorted({*edges, *damaged, *(index + 1 for index in damaged)})
    pieces = [
        (first, min(first + cutting.max_clip_frames, end))
        for start, end in itertools.pairwise(edges)
        if start not in damaged
        for first in range(start, end, cutting.max_clip_frames)
    ]
    long_enough = [(first, last) for first, last in pieces if last - first >= cutting.min_clip_frames]
    return long_enough or pieces


def _clip(frames: np.ndarray, first: int, last: int, interlaced: bool, source: Source) -> dict[str, Any]:
    stamps = frames["stamp"][first:last]
    end = int(frames["stamp"][last] if last < len(frames) else frames["end"][-1])
    steps = np.diff([*stamps, end]) if len(stamps) > 1 else np.array([1])
    # Containers with coarse ticks (1 ms) make equal steps uneven by a tick.
    vfr = bool(steps.max() - steps.min() > max(2, 0.25 * np.median(steps)))
    fps = float(source.fps)
    if vfr:
        fps = float((len(stamps) - 1) / (int(stamps[-1] - stamps[0]) * source.time_base))
    return {
        "start_pts": int(stamps[0]),
        "end_pts": end,
        "num_frames": last - first,
        "fps": fps,
        "vfr": vfr,
        "interlaced": interlaced,
        "phash": f"{int(frames['phash'][(first + last) // 2]):016x}",
    }


def scan_image(path: str, max_pixels: int) -> str:
    """The perceptual hash of a still picture, 16 hex digits."""
    picture = colour.shrink(decoding.load_image(path, max_pixels), SCAN_SIDE_PX)
    return f"{_hash_bits(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)):016x}"
