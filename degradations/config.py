"""What a recipe may draw: its rounds of operations, and the three recipes themselves.

Sources: Real-ESRGAN's `options/train_realesrgan_x4plus.yml`; RealBasicVSR as configured in MMagic,
`configs/real_basicvsr`. `configs/recipes/*.yaml` hold the same three for a job's config.
"""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

from degradations.draws import TimeMode
from degradations.operations import BlurConfig, CodecConfig, JpegConfig, NoiseConfig, ResizeConfig
from degradations.operations.protocol import OperationConfig

PI = 3.1416
"""The value of pi in RealBasicVSR's configuration."""


@dataclass(frozen=True)
class OrderConfig:
    """One round of operations, in this order: the table of all degradations. A null operation never happens.

    A further degradation is one file in `operations/` and one field here, `name: NameConfig | None = None`.
    """

    blur: BlurConfig | None
    """Blur, the first operation of a pass; null leaves it out."""
    resize: ResizeConfig | None
    """Resizing, which follows the blur; null leaves it out."""
    noise: NoiseConfig | None
    """Noise, which follows the resizing; null leaves it out."""
    jpeg: JpegConfig | None
    """JPEG compression, which follows the noise; null leaves it out."""
    codec: CodecConfig | None
    """Video compression of the whole clip, the last operation of a pass; null leaves it out, and images
    always skip it."""


@dataclass(frozen=True)
class EndConfig:
    """The end: {resize to HQ / shrink, then a sinc filter} and {JPEG or codec}, in random order."""

    shrink: int
    """Factor by which the low-quality clip is made smaller than the high-quality one, before the very last
    step enlarges it to the same size again."""
    sinc: BlurConfig
    """The sinc filter that follows the shrinking."""
    jpeg: JpegConfig | None
    """JPEG compression, in random order with shrinking and filtering; null leaves it out, and only one of
    `jpeg` and `codec` may be set."""
    codec: CodecConfig | None
    """Video compression, in random order with shrinking and filtering; null leaves it out, and only one of
    `jpeg` and `codec` may be set."""

    def __post_init__(self) -> None:
        if self.shrink < 1:
            raise ValueError(f"end.shrink: {self.shrink} must be 1 or more")
        if self.jpeg is not None and self.codec is not None:
            raise ValueError("end: either jpeg or codec takes part in the random order; set one to null")


@dataclass(frozen=True)
class RecipeConfig:
    """A degradation recipe: the operations and parameters that may be drawn for a clip."""

    first: OrderConfig
    """The first pass of blur, resizing, noise and compression."""
    second: OrderConfig | None
    """The second pass of blur, resizing, noise and compression; null leaves it out."""
    end: EndConfig | None
    """The final shrinking, sinc filter and compression; null leaves them out."""
    sharpen_truth: bool
    """Whether the high-quality clip is first sharpened by an unsharp mask: the low-quality clip is then made
    from the sharpened one, which is also the training target."""
    time: TimeMode = "walk"
    """How drawn values change from frame to frame: walk is a random walk within their ranges (RealBasicVSR),
    constant keeps them, independent draws each frame afresh, kernel families and other kinds included (STAR).
    Which operations happen, their order and the video codec are always the same for a whole clip."""

    def __post_init__(self) -> None:
        if self.time not in get_args(TimeMode):
            raise ValueError(f"time: {self.time!r} is none of {', '.join(get_args(TimeMode))}")

    def settings(self) -> dict[str, Any]:
        """As JSON, for fingerprints.

        Operations that are null by default are left out, so that a degradation added later changes nothing
        about recipes that do not have it.
        """
        record = asdict(self)
        for name in ("first", "second"):
            order = getattr(self, name)
            for item in fields(order) if order is not None else ():
                if item.default is not MISSING and getattr(order, item.name) is None:
                    del record[name][item.name]
        return record


def operation_configs(order: type[OrderConfig]) -> list[type[OperationConfig]]:
    """The config classes of all operations that a round may draw, in order."""
    return [
        kind for hint in get_type_hints(order).values() for kind in get_args(hint) if kind is not type(None)
    ]


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
"""For nearly clean inputs: a single mild pass with five current codecs. This recipe is our own."""
