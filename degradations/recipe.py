"""Drawing a degradation and applying it: two steps, since what was drawn is a value worth keeping.

`draw(config, seed, shape, fps)` gives every parameter of every frame; `apply(degradation, frames)`
gives the LQ clip, the same bytes each time with the same library versions. A `Degradation` goes to JSON
and back unchanged.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

import numpy as np

from degradations.config import (
    LIGHT,
    REALBASICVSR,
    REALESRGAN,
    BlurConfig,
    CodecConfig,
    EndConfig,
    JpegConfig,
    NoiseConfig,
    OrderConfig,
    Range,
    RecipeConfig,
    ResizeConfig,
)
from degradations.kernels import KernelKind
from degradations.operations import (
    Blur,
    FrameOperation,
    GaussianNoise,
    Interpolation,
    Jpeg,
    Operation,
    PoissonNoise,
    Resize,
    UnsharpMask,
    VideoCodec,
)

__all__ = [
    "LIGHT",
    "REALBASICVSR",
    "REALESRGAN",
    "Applied",
    "Degradation",
    "RecipeConfig",
    "apply",
    "draw",
    "from_json",
    "to_json",
]

K = TypeVar("K")

MIN_SIDE_PX = 4
"""No resize goes below this: 16x16 through Real-ESRGAN's factors would end at 1x1."""


@dataclass(frozen=True)
class Degradation:
    """All that will happen to one clip."""

    shape: tuple[int, int, int]
    """(T, H, W) of the clip it was drawn for; it applies to no other"""
    truth: UnsharpMask | None
    """What happens to HQ itself before LQ is made from it"""
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Applied:
    """A degraded clip."""

    lq: np.ndarray
    """(T, H, W, 3) uint8, the size of HQ"""
    hq: np.ndarray
    """What to train towards: the frames given, or their sharpened copy where the recipe sharpens the truth"""
    measured: list[dict[str, Any]]
    """One entry per codec: its place in `operations`, encoder, drawn and measured rates, encodes"""


# ---------------------------------------------------------------------------------------- drawing


