"""Everything a video file carries besides its pictures: time stamps, sound, subtitles, chapters.

No Ray and no torch: these functions run in the sandbox, where the foreign file is opened.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from pipeline.video import colour, decoding
from pipeline.video.encoding import VideoFormat


@dataclasses.dataclass(frozen=True)
class VideoPart:
    """A finished file with some of a video's pictures, its time stamps counted from its first frame."""

    path: str
    first_pts: int
    """of its first frame, in ticks of the whole video, which starts at 0"""


def stamped_frames(path: str, skip: int = 0, deep: bool = False) -> Iterator[tuple[int, np.ndarray | None]]:
    """(time stamp in ticks of the stream's time base, displayed RGB frame (H, W, 3)) of a video.

    Of the first `skip` frames only the time stamps: they are decoded, so that what follows is the same as
    without, but not converted. deep: uint16 frames instead of uint8.
    """
    convert = colour.RgbConverter(deep=deep)
    for index, (stamp, frame, stream) in enumerate(decoding.decode_video(path)):
        yield stamp, convert(frame, stream) if index >= skip else None


def choose_ending(source: str, endings: list[str]) -> tuple[str, int, int]:
    """The first of `endings` whose container holds all sound and subtitles of the source, else the last.

    Also returns how many streams it holds and how many are left out.
    """
    with _open_foreign(source) as opened:
        wanted = _companions(opened)
        held = 0
        for ending in endings:
            with av.open("/dev/null", "w", format=_FORMATS.get(ending, ending)) as output:
                held = len(_add_companions(output, wanted))
            if held == len(wanted):
                break
        return ending, held, len(wanted) - held


_FORMATS = {"mkv": "matroska"}


def join(
    source: str | None, parts: list[VideoPart], video: VideoFormat, start: Fraction, target: str
) -> Iterator[int]:
    """Join the parts' pictures with the source's sound, subtitles and chapters, without re-encoding.

    Writes `target`, with the source's titles, and yields the number of packets written now and then; there
    may be no `source`. Sound keeps its offset to the pictures: they start at 0, so packets are moved back by
    `start`, the time of the source's first frame in seconds. `video` is the parts' format: a stream made with
    it has their header and states the frame rate, which a copied stream does not.
    """
    with contextlib.ExitStack() as stack:
        # Bit-exact: no random identifiers in the file.
        output = stack.enter_context(av.open(target, "w", container_options={"fflags": "+bitexact"}))
        pictures = video.add_to(output)
        companions: dict[int, Any] = {}
        queues = [_pictures(parts, video)]
        if source is not None:
            foreign = stack.enter_context(_open_foreign(source))
            companions = _add_companions(output, _companions(foreign))
            output.metadata.update(foreign.metadata)
            with contextlib.suppress(ValueError, av.FFmpegError):
                output.set_chapters([_moved(chapter, start) for chapter in foreign.chapters()])
            queues.append(_sound(foreign, set(companions), start))
        for count, (which, packet) in enumerate(_by_time(*queues), start=1):
            packet.stream = pictures if which == 0 else companions[packet.stream.index]
            output.mux(packet)
            if count % 1000 == 0:
                yield count
    yield 0


def _open_foreign(path: str) -> Any:
    return av.open("file:" + path, options={"format_whitelist": decoding.DEMUXERS})


def _companions(opened: Any) -> list[Any]:
    """The sound and subtitles of a file, in its order."""
    streams = [*opened.streams.audio, *opened.streams.subtitles]
    return sorted(streams, key=lambda stream: stream.index)


def _add_companions(output: Any, wanted: list[Any]) -> dict[int, Any]:
    """Index in the source: stream of the output, for those that the container can hold."""
    # Names of encoders, and of the formats they produce.
    names = {*output.supported_codecs, *(name.split("_")[-1] for name in output.supported_codecs)}
    added = {}
    for stream in wanted:
        if stream.codec_context is None or stream.codec_context.name not in names:
            continue
        with contextlib.suppress(ValueError, av.FFmpegError):
            copy = output.add_stream_from_template(stream)
            copy.metadata.update(stream.metadata)
            copy.disposition = stream.disposition
            added[stream.index] = copy
    return added


def _moved(chapter: Any, by_s: Fraction) -> Any:
    ticks = round(by_s / chapter["time_base"])
    return {**chapter, "start": max(0, chapter["start"] - ticks), "end": max(0, chapter["end"] - ticks)}


def _pictures(parts: list[VideoPart], video: VideoFormat) -> Iterator[Any]:
    """The packets of all parts with the whole video's time stamps.

    A decoder gets frames some packets late where an encoder reordered them; the decoding times of all are
    the display times in order, delayed by the most that any part reorders.
    """
    assert video.time_base is not None
    step = max(1, round(1 / (video.fps * video.time_base)))
    delay = max(_reordering(part) for part in parts)
    earlier = deque(range(-delay * step, 0, step))
    for part in parts:
        with av.open(part.path) as opened:
            stream: Any = opened.streams.video[0]
            base = stream.time_base
            packets: list[Any] = [packet for packet in opened.demux(stream) if packet.size]
            # Formats differ in what they do to the negative decoding times before a reordered first frame.
            first = min(packet.pts for packet in packets)
            stamps = [
                part.first_pts + round((packet.pts - first) * base / video.time_base) for packet in packets
            ]
            for packet, shown, due in zip(packets, stamps, sorted(stamps), strict=True):
                earlier.append(due)
                packet.time_base = video.time_base
                packet.pts, packet.dts, packet.duration = shown, earlier.popleft(), step
                yield packet


def _reordering(part: VideoPart) -> int:
    """The largest number of packets by which one of its frames comes late."""
    with av.open(part.path) as opened:
        stream: Any = opened.streams.video[0]
        stamps = [packet.pts for packet in opened.demux(stream) if packet.size]
    place = {stamp: index for index, stamp in enumerate(sorted(stamps))}
    return max(index - place[stamp] for index, stamp in enumerate(stamps))


def _sound(foreign: Any, indices: set[int], start: Fraction) -> Iterator[Any]:
    """The packets of the source's streams of these indices, moved back by `start` seconds."""
    streams = [stream for stream in foreign.streams if stream.index in indices]
    if not streams:
        return
    for packet in foreign.demux(streams):
        if packet.size and packet.pts is not None:
            ticks = round(start / packet.time_base)
            packet.dts = (packet.pts if packet.dts is None else packet.dts) - ticks
            packet.pts -= ticks
            yield packet


def _by_time(*queues: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """(which queue, packet), by decoding time."""
    heads: list[Any] = [next(queue, None) for queue in queues]
    while any(head is not None for head in heads):
        which = min(
            (index for index, head in enumerate(heads) if head is not None),
            key=lambda index: heads[index].dts * heads[index].time_base,
        )
        yield which, heads[which]
        heads[which] = next(queues[which], None)
