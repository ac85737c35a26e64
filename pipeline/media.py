"""Video and image files: probing, exact decoding to RGB. Plain functions, no Ray.

Frames leave here as uint8 `(H, W, 3)` RGB as a player shows them: rotation applied, pixels square, colour
matrix and range honoured, HDR mapped to standard range. Foreign files are hostile: stages call these
functions through `pipeline.sandbox`, in a child process with limits. Every mistake of a file is a
ValueError that a person understands.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 8192 * 8192
"""Larger frames are refused before they are decoded: a forged header must not fill the memory."""

# Playlists and other formats that make FFmpeg open further files or URLs are not among these.
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,gif,h264,hevc,m4v,ivf,obu,nut,rm,yuv4mpegpipe"
)
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
# Without ACCURATE_RND swscale takes a shortcut that repeats chroma: 8x faster, up to 30 of 255 off.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
_HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
_UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED
_HD_HEIGHT = 720  # files that name no colour matrix: players take BT.709 from here on, BT.601 below
_MAX_BAD_PACKETS = 200


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a file says of itself, checked by decoding its first frame."""

    media: str  # video | image
    codec: str
    pix_fmt: str
    bit_depth: int
    width: int  # as displayed: after rotation, square pixels
    height: int
    rotation: int  # degrees clockwise, already applied to width and height
    sample_aspect: str = "1/1"
    time_base: Fraction = Fraction(1)
    start_pts: int = 0  # of the first frame
    duration_s: float | None = None
    num_frames: int = 0  # as the container says; 0 if it does not
    fps: Fraction = Fraction(0)  # 0 for images
    interlaced: bool = False
    color_primaries: str = ""
    color_transfer: str = ""
    bit_rate: int = 0  # bits per second of the video stream; 0 if unknown
    has_audio: bool = False


class _Geometry:
    """How a decoded frame becomes a displayed one: turned by quarter turns and with square pixels."""

    def __init__(self, frame: VideoFrame, sample_aspect: Fraction | None) -> None:
        self.coded = (frame.width, frame.height)
        self.quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise
        aspect = sample_aspect or Fraction(1)
        self.sample_aspect = aspect if Fraction(1, 10) <= aspect <= 10 else Fraction(1)
        width, height = self.coded
        # The side that grows is the one to change: no pixel is thrown away.
        if self.sample_aspect > 1:
            width = round(width * self.sample_aspect)
        elif self.sample_aspect < 1:
            height = round(height / self.sample_aspect)
        self.upright = (width, height)
        self.displayed = (height, width) if self.quarter_turns % 2 else (width, height)


def _reason(error: Exception) -> str:
    """One line on why FFmpeg refused, with what its log adds."""
    log = getattr(error, "log", None)
    text = getattr(error, "strerror", None) or str(error)
    detail = f" ({log[2].strip()})" if log else ""
    return f"FFmpeg cannot read it: {text}{detail}"


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty (0 bytes)")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ValueError(f"the header says {width}x{height} pixels")
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {max_pixels} pixels a frame")


def _open_quietly(path: str) -> Any:
    """The file's container; FFmpeg's log is heard while it opens (for the reason of a failure), then off."""
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            return av.open("file:" + path, options={"format_whitelist": DEMUXERS})
    finally:
        av.logging.set_level(av.logging.PANIC)