class _Clock:
    """How one value moves over the frames of a clip, in the recipe's time mode.

    Python's own generator: a clip is some 300 single numbers, which cost it a tenth of numpy's time.
    """

    def __init__(self, time: str, num_frames: int, seed: int):
        self.time, self.num_frames, self.random = time, num_frames, random.Random(seed)

    def number(self, bounds: Range, step: float, start: Range | None = None) -> tuple[float, ...]:
        """A value of each frame, within `bounds`; the first (and any independent one) within `start`.

        Rounded to 5 decimals, so that a row's JSON stays small.
        """
        low, high = bounds
        start = start or bounds
        value = self.random.uniform(*start)
        values = [value]
        for _ in range(self.num_frames - 1):
            if self.time == "independent":
                value = self.random.uniform(*start)
            elif self.time == "walk":
                value = min(max(value + self.random.uniform(-step, step), low), high)
            values.append(value)
        return tuple(min(max(round(value, 5), low), high) for value in values)

    def choice(self, probabilities: Mapping[K, float]) -> tuple[K, ...]:
        """A kind for each frame; the same for all unless frames are independent."""
        count = self.num_frames if self.time == "independent" else 1
        return tuple(self.drawn(probabilities) for _ in range(count)) * (self.num_frames // count)

    def drawn(self, probabilities: Mapping[K, float]) -> K:
        """One of the kinds, in whatever order they are named: a file may sort them."""
        kinds = sorted(probabilities, key=str)
        return self.random.choices(kinds, [probabilities[kind] for kind in kinds])[0]

    def by_kind(self, kinds: tuple[K, ...], number: Callable[[K], tuple[float, ...]]) -> tuple[float, ...]:
        """Values whose law depends on the frame's kind: each kind's series, read at its own frames."""
        series = {kind: number(kind) for kind in dict.fromkeys(kinds)}
        return tuple(series[kind][index] for index, kind in enumerate(kinds))

    def happens(self, probability: float) -> bool:
        return self.random.random() < probability

    def seed(self) -> int:
        return self.random.getrandbits(53)  # whole in any JSON reader


def _draw_blur(config: BlurConfig, clock: _Clock) -> Blur:
    kind: tuple[KernelKind, ...] = clock.choice(config.kernels)  # type: ignore[arg-type]
    size_px = clock.choice(dict.fromkeys(config.sizes_px, 1.0))

    def beta(of: str) -> tuple[float, ...]:
        if of.startswith("plateau"):
            return clock.number(config.beta_plateau, config.beta_plateau_step)
        return clock.number(config.beta_generalized, config.beta_generalized_step)

    def omega(size: int) -> tuple[float, ...]:
        widest = (math.pi / 3, math.pi) if size < 13 else (math.pi / 5, math.pi)
        return clock.number(config.omega_rad or widest, config.omega_step_rad)

    return Blur(
        kind=kind,
        size_px=size_px,
        sigma_x_px=clock.number(config.sigma_px, config.sigma_step_px),
        sigma_y_px=clock.number(config.sigma_px, config.sigma_step_px),
        rotation_rad=clock.number((-math.pi, math.pi), config.rotation_step_rad),
        beta=clock.by_kind(kind, beta),
        omega_rad=clock.by_kind(size_px, omega),
    )


Sizes = list[tuple[int, int]]
"""(H, W) of each frame at a point of the chain."""


def _draw_resize(config: ResizeConfig, clock: _Clock, sizes: Sizes, quarter: tuple[int, int]) -> Resize:
    """Frames of different sizes (after an earlier walk) all go by the first one's size, as in MMagic."""
    low, high = config.factor
    keep = max(0.0, 1.0 - config.up - config.down)
    direction = clock.choice({"up": config.up, "down": config.down, "keep": keep})
    bounds = (min(low, 1.0), max(high, 1.0))
    starts: dict[str, Range] = {"up": (1.0, bounds[1]), "down": (bounds[0], 1.0), "keep": (1.0, 1.0)}
    factors = clock.by_kind(direction, lambda way: clock.number(bounds, config.step, starts[way]))
    height, width = quarter if config.of_quarter else sizes[0]

    def side(length: int, factor: float) -> int:
        scaled = int(length * factor)
        return max(MIN_SIDE_PX, scaled - scaled % 2 if config.even else scaled)

    return Resize(
        interpolation=clock.choice(config.interpolations),  # type: ignore[arg-type]
        height_px=tuple(side(height, factor) for factor in factors),
        width_px=tuple(side(width, factor) for factor in factors),
    )


def _resize_all(interpolation: tuple[Interpolation, ...], size: tuple[int, int]) -> Resize:
    """Every frame to one size (H, W)."""
    count = len(interpolation)
    return Resize(interpolation, (size[0],) * count, (size[1],) * count)


def _draw_noise(config: NoiseConfig, clock: _Clock) -> list[Operation]:
    """One operation; or, where frames are independent, both, each silent on the other's frames."""
    gaussian = clock.choice({True: config.gaussian, False: 1.0 - config.gaussian})
    grey = clock.choice({True: config.grey, False: 1.0 - config.grey})
    drawn: list[Operation] = []
    if any(gaussian):
        sigma = clock.number(config.gaussian_sigma, config.gaussian_sigma_step)
        sigma = tuple(value if on else 0.0 for value, on in zip(sigma, gaussian, strict=True))
        drawn.append(GaussianNoise(sigma, grey, clock.seed()))
    if not all(gaussian):
        scale = clock.number(config.poisson_scale, config.poisson_scale_step)
        scale = tuple(0.0 if on else value for value, on in zip(scale, gaussian, strict=True))
        drawn.append(PoissonNoise(scale, grey, clock.seed()))
    return drawn


def _draw_jpeg(config: JpegConfig, clock: _Clock) -> Jpeg:
    return Jpeg(tuple(round(quality) for quality in clock.number(config.quality, config.quality_step)))


def _draw_codec(config: CodecConfig, clock: _Clock, fps: float) -> VideoCodec:
    rate = round(clock.random.uniform(*config.bits_per_pixel), 5)
    encoder = clock.drawn(config.encoders)
    return VideoCodec(encoder, rate, fps)  # type: ignore[arg-type]


def _compress(
    jpeg: JpegConfig | None, codec: CodecConfig | None, clock: _Clock, fps: float
) -> list[Operation]:
    drawn: list[Operation] = []
    if jpeg is not None and clock.happens(jpeg.probability):
        drawn.append(_draw_jpeg(jpeg, clock))
    if codec is not None and clock.num_frames > 1 and clock.happens(codec.probability):
        drawn.append(_draw_codec(codec, clock, fps))
    return drawn


def _draw_order(
    config: OrderConfig, clock: _Clock, sizes: Sizes, quarter: tuple[int, int], fps: float
) -> tuple[list[Operation], Sizes]:
    drawn: list[Operation] = []
    if config.blur is not None and clock.happens(config.blur.probability):
        drawn.append(_draw_blur(config.blur, clock))
    if config.resize is not None:
        resize = _draw_resize(config.resize, clock, sizes, quarter)
        sizes = list(zip(resize.height_px, resize.width_px, strict=True))
        drawn.append(resize)
    if config.noise is not None and clock.happens(config.noise.probability):
        drawn += _draw_noise(config.noise, clock)
    compression = _compress(config.jpeg, config.codec, clock, fps)
    if any(isinstance(operation, VideoCodec) for operation in compression):
        sizes = [sizes[0]] * len(sizes)  # a stream has one size
    return drawn + compression, sizes


def _draw_end(config: EndConfig, clock: _Clock, quarter: tuple[int, int], fps: float) -> list[Operation]:
    thirds: dict[Interpolation, float] = {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}
    interpolation = clock.choice(thirds)
    shrink: list[Operation] = [_resize_all(interpolation, quarter)]
    if clock.happens(config.sinc.probability):
        shrink.append(_draw_blur(config.sinc, clock))
    compression = _compress(config.jpeg, config.codec, clock, fps)
    return shrink + compression if clock.happens(0.5) else compression + shrink


def _checked_shape(shape: Sequence[Any]) -> tuple[int, int, int]:
    """(T, H, W) as Python's integers."""
    if len(shape) != 3 or not all(isinstance(length, Integral) and int(length) >= 1 for length in shape):
        raise ValueError(f"shape: {tuple(shape)} must be (T, H, W), whole numbers, each 1 or more")
    return int(shape[0]), int(shape[1]), int(shape[2])


def draw(config: RecipeConfig, seed: int, shape: tuple[int, int, int], fps: float) -> Degradation:
    """Everything that will happen to a clip of `shape` (T, H, W) at `fps`, by `seed` alone.

    A clip of one frame gets no video codec. Cheap: about a millisecond for 21 frames. ValueError for a
    seed that is no whole number from 0 up, a shape of other than three lengths of 1 or more, or a rate that
    is not above 0.
    """
    num_frames, height, width = _checked_shape(shape)
    if not isinstance(seed, Integral) or int(seed) < 0:
        raise ValueError(f"seed: {seed!r} must be a whole number, 0 or more")
    if num_frames > 1 and (not isinstance(fps, Real) or not 0 < float(fps) < math.inf):
        raise ValueError(f"fps: {fps!r} must be a number above 0 for a clip of {num_frames} frames")
    fps = float(fps) if num_frames > 1 else 0.0  # fractions and numpy's numbers are no JSON
    clock = _Clock(config.time, num_frames, int(seed))
    shrink = config.end.shrink if config.end is not None else 1
    quarter = (max(MIN_SIDE_PX, height // shrink), max(MIN_SIDE_PX, width // shrink))
    sizes: Sizes = [(height, width)] * num_frames
    operations: list[Operation] = []
    for order in (config.first, config.second):
        if order is not None:
            drawn, sizes = _draw_order(order, clock, sizes, quarter, fps)
            operations += drawn
    if config.end is not None:
        operations += _draw_end(config.end, clock, quarter, fps)
    interpolation: Interpolation = "bicubic"
    operations.append(_resize_all((interpolation,) * num_frames, (height, width)))
    truth = UnsharpMask() if config.sharpen_truth else None
    return Degradation((num_frames, height, width), truth, tuple(operations))


# --------------------------------------------------------------------------------------- applying


def apply(degradation: Degradation, frames: np.ndarray) -> Applied:
    """Degrade `frames` (T, H, W, 3) uint8 RGB, the clip the degradation was drawn for."""
    shape = (*degradation.shape, 3)
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape != shape:
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames: got {got}; this degradation was drawn for uint8 {shape} (T, H, W, RGB)")
    hq = frames
    if degradation.truth is not None:
        hq = np.stack([degradation.truth.apply(frame) for frame in frames])
    clip = [np.ascontiguousarray(frame) for frame in hq]
    measured: list[dict[str, Any]] = []
    for place, operation in enumerate(degradation.operations):
        if isinstance(operation, VideoCodec):
            done = operation.apply_clip(clip)
            height, width = done.frames[0].shape[:2]
            measured.append(
                {
                    "operation": place,
                    "encoder": operation.encoder,
                    "drawn_bits_per_pixel": operation.bits_per_pixel,
                    "measured_bits_per_pixel": round(done.bits_per_pixel, 5),
                    "measured_bits_per_s": round(done.bits_per_pixel * height * width * operation.fps),
                    "encodes": done.encodes,
                }
            )
            clip = done.frames
        else:
            clip = [operation.apply(frame, index) for index, frame in enumerate(clip)]
    return Applied(np.stack(clip), hq, measured)


# ------------------------------------------------------------------------------------------- JSON

_OPERATIONS = {cls.__name__: cls for cls in (*get_args(FrameOperation), VideoCodec)}


def _pack(operation: Operation | UnsharpMask) -> dict[str, Any]:
    """A field with one value per frame becomes that value alone where all frames share it."""
    packed: dict[str, Any] = {"operation": type(operation).__name__}
    for item in fields(operation):
        value = getattr(operation, item.name)
        if isinstance(value, tuple):
            value = value[0] if len(set(value)) == 1 else list(value)
        packed[item.name] = value
    return packed


def _unpack(packed: dict[str, Any], num_frames: int) -> Operation:
    values = dict(packed)
    name = values.pop("operation")
    cls = _OPERATIONS.get(name)
    if cls is None:
        raise ValueError(f"degradation: unknown operation {name!r}; known: {', '.join(_OPERATIONS)}")
    for item in fields(cls):
        if str(item.type).startswith("tuple"):
            value = values[item.name]
            value = values[item.name] = tuple(value) if isinstance(value, list) else (value,) * num_frames
            if len(value) != num_frames:
                raise ValueError(f"degradation: {name}.{item.name} has {len(value)} values, not {num_frames}")
    return cls(**values)


def to_json(degradation: Degradation) -> str:
    """Every parameter, on one line: about 1 kB a clip without and 10 kB with walks over 21 frames."""
    truth = degradation.truth
    record = {
        "shape": list(degradation.shape),
        "truth": None if truth is None else {item.name: getattr(truth, item.name) for item in fields(truth)},
        "operations": [_pack(operation) for operation in degradation.operations],
    }
    return json.dumps(record, separators=(",", ":"))


def from_json(text: str) -> Degradation:
    """What `to_json` wrote, equal to the original."""
    try:
        record = json.loads(text)
        shape = _checked_shape(record["shape"])
        truth = None if record["truth"] is None else UnsharpMask(**record["truth"])
        operations = tuple(_unpack(packed, shape[0]) for packed in record["operations"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"degradation: not the JSON of a degradation ({error!r})") from error
    return Degradation(shape, truth, operations)
