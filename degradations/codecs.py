"""A clip through a video codec at a wanted number of bits per pixel, and back.

The encoder and the decoder run in memory, with one thread each, and without a container: so the
bytes depend on the frames and the parameters alone, and no muxer drops frames.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

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

# What each encoder is asked for, relative to the target, so that the first encode of a short noisy
# clip comes close (measured at 21 frames, 256x256 and 1280x720, 0.3 to 1 bit a pixel).
_FIRST_REQUEST = {"libx264": 0.7, "libx265": 0.6, "libvpx-vp9": 0.8}

# A first encode within this factor of the target stays; otherwise there is one corrective encode.
_GOOD_ENOUGH = 1.25

# x265 refuses pictures below 64 pixels a side at some settings; the old codecs code 16x16 blocks anyway.
_MIN_SIDE_PX = {"libx265": 64}
_DEFAULT_MIN_SIDE_PX = 16

_MPEG2_RATES = [Fraction(rate) for rate in (24, 25, 30, 50, 60)]
_MPEG2_RATES += [Fraction(rate, 1001) for rate in (24000, 30000, 60000)]


@dataclass(frozen=True)
class Recompressed:
    """A clip after its codec."""

    frames: list[np.ndarray]
    """As many frames as went in, (H, W, 3) uint8 each, all of the first one's size."""
    bits_per_pixel: float
    """What the encoder spent, over all frames and true pixels."""
    encodes: int
    """1, or 2 if the first one missed the target."""


def recompress(frames: list[np.ndarray], encoder: Encoder, bits_per_pixel: float, fps: float) -> Recompressed:
    """Encode and decode `frames` ((H, W, 3) uint8 RGB) in 4:2:0 at about `bits_per_pixel`.

    Frames of another size than the first are brought to its size, as a player does. Odd sizes are
    padded for the encoder and cropped again. Where the decoder gives fewer frames than went in,
    the one before is shown longer. Short clips at low rates overshoot: an encoder's first frame
    costs what it costs.
    """
    if not bits_per_pixel > 0 or not fps > 0:
        raise ValueError(f"bits_per_pixel, fps: {bits_per_pixel}, {fps}: both must be above 0")
    _require(encoder)
    height, width = frames[0].shape[:2]
    pictures = _pictures(frames, encoder)
    pixels = len(frames) * height * width

    def encode(target: float, quantiser: float | None) -> tuple[list[av.Packet], float]:
        bits_per_frame = target * height * width
        packets = _encode(pictures, encoder, bits_per_frame, fps, quantiser)
        return packets, 8 * sum(packet.size for packet in packets) / pixels

    old = encoder in ("mpeg4", "mpeg2video")
    quantiser = _first_quantiser(bits_per_pixel) if old else None
    request = bits_per_pixel * _FIRST_REQUEST.get(encoder, 1.0)
    packets, spent = encode(request, quantiser)
    encodes = 1
    ratio = spent / bits_per_pixel
    if not 1 / _GOOD_ENOUGH <= ratio <= _GOOD_ENOUGH:
        if quantiser is not None:
            quantiser = _corrected_quantiser(quantiser, ratio)
        packets, spent = encode(request / ratio, quantiser)
        encodes = 2
    return Recompressed(_decode(packets, encoder, len(frames), height, width), spent, encodes)


def _require(encoder: Encoder) -> None:
    """A clear error where this FFmpeg lacks a codec: leaving it out of the draw would make a row
    depend on the machine it was made on."""
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

    Their own rate control needs seconds to settle (3.7x too much at 21 frames of 256x256), hence
    a nearly fixed quantiser. Measured: 2 bits at 3.5, 0.9 at 6, 0.42 at 8, 0.1 at 12.
    """
    return float(np.clip(2.0 * (4.0 / bits_per_pixel) ** (1 / 1.8), 2.0, 31.0))


def _corrected_quantiser(quantiser: float, ratio: float) -> float:
    """The quantiser after one that spent `ratio` times the target.

    Rates fall with its square on noisy content, but faster (up to the 3.4th power) where it comes down
    to the noise's own strength: hence smaller steps down.
    """
    return float(np.clip(quantiser * ratio ** (1 / 2 if ratio > 1 else 1 / 3), 2.0, 31.0))


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
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p")
        picture.pts = index
        pictures.append(picture)
    return pictures


def _frame_rate(encoder: str, fps: float) -> Fraction:
    """A rate that the encoder takes: MPEG-2 knows eight, MPEG-4 counts in 16 bits."""
    if encoder == "mpeg2video":
        return min(_MPEG2_RATES, key=lambda rate: abs(float(rate) - fps))
    rate = Fraction(fps).limit_denominator(1001)
    return rate if 0 < rate.numerator < 65536 else Fraction(max(1, round(fps)))


def _encode(
    pictures: list[av.VideoFrame], encoder: str, bits_per_frame: float, fps: float, quantiser: float | None
) -> list[av.Packet]:
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, VideoCodecContext)
    rate = _frame_rate(encoder, fps)
    context.width, context.height = pictures[0].width, pictures[0].height
    context.pix_fmt = "yuv420p"
    context.framerate, context.time_base = rate, 1 / rate
    context.bit_rate = max(1000, round(bits_per_frame * float(rate)))
    context.thread_count = 1
    options = dict(_OPTIONS[encoder])
    if quantiser is not None:
        options |= {"qmin": str(int(quantiser)), "qmax": str(min(31, int(np.ceil(quantiser))))}
    context.options = options
    packets: list[av.Packet] = []
    for picture in pictures:
        picture.time_base = context.time_base
        packets += context.encode(picture)
    packets += context.encode(None)
    return packets


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
        raise RuntimeError(f"{encoder}: the decoder gave no frame for {count}")
    frames = []
    last = shown[min(shown)]
    for index in range(count):
        last = shown.get(index, last)
        frames.append(last)
    return frames