@contextlib.contextmanager
def _open_video(path: str, threads: int, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """(container, first video stream), the size checked before any frame is decoded."""
    _check_file(path)
    try:
        with _open_quietly(path) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                what = "only audio" if container.streams.audio else "no pictures"
                raise ValueError(f"there is no video stream in it, {what}")
            stream = streams[0]
            context = stream.codec_context
            if context is None:
                raise ValueError("its video codec is unknown to this FFmpeg")
            _check_pixels(context.width, context.height, max_pixels)
            context.thread_count = threads
            context.thread_type = "AUTO" if threads > 1 else "NONE"
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(_reason(error)) from None


def _decode(container: Any, stream: Any) -> Iterator[tuple[int, VideoFrame]]:
    """(pts, frame) in display order; a damaged packet is passed over, as players do."""
    step = frame_step(stream)
    last: int | None = None
    bad = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            bad += 1
            if bad > _MAX_BAD_PACKETS:
                raise
            continue
        for frame in frames:
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None or (last is not None and stamp <= last):
                stamp = 0 if last is None else last + step
            last = stamp
            yield stamp, frame


def frame_step(stream: Any) -> int:
    """One frame's duration in ticks of the stream's time base, at least 1."""
    return max(1, round(1 / (stream_fps(stream) * stream.time_base)))


def stream_fps(stream: Any) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and 0 < rate <= 1000:
            return Fraction(rate)
    return Fraction(25)


def decode_video(
    path: str,
    start_pts: int | None = None,
    end_pts: int | None = None,
    *,
    threads: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[int, VideoFrame, Any]]:
    """(pts, undisplayed frame, stream) of every frame with start_pts <= pts < end_pts, in display order.

    Starts at the keyframe before start_pts. Where that leads past start_pts (open groups of pictures,
    coarse indexes), it seeks further back, in the end to the file's start.
    """
    for margin_s in (0, 2, 10, None) if start_pts is not None else (None,):
        with _open_video(path, threads, max_pixels) as (container, stream):
            if start_pts is not None and margin_s is not None:
                with contextlib.suppress(av.FFmpegError):
                    target = start_pts - round(margin_s / stream.time_base)
                    container.seek(target, stream=stream, backward=True)
            reached = margin_s is None  # from the file's start nothing can be missed
            for stamp, frame in _decode(container, stream):
                if not reached and (frame.pts is None or stamp > (start_pts or 0)):
                    break
                reached = True
                if end_pts is not None and stamp >= end_pts:
                    return
                if start_pts is None or stamp >= start_pts:
                    _check_pixels(frame.width, frame.height, max_pixels)
                    yield stamp, frame, stream
            if reached:
                return


class RgbConverter:
    """Decoded frames of one stream to displayed RGB; keeps swscale's context between frames."""

    def __init__(self, max_side: int | None = None) -> None:
        self._reformatter = VideoReformatter()
        self._max_side = max_side

    def __call__(self, frame: VideoFrame, stream: Any) -> np.ndarray:
        """uint8 `(H, W, 3)`; with max_side, shrunk (quickly, not finely) so that no side is longer."""
        geometry = _Geometry(frame, stream.sample_aspect_ratio)
        width, height = geometry.upright
        interpolation = EXACT
        if self._max_side and max(width, height) > self._max_side:
            scale = self._max_side / max(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            interpolation = Interpolation.AREA
        colours: dict[str, Any] = {}
        if frame.colorspace == _UNSPECIFIED_COLORSPACE:
            hd = frame.height >= _HD_HEIGHT or frame.width >= 1280
            colours["src_colorspace"] = Colorspace.ITU709 if hd else Colorspace.ITU601
        if frame.color_trc in _HDR_TRANSFERS:
            colours |= {"dst_color_trc": ColorTrc.IEC61966_2_1, "dst_color_primaries": ColorPrimaries.BT709}
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="gbrp",  # planar, then interleaved: twice as fast as straight to rgb24, the same values
            dst_color_range=ColorRange.JPEG,
            interpolation=interpolation,
            threads=1,
            **colours,
        ).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, geometry.quarter_turns)) if geometry.quarter_turns else rgb


