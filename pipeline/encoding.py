"""Video files out: frames of an exact size encoded, sound and subtitles taken over without encoding."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from pipeline import media


class VideoWriter:
    """Writes uint8 `(H, W, 3)` RGB frames to a video file, at exactly the given size.

    Lossless is FFV1 in RGB (name the file .mkv). Otherwise libx264 by default, tagged BT.709, 4:2:0; odd
    sizes become 4:4:4, which needs no even sides, instead of being padded or cropped. One thread, so the
    same frames give the same bytes. Without a `pts` frames follow each other at `fps`.
    """

    def __init__(
        self,
        path: str,
        fps: Fraction | int,
        width: int,
        height: int,
        codec: str = "libx264",
        lossless: bool = False,
        crf: int = 16,
        pix_fmt: str | None = None,
        time_base: Fraction | None = None,
        threads: int = 1,
    ) -> None:
        odd = width % 2 or height % 2
        self._size = (width, height)
        self._format = "bgr0" if lossless else pix_fmt or ("yuv444p" if odd else "yuv420p")
        self._container = av.open(path, "w")
        fps = Fraction(fps).limit_denominator(1_000_000)
        options = {} if lossless else {"crf": str(crf)}
        name = "ffv1" if lossless else codec
        stream: Any = self._container.add_stream(name, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, self._format
        context = stream.codec_context
        stream.time_base = context.time_base = time_base or 1 / fps
        context.thread_count = threads
        if self._format.startswith("yuv"):
            context.colorspace, context.color_range = 1, 1  # BT.709, limited range
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._stream = stream
        self._reformatter = VideoReformatter()
        self._next_pts = 0

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def write(self, frame: np.ndarray, pts: int | None = None) -> None:
        """Append one frame; pts in ticks of time_base (VFR), else the next in line."""
        height, width, _ = frame.shape
        if (width, height) != self._size:
            raise ValueError(f"a frame of {width}x{height} in a video of {self._size[0]}x{self._size[1]}")
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self._format.startswith("yuv"):
            picture = self._reformatter.reformat(
                picture,
                format=self._format,
                src_color_range=ColorRange.JPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=media.EXACT,
                threads=1,
            )
        else:
            picture = self._reformatter.reformat(picture, format=self._format, threads=1)
        picture.pts = self._next_pts if pts is None else pts
        picture.time_base = self._stream.codec_context.time_base
        self._next_pts = picture.pts + 1
        self._container.mux(self._stream.encode(picture))


def copy_audio(source: str, video_only: str, target: str) -> int:
    """Write `target`: the pictures of `video_only`, the sound and subtitles of `source`, nothing encoded
    again. Returns the number of streams taken from `source` (those that the target's container can hold).

    Sound keeps its offset to the pictures: `video_only` starts at 0, so packets are moved by the start
    time of the source's own video.
    """
    with (
        av.open("file:" + source, options={"format_whitelist": media.DEMUXERS}) as audio,
        av.open(video_only) as video,
        av.open(target, "w") as output,
    ):
        streams: dict[tuple[int, int], tuple[Any, Fraction]] = {}
        picture = video.streams.video[0]
        streams[0, picture.index] = (output.add_stream_from_template(picture), Fraction(0))
        source_video = audio.streams.video[0] if audio.streams.video else None
        start = Fraction(0)
        if source_video is not None and source_video.start_time:
            start = source_video.start_time * (source_video.time_base or Fraction(0))
        for stream in [*audio.streams.audio, *audio.streams.subtitles]:
            if stream.codec_context is None or stream.codec_context.name not in _names(output):
                continue
            with contextlib.suppress(ValueError, av.FFmpegError):
                streams[1, stream.index] = (output.add_stream_from_template(stream), start)
        for which, packet in _interleave(video, picture, audio):
            entry = streams.get((which, packet.stream.index))
            if entry is None or packet.dts is None:
                continue
            stream, shift = entry
            ticks = round(shift / packet.time_base)
            packet.dts -= ticks
            packet.pts = None if packet.pts is None else packet.pts - ticks
            packet.stream = stream
            output.mux(packet)
        return len(streams) - 1


def _names(output: Any) -> set[str]:
    """Codec names (of encoders and of the formats they make) that a container can hold."""
    return {*output.supported_codecs, *(name.split("_")[-1] for name in output.supported_codecs)}


def _interleave(video: Any, picture: Any, audio: Any) -> Iterator[tuple[int, Any]]:
    """Packets of both files, (0, video packet) and (1, source packet), by decoding time."""
    others = [*audio.streams.audio, *audio.streams.subtitles]
    queues = [iter(video.demux(picture)), iter(audio.demux(others) if others else [])]
    heads = [next(queue, None) for queue in queues]

    def time(which: int) -> float:
        packet = heads[which]
        if packet is None:
            return float("inf")
        return float(packet.dts * packet.time_base) if packet.dts is not None else float("-inf")

    while any(head is not None for head in heads):
        which = 0 if time(0) <= time(1) else 1
        yield which, heads[which]
        heads[which] = next(queues[which], None)
