"""Video and image files: probing, exact decoding to RGB. Plain functions, no Ray.

Frames leave here as uint8 `(H, W, 3)` RGB as a player shows them: rotated, with square pixels, the right
colour matrix and range, and HDR mapped to standard range. Foreign files are untrusted, so stages call these
functions through `pipeline.video.sandbox`, in a child process with limits. Anything wrong with a file raises
ValueError with a message that a person understands.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.video import colour

MAX_PIXELS = 8192 * 8192
"""Larger frames are refused before they are decoded: a forged header must not fill the memory."""

# These exclude playlists and other formats that make FFmpeg open further files or URLs.
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,gif,h264,hevc,m4v,ivf,obu,nut,rm,yuv4mpegpipe"
)
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
_MAX_BAD_PACKETS = 200


@dataclasses.dataclass(frozen=True)
class Probe:
    """Facts that a file states about itself, checked by decoding its first frame."""

    media: str  # video | image
    codec: str
    pix_fmt: str
    bit_depth: int
    width: int  # as displayed: after rotation, square pixels
    height: int
    coded_size: tuple[int, int]  # (width, height) of the decoder's frames
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
    color_matrix: int = colour.UNSPECIFIED_COLORSPACE  # its number in files
    full_range: bool = False
    hdr: bool = False
    bit_rate: int = 0  # bits per second of the video stream; 0 if unknown
    has_audio: bool = False


def _reason(error: Exception) -> str:
    """One line on why FFmpeg refused, including its log."""
    log = getattr(error, "log", None)
    text = getattr(error, "strerror", None) or str(error)
    if log and "not on whitelist" in log[2]:
        return "it is neither an image nor a video in a supported format"
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
    """The file's container; FFmpeg's log is on while it opens (to explain a failure), then off."""
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            # Titles that are damaged or in another encoding are no reason to refuse the pictures.
            options = {"format_whitelist": DEMUXERS}
            return av.open("file:" + path, options=options, metadata_errors="replace")
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
    """Yield (pts, frame) in display order; a damaged packet is skipped, as players do."""
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
    """Frames per second of a video stream, 25 where the file does not say."""
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


@contextlib.contextmanager
def _open_image(path: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture upright; ValueError, with the reason, if it or what is done with it fails."""
    _check_file(path)
    Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before the pixels are decoded
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            yield ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from None


def load_image(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An upright still picture as uint8 `(H, W, 3)` RGB, of 16 bits the upper 8, transparency over black."""
    with _open_image(path, max_pixels) as image:
        if _has_alpha(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return _eight_bit_rgb(image)


def load_image_parts(path: str, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """A still picture, its transparency (uint8 `(H, W)` or None), and whether the file holds only grey.

    The colours are those stored beneath the transparency.
    """
    with _open_image(path, max_pixels) as image:
        grey = image.mode.startswith(("1", "L", "I", "F"))
        if not _has_alpha(image):
            return _eight_bit_rgb(image), None, grey
        picture = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(picture[:, :, :3]), np.ascontiguousarray(picture[:, :, 3]), grey


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _eight_bit_rgb(image: Image.Image) -> np.ndarray:
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    grey = np.asarray(image)
    depth = 65535 if grey.size and grey.max() > 255 else 255
    eight = (grey.clip(0, depth).astype(np.float64) * (255 / depth)).round().astype(np.uint8)
    return np.repeat(eight[:, :, None], 3, axis=2)


def probe(path: str, max_pixels: int = MAX_PIXELS) -> Probe:
    """What the file is, checked on its first frame. ValueError, with the reason, if it cannot be used."""
    if _is_image(path):
        return _probe_image(path, max_pixels)
    for stamp, frame, stream in decode_video(path, max_pixels=max_pixels):
        return _probe_stream(path, stamp, frame, stream)
    raise ValueError("none of its frames can be decoded")


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
        coded_size=(width, height),
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
    geometry = colour.Geometry(frame, stream.sample_aspect_ratio)
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
        coded_size=geometry.coded,
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
        color_matrix=int(frame.colorspace),
        full_range=frame.color_range == ColorRange.JPEG and not frame.format.is_rgb,
        hdr=frame.color_trc in colour.HDR_TRANSFERS,
        bit_rate=bit_rate,
        has_audio=bool(container.streams.audio),
    )


def decode_frames(  # noqa: PLR0913 - runs in the sandbox, which is sent plain values
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
        yield colour.shrink(picture, max_side) if max_side else picture
        return
    convert = colour.RgbConverter(max_side)
    given = 0
    spans = decode_video(path, start_pts, end_pts, threads=threads, max_pixels=max_pixels)
    for index, (_, frame, stream) in enumerate(spans):
        if max_frames is not None and given >= max_frames:
            return
        if index % every == 0:
            given += 1
            yield convert(frame, stream)


def read_frames(
    clip_row: dict[str, Any], path: str, first: int, count: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Frames [first, first + count) of a row of clips/ as uint8 `(count, H, W, 3)` RGB.

    path: the row's uri as a local path. Raises ValueError if the file has fewer frames.
    """
    if clip_row["media"] == "image":
        if (first, count) != (0, 1):
            raise ValueError(f"an image has one frame, not frames {first} to {first + count - 1}")
        return load_image(path, max_pixels)[None]
    convert = colour.RgbConverter()
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


def numbered_frames(
    clip_row: dict[str, Any], path: str, numbers: list[int], max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, frame) of these frames (sorted) of a row of clips/, uint8 `(H, W, 3)` RGB, one at a time.

    ValueError if the file ends before the last of them.
    """
    if clip_row["media"] == "image":
        yield 0, load_image(path, max_pixels)
        return
    convert = colour.RgbConverter()
    waiting = list(numbers)
    spans = decode_video(path, clip_row["start_pts"], clip_row["end_pts"], max_pixels=max_pixels)
    for index, (_, frame, stream) in enumerate(spans):
        if not waiting:
            return
        if index == waiting[0]:
            yield waiting.pop(0), convert(frame, stream)
    if waiting:
        raise ValueError(f"frame {waiting[0]} of the clip's {clip_row['num_frames']} does not decode")