class LumaConverter:
    """Decoded frames of one stream to full-range luma as coded (not turned or made square): to measure."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._rgb = RgbConverter()

    def __call__(self, frame: VideoFrame, stream: Any, max_side: int | None = None) -> np.ndarray:
        """uint8 `(H, W)`; with max_side, shrunk so that no side is longer."""
        if frame.color_trc in _HDR_TRANSFERS or frame.format.is_rgb:
            grey = cv2.cvtColor(self._rgb(frame, stream), cv2.COLOR_RGB2GRAY)
            return shrink(grey, max_side) if max_side else grey
        scale = min(1.0, (max_side or frame.width) / max(frame.width, frame.height)) if max_side else 1.0
        return self._reformatter.reformat(
            frame,
            width=max(1, round(frame.width * scale)),
            height=max(1, round(frame.height * scale)),
            format="gray",
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA,
            threads=1,
        ).to_ndarray()


def _is_image(path: str) -> bool:
    """Whether Pillow knows the content as a still picture (the name's ending does not count)."""
    _check_file(path)
    try:
        with Image.open(path, formats=_IMAGE_FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception as error:
        raise ValueError(f"the image's header is damaged: {error}") from None


def load_image(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A still picture as uint8 `(H, W, 3)` RGB: EXIF orientation applied, grey spread to three channels,
    16 bits cut to 8, transparency laid over black."""
    _check_file(path)
    Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before the pixels are decoded
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                grey = np.asarray(upright)
                depth = 65535 if grey.size and grey.max() > 255 else 255
                eight = (grey.clip(0, depth).astype(np.float64) * (255 / depth)).round().astype(np.uint8)
                return np.repeat(eight[:, :, None], 3, axis=2)
            if "A" in upright.getbands() or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                black = Image.new("RGBA", upright.size, (0, 0, 0, 255))
                upright = Image.alpha_composite(black, upright)
            return np.array(upright.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from None


def probe(path: str, max_pixels: int = MAX_PIXELS) -> Probe:
    """What the file is, checked on its first frame. ValueError, with the reason, if it cannot be used."""
    if _is_image(path):
        return _probe_image(path, max_pixels)
    for stamp, frame, stream in decode_video(path, max_pixels=max_pixels):
        return _probe_stream(path, stamp, frame, stream)
    raise ValueError("no frame of it can be decoded")


def _probe_image(path: str, max_pixels: int) -> Probe:
    height, width, _ = load_image(path, max_pixels).shape
    with Image.open(path, formats=_IMAGE_FORMATS) as image:
        codec, mode = (image.format or "image").lower(), image.mode
        orientation = image.getexif().get(0x0112, 1)
    return Probe(
        media="image",
        codec=codec,
        pix_fmt=mode,
        bit_depth=16 if mode.startswith("I") else 8,
        width=width,
        height=height,
        rotation={3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}.get(orientation, 0),
        num_frames=1,
    )


def _enum_name(enum: Any, value: int) -> str:
    try:
        name = enum(value).name.lower()
    except ValueError:
        return str(value)
    return "" if name == "unspecified" else name


def _probe_stream(path: str, stamp: int, frame: VideoFrame, stream: Any) -> Probe:
    geometry = _Geometry(frame, stream.sample_aspect_ratio)
    container = stream.container
    context = stream.codec_context
    duration_s = float(stream.duration * stream.time_base) if stream.duration else None
    if duration_s is None and container.duration:
        duration_s = container.duration / av.time_base
    bit_rate = context.bit_rate or 0
    if not bit_rate and duration_s:
        bit_rate = int(os.path.getsize(path) * 8 / duration_s)  # audio and headers included
    return Probe(
        media="video",
        codec=context.name,
        pix_fmt=frame.format.name,
        bit_depth=max((component.bits for component in frame.format.components), default=8),
        width=geometry.displayed[0],
        height=geometry.displayed[1],
        rotation=-geometry.quarter_turns * 90 % 360,
        sample_aspect=f"{geometry.sample_aspect.numerator}/{geometry.sample_aspect.denominator}",
        time_base=Fraction(stream.time_base),
        start_pts=stamp,
        duration_s=duration_s,
        num_frames=stream.frames or 0,
        fps=stream_fps(stream),
        interlaced=frame.interlaced_frame,
        color_primaries=_enum_name(ColorPrimaries, frame.color_primaries),
        color_transfer=_enum_name(ColorTrc, frame.color_trc),
        bit_rate=bit_rate,
        has_audio=bool(container.streams.audio),
    )


def decode_frames(
    path: str,
    start_pts: int | None = None,
    end_pts: int | None = None,
    max_frames: int | None = None,
    every: int = 1,
    threads: int = 1,
    max_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[np.ndarray]:
    """Displayed frames, uint8 `(H, W, 3)` RGB, of a video's span or of an image (one frame).

    Only every n-th frame is converted and given; max_frames counts those given. With more than one
    thread the decoder's output is the same. max_side shrinks quickly, for measuring rather than for looking.
    """
    if _is_image(path):
        picture = load_image(path, max_pixels)
        yield shrink(picture, max_side) if max_side else picture
        return
    convert = RgbConverter(max_side)
    given = 0
    spans = decode_video(path, start_pts, end_pts, threads=threads, max_pixels=max_pixels)
    for index, (_, frame, stream) in enumerate(spans):
        if max_frames is not None and given >= max_frames:
            return
        if index % every == 0:
            given += 1
            yield convert(frame, stream)


def shrink(picture: np.ndarray, max_side: int) -> np.ndarray:
    """The picture, made smaller by area averaging so that no side is longer than max_side."""
    height, width = picture.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def read_frames(
    clip_row: dict[str, Any], path: str, first: int, count: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Frames [first, first + count) of a row of clips/ as uint8 `(count, H, W, 3)` RGB; ValueError if the
    file gives fewer. path is the row's uri as a local path."""
    if clip_row["media"] == "image":
        if (first, count) != (0, 1):
            raise ValueError(f"an image has one frame, not frames {first} to {first + count - 1}")
        return load_image(path, max_pixels)[None]
    convert = RgbConverter()
    frames: list[np.ndarray] = []
    spans = decode_video(path, clip_row["start_pts"], clip_row["end_pts"], max_pixels=max_pixels)
    for index, (_, frame, stream) in enumerate(spans):
        if index >= first:
            frames.append(convert(frame, stream))
        if len(frames) == count:
            break
    if len(frames) < count:
        raise ValueError(f"of frames {first} to {first + count - 1} only {len(frames)} decode")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError("the frame size changes within the clip")
    return np.stack(frames)
