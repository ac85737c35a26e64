"""Passing a clip through a video codec at a target number of bits per pixel, and back.

Encoder and decoder run in memory, with one thread each and without a container, so that the bytes depend only
on the frames and the parameters, and no muxer drops frames.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import av
import av.error
import cv2
import numpy as np
from av.video.codeccontext import VideoCodecContext

Encoder = Literal["libx264", "libx265", "mpeg4", "libvpx-vp9", "mpeg2video"]

_DECODERS = {
    "libx264": "h264",
    "libx265": "hevc",
    "mpeg4": "mpeg4",
    "libvpx-vp9": "vp9",
    "mpeg2video": "mpeg2video",
}

# Fast presets: 21 frames of 720x720 at 0.3 bits a pixel take libx264 0.24 s instead of the default's
# 1.1 s on one core. A fast encoder's artefacts are stronger at the same rate, as from a phone's or a
# live stream's encoder.
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "superfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "pools=none:frame-threads=1:log-level=none"},
    "mpeg4": {},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"},
    "mpeg2video": {},
}

# Rate requested of each encoder, relative to the target, with which the first encode of a short noisy
# clip comes close (measured at 21 frames, 256x256 and 1280x720, 0.3 to 1 bit a pixel).
_FIRST_REQUEST = {"libx264": 0.7, "libx265": 0.6, "libvpx-vp9": 0.8}

# Range of quantisers of MPEG-2 and MPEG-4.
_QUANTISERS = (2.0, 31.0)

# A first encode within this factor of the target is kept; otherwise there is one corrective encode.
_GOOD_ENOUGH = 1.25

# x265 refuses pictures below 64 pixels a side at some settings; the old codecs code 16x16 blocks anyway.
_MIN_SIDE_PX = {"libx265": 64}
_DEFAULT_MIN_SIDE_PX = 16

_MPEG2_RATES = [Fraction(rate) for rate in (24, 25, 30, 50, 60)]
_MPEG2_RATES += [Fraction(rate, 1001) for rate in (24000, 30000, 60000)]


@dataclass(frozen=True)
class Recompressed:
    """A clip after it passed through a codec."""

    frames: list[np.ndarray]
    """As many frames as went in, (H, W, 3) uint8 each, all of the first one's size."""
    bits_per_pixel: float
    """Bits that the encoder spent, over all frames and true pixels."""
    encodes: int
    """1, or 2 if the first one missed the target."""


def recompress(frames: list[np.ndarray], encoder: Encoder, bits_per_pixel: float, fps: float) -> Recompressed:
    """Encode and decode `frames` ((H, W, 3) uint8 RGB) in 4:2:0 at about `bits_per_pixel`.

    Frames of another size than the first are resized to it, as a player does. Odd sizes are padded for the
    encoder and cropped again. Where the decoder returns fewer frames than went in, the frame before is
    repeated. Short clips overshoot low rates, since an encoder's first frame has a minimum cost. Raises
    ValueError if this FFmpeg lacks the codec or fails.
    """
    if not bits_per_pixel > 0 or not fps > 0:
        raise ValueError(f"bits_per_pixel, fps: {bits_per_pixel}, {fps}: both must be above 0")
    _require(encoder)
    try:
        return _recompress(frames, encoder, bits_per_pixel, fps)
    except av.error.FFmpegError as error:
        height, width = frames[0].shape[:2]
        raise ValueError(
            f"{encoder}: FFmpeg failed at {len(frames)} frames of {width}x{height}: {error}"
        ) from error


def _recompress(
    frames: list[np.ndarray], encoder: Encoder, bits_per_pixel: float, fps: float
) -> Recompressed:
    height, width = frames[0].shape[:2]
    pictures = _pictures(frames, encoder)
    context = partial(_open, encoder, pictures[0], fps)
    bits_per_frame = bits_per_pixel * height * width
    old = encoder in ("mpeg4", "mpeg2video")
    quantiser = _first_quantiser(bits_per_pixel)
    request = bits_per_frame * _FIRST_REQUEST.get(encoder, 1.0)

    packets: list[av.Packet] = []
    ratio = 1.0
    for encodes in (1, 2):
        if old:
            packets, used = _encode_by_quantiser(context(request), pictures, bits_per_frame, quantiser)
            quantiser = float(np.mean(used))
        else:
            packets = _encode(context(request), pictures)
        ratio = 8 * sum(packet.size for packet in packets) / (bits_per_frame * len(frames))
        if encodes == 2 or 1 / _GOOD_ENOUGH <= ratio <= _GOOD_ENOUGH:
            break
        request /= ratio
        quantiser = _corrected_quantiser(quantiser, ratio)
    decoded = _decode(packets, encoder, len(frames), height, width)
    return Recompressed(decoded, ratio * bits_per_pixel, encodes)


def _require(encoder: Encoder) -> None:
    """Raise a clear error if this FFmpeg lacks a codec.

    Leaving the codec out of the draw instead would make a row depend on the machine that made it.
    """
    if encoder not in _DECODERS:
        raise ValueError(f"encoder: {encoder!r} is none of {', '.join(_DECODERS)}")
    for name, mode in ((encoder, "w"), (_DECODERS[encoder], "r")):
        try:
            av.codec.Codec(name, mode)  # type: ignore[arg-type]
        except (ValueError, av.error.FFmpegError) as error:
            raise ValueError(
                f"encoder: this FFmpeg has no {name!r}; give it probability 0 in the recipe's codecs, or "
                "install PyAV's own wheel, which has it"
            ) from error


