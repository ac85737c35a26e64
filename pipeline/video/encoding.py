"""Video files out: frames of an exact size, encoded with the colours and the time stamps of their source."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from pipeline.video import colour, decoding


@dataclasses.dataclass(frozen=True)
class Codec:
    """All that is particular to one codec of restored videos. Odd sizes need 4:4:4."""

    encoder: str
    """FFmpeg's name"""
    pixels: Callable[[int, bool], str]
    """FFmpeg's pixel format, from the bits per channel and whether a side is odd"""
    options: Callable[[int], dict[str, str]] = lambda crf: {}
    """of the encoder, from the constant rate factor"""
    threads: int = 1
    """fixed, so that the same frames give the same bytes on every machine"""
    always_deep: bool = False
    """more than 8 bits whatever is asked for"""
    ending: str | None = None
    """the container of whole videos; None: mp4 or mkv, as the user likes"""
    ending_of_parts: str = "nut"
    """the container of a part of a video"""


def _chroma_halved(bits: int, odd: bool) -> str:
    return ("yuv444p" if odd else "yuv420p") + ("" if bits == 8 else "10le")


# No HEVC: the x265 of these builds writes past its buffers when a process encodes a second, larger size.
CODECS = {
    "h264": Codec(
        "libx264",
        _chroma_halved,
        # With its macroblock tree, x264 does not always turn the same frames into the same bytes.
        options=lambda crf: {"crf": str(crf), "x264-params": "mbtree=0"},
        threads=4,
    ),
    "prores": Codec(
        "prores_ks",
        lambda bits, odd: "yuv444p10le" if odd else "yuv422p10le",
        always_deep=True,
        ending="mov",
        ending_of_parts="mov",
    ),
    "ffv1": Codec("ffv1", lambda bits, odd: "bgr0" if bits == 8 else "gbrp10le", ending="mkv"),
}
"""Adding a codec is an entry here."""


@dataclasses.dataclass(frozen=True)
class Colours:
    """How a video codes its colours, named as in `decoding.Probe`."""

    matrix: int = 1
    """its number in files: 1 is BT.709"""
    primaries: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False

    @classmethod
    def of(cls, about: decoding.Probe) -> "Colours":
        """Colours to tag frames from `colour.RgbConverter` with: the source's own, or BT.709.

        BT.709 is taken where the source says nothing, and where the converter maps HDR to standard range.
        """
        if about.hdr:
            return cls(full_range=about.full_range)
        return cls(
            matrix=about.color_matrix if about.color_matrix in _MATRICES else cls.matrix,
            primaries=about.color_primaries or cls.primaries,
            transfer=about.color_transfer or cls.transfer,
            full_range=about.full_range,
        )


_MATRICES = {
    1: Colorspace.ITU709,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,  # SMPTE 170M: the same coefficients
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
"""Number in files: swscale's constant."""


@dataclasses.dataclass(frozen=True)
class VideoFormat:
    """Everything that determines a video stream except its frames."""

    fps: Fraction | int
    width: int
    height: int
    codec: str = "h264"
    """one of CODECS"""
    bits: int = 8
    """8, or 10 (ProRes always has 10)"""
    crf: int = 16
    """quality of H.264, lower is better"""
    colours: Colours = Colours()
    time_base: Fraction | None = None
    """None: one tick a frame"""

    @property
    def pixels(self) -> str:
        """FFmpeg's name of the pixel format. Odd sizes become 4:4:4, which needs no even sides."""
        return CODECS[self.codec].pixels(self.bits, bool(self.width % 2 or self.height % 2))

    def add_to(self, container: Any) -> Any:
        """Add a stream of this format, with its encoder, to an output container.

        The number of encoder threads does not depend on the machine, so the same frames give the same bytes
        everywhere.
        """
        codec, fps = CODECS[self.codec], Fraction(self.fps).limit_denominator(1_000_000)
        stream = container.add_stream(codec.encoder, rate=fps, options=codec.options(self.crf))
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, self.pixels
        context = stream.codec_context
        stream.time_base = context.time_base = self.time_base or 1 / fps
        context.thread_count = codec.threads
        context.color_primaries = _number(ColorPrimaries, self.colours.primaries)
        context.color_trc = _number(ColorTrc, self.colours.transfer)
        if self.pixels.startswith("yuv"):
            context.colorspace = self.colours.matrix
            context.color_range = ColorRange.JPEG if self.colours.full_range else ColorRange.MPEG
        return stream


class VideoWriter:
    """Writes uint8 or uint16 `(H, W, 3)` RGB frames to a video file, at exactly the given size.

    FFV1 is lossless, in RGB (name the file .mkv). The others are 4:2:0 (ProRes 4:2:2), tagged with their
    colours; odd sizes become 4:4:4 instead of being padded or cropped. Without a `pts` frames follow each
    other at `fps`.
    """

    def __init__(  # noqa: PLR0913 - what a file states about its pixels
        self,
        path: str,
        fps: Fraction | int,
        width: int,
        height: int,
        codec: str = "h264",
        bits: int = 8,
        crf: int = 16,
        colours: Colours = Colours(),
        time_base: Fraction | None = None,
    ) -> None:
        """The arguments are `VideoFormat`'s."""
        self._video = VideoFormat(fps, width, height, codec, bits, crf, colours, time_base)
        # Bit-exact: otherwise Matroska's ids are random.
        self._container = av.open(path, "w", container_options={"fflags": "bitexact"})
        self._stream = self._video.add_to(self._container)
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
        video = self._video
        if (width, height) != (video.width, video.height):
            raise ValueError(f"a frame of {width}x{height} in a video of {video.width}x{video.height}")
        given = "rgb24" if frame.dtype == np.uint8 else "rgb48le"
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=given)
        if video.pixels.startswith("yuv"):
            picture = self._reformatter.reformat(
                picture,
                format=video.pixels,
                src_color_range=ColorRange.JPEG,
                dst_colorspace=_MATRICES[video.colours.matrix],
                dst_color_range=ColorRange.JPEG if video.colours.full_range else ColorRange.MPEG,
                interpolation=colour.EXACT,
                threads=1,
            )
        else:
            picture = self._reformatter.reformat(picture, format=video.pixels, threads=1)
        picture.pts = self._next_pts if pts is None else pts
        picture.time_base = self._stream.codec_context.time_base
        self._next_pts = picture.pts + 1
        self._container.mux(self._stream.encode(picture))


def _number(enum: Any, name: str) -> int:
    """The number of a colour's name; unspecified where FFmpeg's list here lacks it."""
    return next((entry.value for entry in enum if entry.name.lower() == name), 2)


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a uint8 or uint16 picture, (H, W), (H, W, 3) RGB or (H, W, 4) RGBA."""
    order = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    stored = cv2.cvtColor(picture, order[picture.shape[2]]) if picture.ndim == 3 else picture
    done, data = cv2.imencode(".png", stored)
    assert done
    return data.tobytes()
