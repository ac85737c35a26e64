"""A video codec over the whole clip."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from degradations.checks import Range, check_distribution, check_probability, check_range
from degradations.codecs import Encoder, recompress
from degradations.draws import ClipDraws
from degradations.operations.protocol import Example

ENCODERS: tuple[Encoder, ...] = get_args(Encoder)


@dataclass(frozen=True)
class VideoCodec:
    """The whole clip through an encoder at about `bits_per_pixel` (see `codecs.recompress`).

    In bits a pixel, not in bits a second: RealBasicVSR's 1e4 to 1e5 bits a frame are for 256x256.
    """

    encoder: Encoder
    bits_per_pixel: float
    fps: float

    def apply_clip(self, frames: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The clip after encoding and decoding; encoder, drawn and measured rates, encodes."""
        result = recompress(frames, self.encoder, self.bits_per_pixel, self.fps)
        height, width = result.frames[0].shape[:2]
        measured = {
            "encoder": self.encoder,
            "drawn_bits_per_pixel": self.bits_per_pixel,
            "measured_bits_per_pixel": round(result.bits_per_pixel, 5),
            "measured_bits_per_s": round(result.bits_per_pixel * height * width * self.fps),
            "encodes": result.encodes,
        }
        return result.frames, measured

    def summary(self) -> str:
        """The encoder and its drawn rate."""
        return f"{self.encoder} {self.bits_per_pixel:.2f} bpp"


@dataclass(frozen=True)
class CodecConfig:
    """Compression of the whole clip by a video codec; never applied to a single frame."""

    operations: ClassVar = (VideoCodec,)

    encoders: dict[str, float]
    """Probability of each encoder (libx264, libx265, mpeg4, libvpx-vp9, mpeg2video); the values sum to 1."""
    bits_per_pixel: Range = (1e4 / 65536, 1e5 / 65536)
    """Lowest and highest bit rate to draw, in bits per pixel; the default is RealBasicVSR's 1e4 to 1e5 bits
    for a frame of 256x256."""
    probability: float = 1.0
    """Probability that a clip is compressed by this operation; a single image never is."""

    def __post_init__(self) -> None:
        check_probability("codec.probability", self.probability)
        check_distribution("codec.encoders", self.encoders, ENCODERS)
        check_range("codec.bits_per_pixel", self.bits_per_pixel, low=1e-4, high=24)

    def draw(self, clip: ClipDraws) -> list[VideoCodec]:
        """One codec, or none; it brings all frames to the first one's size, as a stream has one size."""
        if clip.num_frames == 1 or not clip.happens(self.probability):
            return []
        rate = round(clip.random.uniform(*self.bits_per_pixel), 5)
        encoder = clip.drawn(self.encoders)
        clip.sizes = [clip.sizes[0]] * clip.num_frames
        return [VideoCodec(encoder, rate, clip.fps)]  # type: ignore[arg-type]

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """Each encoder at three rates."""
        return [
            Example(
                f"Video codec, {encoder}",
                [(f"asked {rate}", [VideoCodec(encoder, rate, fps)]) for rate in (0.6, 0.2, 0.05)],
            )
            for encoder in ENCODERS
        ]