def _first_quantiser(bits_per_pixel: float) -> float:
    """Quantiser of MPEG-2 and MPEG-4 that spends about `bits_per_pixel` on noisy content.

    Measured: 2 bits at 3.5, 0.9 at 6, 0.42 at 8, 0.1 at 12.
    """
    return float(np.clip(2.0 * (4.0 / bits_per_pixel) ** (1 / 1.8), *_QUANTISERS))


def _corrected_quantiser(quantiser: float, ratio: float) -> float:
    """The quantiser after one that spent `ratio` times what is wanted.

    Rates fall with its 1.2th power on strong noise to its 4.3th where it comes down to the noise's own
    strength; the third power brings both closer with each step.
    """
    return float(np.clip(quantiser * max(ratio, 1e-3) ** (1 / 3), *_QUANTISERS))


def _pictures(frames: list[np.ndarray], encoder: str) -> list[av.VideoFrame]:
    """The frames as 4:2:0 pictures of one even size."""
    height, width = frames[0].shape[:2]
    least = _MIN_SIDE_PX.get(encoder, _DEFAULT_MIN_SIDE_PX)
    bottom = max(least, height + height % 2) - height
    right = max(least, width + width % 2) - width
    pictures = []
    for index, frame in enumerate(frames):
        if frame.shape[:2] != (height, width):
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
        if bottom or right:
            frame = cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        # BT.601 in limited range, as FFmpeg's own conversion, which takes 4 times as long
        planes: Any = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)
        picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        picture.pts = index
        pictures.append(picture)
    return pictures


def _frame_rate(encoder: str, fps: float) -> Fraction:
    """A rate that the encoder takes: MPEG-2 knows eight, MPEG-4 counts in 16 bits."""
    if encoder == "mpeg2video":
        return min(_MPEG2_RATES, key=lambda rate: abs(float(rate) - fps))
    rate = Fraction(fps).limit_denominator(1001)
    return rate if 0 < rate.numerator < 65536 else Fraction(max(1, round(fps)))


def _open(encoder: str, picture: av.VideoFrame, fps: float, bits_per_frame: float) -> VideoCodecContext:
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, VideoCodecContext)
    rate = _frame_rate(encoder, fps)
    context.width, context.height = picture.width, picture.height
    context.pix_fmt = "yuv420p"
    context.framerate, context.time_base = rate, 1 / rate
    context.bit_rate = max(1000, round(bits_per_frame * float(rate)))
    context.thread_count = 1
    context.options = dict(_OPTIONS[encoder])
    return context


def _encode(context: VideoCodecContext, pictures: list[av.VideoFrame]) -> list[av.Packet]:
    packets: list[av.Packet] = []
    for picture in pictures:
        picture.time_base = context.time_base
        packets += context.encode(picture)
    return packets + context.encode(None)


def _encode_by_quantiser(
    context: VideoCodecContext, pictures: list[av.VideoFrame], bits_per_frame: float, quantiser: float
) -> tuple[list[av.Packet], list[int]]:
    """MPEG-2 and MPEG-4 with the quantiser of each frame set here, from what those before it cost.

    Their own rate control needs seconds to settle: 3.7 times too much at 21 frames of 256x256.
    Returns the packets and the quantisers.
    """
    packets: list[av.Packet] = []
    used: list[int] = []
    for picture in pictures:
        if packets:
            left = bits_per_frame * len(pictures) - 8 * sum(packet.size for packet in packets)
            wanted = left / (len(pictures) - len(packets))
            wanted = float(np.clip(wanted, bits_per_frame / 4, bits_per_frame * 4))
            # the last packet was coded at the last quantiser, though MPEG-2 is one picture behind
            quantiser = _corrected_quantiser(used[-1], 8 * packets[-1].size / wanted)
        used.append(round(quantiser))
        context.qmin = context.qmax = used[-1]
        picture.time_base = context.time_base
        packets += context.encode(picture)
    return packets + context.encode(None), used


def _decode(packets: list[av.Packet], encoder: str, count: int, height: int, width: int) -> list[np.ndarray]:
    """Exactly `count` frames (height, width, 3), placed by their time stamps."""
    context = av.CodecContext.create(_DECODERS[encoder], "r")
    assert isinstance(context, VideoCodecContext)
    context.thread_count = 1
    shown: dict[int, np.ndarray] = {}
    for packet in [*packets, None]:
        for picture in context.decode(packet):
            index = picture.pts if picture.pts is not None else len(shown)
            pixels = picture.to_ndarray(format="rgb24")
            shown[index] = np.ascontiguousarray(pixels[:height, :width])
    if not shown:
        raise ValueError(f"{encoder}: the decoder gave no frame for {count}")
    frames = []
    last = shown[min(shown)]
    for index in range(count):
        last = shown.get(index, last)
        frames.append(last)
    return frames
