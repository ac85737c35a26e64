"""One file per degradation: what may be drawn of it (`*Config`), what was drawn, and how that is applied.

Imports kernels, codecs and draws, and no other operation; `config.OrderConfig` is the table of them.
"""

from degradations.operations.blur import Blur, BlurConfig
from degradations.operations.jpeg import Jpeg, JpegConfig
from degradations.operations.noise import GaussianNoise, NoiseConfig, PoissonNoise
from degradations.operations.resize import Interpolation, Resize, ResizeConfig
from degradations.operations.unsharp_mask import UnsharpMask, sharpen_truth
from degradations.operations.video_codec import CodecConfig, VideoCodec

__all__ = [
    "Blur",
    "BlurConfig",
    "CodecConfig",
    "GaussianNoise",
    "Interpolation",
    "Jpeg",
    "JpegConfig",
    "NoiseConfig",
    "PoissonNoise",
    "Resize",
    "ResizeConfig",
    "UnsharpMask",
    "VideoCodec",
    "sharpen_truth",
]
