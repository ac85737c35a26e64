"""What a recipe may draw: typed settings, and the three recipes themselves.

Sources: Real-ESRGAN's `options/train_realesrgan_x4plus.yml`; RealBasicVSR as configured in MMagic,
`configs/real_basicvsr`. `configs/recipes/*.yaml` hold the same three for a job's config.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from degradations.codecs import Encoder
from degradations.kernels import KernelKind

Range = tuple[float, float]
TimeMode = Literal["walk", "constant", "independent"]

PI = 3.1416
"""RealBasicVSR's pi."""


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value} is no probability (0 to 1)")


def _distribution(name: str, weights: dict[str, float], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(weights) - set(allowed))
    if unknown:
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; known: {', '.join(allowed)}")
    if min(weights.values(), default=-1.0) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"{name}: probabilities must be 0 or more and sum to 1, not {weights}")


def _range(name: str, values: Range, low: float, high: float) -> None:
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ValueError(f"{name}: {list(values)} must be two rising numbers from {low:g} to {high:g}")


def _step(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {value} must be 0 or more")


KERNEL_KINDS: tuple[str, ...] = get_args(KernelKind)
ENCODERS: tuple[str, ...] = get_args(Encoder)


def _kernels() -> dict[str, float]:
    """The six families at .45, .25, .12, .03, .12, .03 of the nine tenths that sinc leaves."""
    shares = (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)
    return dict(zip(KERNEL_KINDS, shares, strict=True))


def _interpolations() -> dict[str, float]:
    return {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}


@dataclass(frozen=True)
class BlurConfig:
    """Blur with a kernel of a drawn family."""

    sigma_px: Range
    """Range of the two standard deviations, in pixels of the frame as it is at that point"""
    probability: float = 1.0
    """How often a clip is blurred here"""
    kernels: dict[str, float] = field(default_factory=_kernels)
    """Probability of each family"""
    sizes_px: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Sides of the kernel, each as probable"""
    beta_generalized: Range = (0.5, 4.0)
    """Shape of the generalized Gaussians"""
    beta_plateau: Range = (1.0, 2.0)
    """Shape of the plateaus"""
    omega_rad: Range | None = None
    """Cut-off of the sinc; null is [pi/3, pi] below size 13 and [pi/5, pi] from there"""
    sigma_step_px: float = 0.02
    """Largest change a frame of either sigma, when walking; likewise below"""
    rotation_step_rad: float = 0.31416
    beta_generalized_step: float = 0.05
    beta_plateau_step: float = 0.1
    omega_step_rad: float = 0.0628

    def __post_init__(self) -> None:
        _probability("blur.probability", self.probability)
        _range("blur.sigma_px", self.sigma_px, low=1e-3, high=1000)
        _distribution("blur.kernels", self.kernels, KERNEL_KINDS)
        if not self.sizes_px or any(size < 3 or size % 2 == 0 for size in self.sizes_px):
            raise ValueError(f"blur.sizes_px: {list(self.sizes_px)}: kernels have an odd side of 3 or more")
        _range("blur.beta_generalized", self.beta_generalized, low=1e-3, high=100)
        _range("blur.beta_plateau", self.beta_plateau, low=1e-3, high=100)
        if self.omega_rad is not None:
            _range("blur.omega_rad", self.omega_rad, low=1e-3, high=2 * math.pi)
        for item in fields(self):
            if "_step" in item.name:
                _step(f"blur.{item.name}", getattr(self, item.name))


@dataclass(frozen=True)
class ResizeConfig:
    """Resize by a drawn factor."""

    factor: Range
    """Smallest and largest factor; up draws from [1, largest], down from [smallest, 1]"""
    up: float
    """Probability of growing"""
    down: float
    """Probability of shrinking; what is left keeps the size"""
    step: float
    """Largest change of the factor a frame, when walking"""
    even: bool = True
    """Round both sides down to even numbers"""
    of_quarter: bool = False
    """The factor is of the size at the end (HQ / shrink, Real-ESRGAN), not of the present size"""
    interpolations: dict[str, float] = field(default_factory=_interpolations)
    """Probability of each interpolation"""

    def __post_init__(self) -> None:
        _range("resize.factor", self.factor, low=1e-3, high=16)
        _step("resize.step", self.step)
        _probability("resize.up", self.up)
        _probability("resize.down", self.down)
        _probability("resize.up + resize.down", self.up + self.down)
        _distribution("resize.interpolations", self.interpolations, tuple(_interpolations()))


@dataclass(frozen=True)
class NoiseConfig:
    """Gaussian or Poisson noise."""

    gaussian_sigma: Range
    """Of 255"""
    poisson_scale: Range
    probability: float = 1.0
    """How often a clip gets noise here"""
    gaussian: float = 0.5
    """Probability of Gaussian noise; the rest is Poisson"""
    grey: float = 0.4
    """Probability that the three channels share the noise"""
    gaussian_sigma_step: float = 0.1
    poisson_scale_step: float = 0.005

    def __post_init__(self) -> None:
        _probability("noise.probability", self.probability)
        _probability("noise.gaussian", self.gaussian)
        _probability("noise.grey", self.grey)
        _range("noise.gaussian_sigma", self.gaussian_sigma, low=0, high=255)
        _range("noise.poisson_scale", self.poisson_scale, low=0, high=255)
        _step("noise.gaussian_sigma_step", self.gaussian_sigma_step)
        _step("noise.poisson_scale_step", self.poisson_scale_step)


@dataclass(frozen=True)
class JpegConfig:
    """JPEG, frame by frame."""

    quality: tuple[int, int]
    probability: float = 1.0
    """How often a clip is compressed here"""
    quality_step: float = 3.0

    def __post_init__(self) -> None:
        _probability("jpeg.probability", self.probability)
        _range("jpeg.quality", self.quality, low=1, high=100)
        _step("jpeg.quality_step", self.quality_step)


@dataclass(frozen=True)
class CodecConfig:
    """A video codec over the whole clip. Never drawn for a single frame."""

    encoders: dict[str, float]
    """Probability of each of libx264, libx265, mpeg4, libvpx-vp9, mpeg2video"""
    bits_per_pixel: Range = (1e4 / 65536, 1e5 / 65536)
    """RealBasicVSR's 1e4 to 1e5 bits a frame of 256x256"""
    probability: float = 1.0
    """How often a clip is compressed here"""

    def __post_init__(self) -> None:
        _probability("codec.probability", self.probability)
        _distribution("codec.encoders", self.encoders, ENCODERS)
        _range("codec.bits_per_pixel", self.bits_per_pixel, low=1e-4, high=24)


@dataclass(frozen=True)
class OrderConfig:
    """One pass of blur, resize, noise, JPEG, codec, in this order. A null operation never happens."""

    blur: BlurConfig | None
    resize: ResizeConfig | None
    noise: NoiseConfig | None
    jpeg: JpegConfig | None
    codec: CodecConfig | None


@dataclass(frozen=True)
class EndConfig:
    """The end: {resize to HQ / shrink, then a sinc filter} and {JPEG or codec} in random order."""

    shrink: int
    """LQ is made this many times smaller than HQ (and brought back to HQ's size as the very last step)"""
    sinc: BlurConfig
    jpeg: JpegConfig | None
    codec: CodecConfig | None

    def __post_init__(self) -> None:
        if self.shrink < 1:
            raise ValueError(f"end.shrink: {self.shrink} must be 1 or more")
        if self.jpeg is not None and self.codec is not None:
            raise ValueError("end: either jpeg or codec takes part in the random order; set one to null")


@dataclass(frozen=True)
class RecipeConfig:
    """A recipe: what may be drawn for a clip."""

    first: OrderConfig
    """First order"""
    second: OrderConfig | None
    """Second order; null for none"""
    end: EndConfig | None
    """The end; null for none"""
    sharpen_truth: bool
    """Sharpen the truth by an unsharp mask: LQ is made from the sharpened HQ, which is the target too"""
    time: TimeMode = "walk"
    """How values move from frame to frame: a random walk within bounds (RealBasicVSR), not at all, or each
    frame afresh, kinds included (STAR). Which operations happen, their order and the codec stay the clip's"""

    def __post_init__(self) -> None:
        if self.time not in get_args(TimeMode):
            raise ValueError(f"time: {self.time!r} is none of {', '.join(get_args(TimeMode))}")


def _sinc(step_rad: float = 0.0628) -> BlurConfig:
    return BlurConfig(
        sigma_px=(1.0, 1.0),
        probability=0.8,
        kernels={"sinc": 1.0},
        omega_rad=(PI / 3, PI),
        omega_step_rad=step_rad,
    )


def _peers_codecs() -> CodecConfig:
    """libx264, h264 and mpeg4 at 1/3 each; the first two are one encoder in a stock FFmpeg."""
    return CodecConfig({"libx264": 2 / 3, "mpeg4": 1 / 3})


REALBASICVSR = RecipeConfig(
    first=OrderConfig(
        blur=BlurConfig((0.2, 3.0)),
        resize=ResizeConfig((0.15, 1.5), up=0.2, down=0.7, step=0.015),
        noise=NoiseConfig((1.0, 30.0), (0.05, 3.0)),
        jpeg=JpegConfig((30, 95)),
        codec=_peers_codecs(),
    ),
    second=OrderConfig(
        blur=BlurConfig((0.2, 1.5), probability=0.8),
        resize=ResizeConfig((0.3, 1.2), up=0.3, down=0.4, step=0.03),
        noise=NoiseConfig((1.0, 25.0), (0.05, 2.5)),
        jpeg=JpegConfig((30, 95)),
        codec=None,
    ),
    end=EndConfig(shrink=4, sinc=_sinc(), jpeg=None, codec=_peers_codecs()),
    sharpen_truth=True,
)
"""The default for video: RealBasicVSR's recipe, which Upscale-A-Video and so SeedVR follow."""

REALESRGAN = RecipeConfig(
    first=OrderConfig(
        blur=BlurConfig((0.2, 3.0)),
        resize=ResizeConfig((0.15, 1.5), up=0.2, down=0.7, step=0.015, even=False),
        noise=NoiseConfig((1.0, 30.0), (0.05, 3.0)),
        jpeg=JpegConfig((30, 95)),
        codec=None,
    ),
    second=OrderConfig(
        blur=BlurConfig((0.2, 1.5), probability=0.8),
        resize=ResizeConfig((0.3, 1.2), up=0.3, down=0.4, step=0.03, even=False, of_quarter=True),
        noise=NoiseConfig((1.0, 25.0), (0.05, 2.5)),
        jpeg=None,
        codec=None,
    ),
    end=EndConfig(shrink=4, sinc=_sinc(), jpeg=JpegConfig((30, 95)), codec=None),
    sharpen_truth=True,
)
"""The recipe for images: Real-ESRGAN's x4plus."""

LIGHT = RecipeConfig(
    first=OrderConfig(
        blur=BlurConfig((0.2, 1.0), probability=0.5),
        resize=ResizeConfig((0.5, 1.0), up=0.0, down=0.5, step=0.015),
        noise=NoiseConfig((1.0, 6.0), (0.05, 0.5), probability=0.5),
        jpeg=JpegConfig((70, 95), probability=0.3),
        codec=CodecConfig(
            {"libx264": 0.4, "libx265": 0.2, "mpeg4": 0.1, "libvpx-vp9": 0.2, "mpeg2video": 0.1},
            bits_per_pixel=(0.2, 2.0),
        ),
    ),
    second=None,
    end=None,
    sharpen_truth=False,
)
"""For nearly clean inputs: one order, mild, and the five codecs of today's files. Our own choice."""
