"""Drawing a degradation and applying it, in two steps, so that what was drawn can be stored.

`draw(config, seed, shape, fps)` yields every parameter of every frame; `apply(degradation, frames)` returns
the LQ clip, with the same bytes each time for the same library versions. A `Degradation` survives a round
trip through JSON unchanged.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from degradations import config as recipes
from degradations.config import LIGHT, REALBASICVSR, REALESRGAN, EndConfig, OrderConfig, RecipeConfig
from degradations.draws import ClipDraws
from degradations.operations import UnsharpMask
from degradations.operations.protocol import ClipOperation, Operation
from degradations.operations.resize import Interpolation, even_interpolations, resize_all

__all__ = [
    "LIGHT",
    "REALBASICVSR",
    "REALESRGAN",
    "Degradation",
    "DegradedClip",
    "RecipeConfig",
    "apply",
    "draw",
    "from_json",
    "to_json",
]


@dataclass(frozen=True)
class Degradation:
    """Everything that will happen to one clip."""

    shape: tuple[int, int, int]
    """(T, H, W) of the clip it was drawn for; it applies to no other"""
    truth: UnsharpMask | None
    """What happens to HQ itself before LQ is made from it"""
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class DegradedClip:
    """A degraded clip."""

    lq: np.ndarray
    """(T, H, W, 3) uint8, the size of HQ"""
    hq: np.ndarray
    """What to train towards: the frames given, or their sharpened copy where the recipe sharpens the truth"""
    measured: list[dict[str, Any]]
    """One entry per codec: its place in `operations`, encoder, drawn and measured rates, encodes"""


# ---------------------------------------------------------------------------------------- drawing


def _draw_round(order: OrderConfig, clip: ClipDraws) -> list[Operation]:
    configs = [getattr(order, item.name) for item in fields(order)]
    return [operation for config in configs if config is not None for operation in config.draw(clip)]


def _draw_end(end: EndConfig, clip: ClipDraws) -> list[Operation]:
    interpolation: tuple[Interpolation, ...] = clip.choice(even_interpolations())  # type: ignore[arg-type]
    shrink: list[Operation] = [resize_all(interpolation, clip.final_size), *end.sinc.draw(clip)]
    compression: list[Operation] = [
        operation for config in (end.jpeg, end.codec) if config is not None for operation in config.draw(clip)
    ]
    return shrink + compression if clip.happens(0.5) else compression + shrink


def _checked_shape(shape: Sequence[Any]) -> tuple[int, int, int]:
    """(T, H, W) as Python's integers."""
    if len(shape) != 3 or not all(isinstance(length, Integral) and int(length) >= 1 for length in shape):
        raise ValueError(f"shape: {tuple(shape)} must be (T, H, W), whole numbers, each 1 or more")
    return int(shape[0]), int(shape[1]), int(shape[2])


def draw(config: RecipeConfig, seed: int, shape: tuple[int, int, int], fps: float) -> Degradation:
    """Everything that will happen to a clip of `shape` (T, H, W) at `fps`, by `seed` alone.

    A clip of one frame gets no video codec. Cheap: about a millisecond for 21 frames. ValueError for a
    seed that is not a whole number of at least 0, a shape that is not three lengths of at least 1, or a rate
    that is not above 0.
    """
    num_frames, height, width = _checked_shape(shape)
    if not isinstance(seed, Integral) or int(seed) < 0:
        raise ValueError(f"seed: {seed!r} must be a whole number, 0 or more")
    if num_frames > 1 and (not isinstance(fps, Real) or not 0 < float(fps) < math.inf):
        raise ValueError(f"fps: {fps!r} must be a number above 0 for a clip of {num_frames} frames")
    fps = float(fps) if num_frames > 1 else 0.0  # JSON knows neither fractions nor numpy's numbers
    shrink = config.end.shrink if config.end is not None else 1
    clip = ClipDraws(config.time, (num_frames, height, width), fps, int(seed), shrink)
    operations: list[Operation] = []
    for order in (config.first, config.second):
        if order is not None:
            operations += _draw_round(order, clip)
    if config.end is not None:
        operations += _draw_end(config.end, clip)
    interpolation: Interpolation = "bicubic"
    operations.append(resize_all((interpolation,) * num_frames, (height, width)))
    truth = UnsharpMask() if config.sharpen_truth else None
    return Degradation((num_frames, height, width), truth, tuple(operations))


# --------------------------------------------------------------------------------------- applying


def apply(degradation: Degradation, frames: np.ndarray) -> DegradedClip:
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
        if isinstance(operation, ClipOperation):
            clip, values = operation.apply_clip(clip)
            measured.append({"operation": place, **values})
        else:
            clip = [operation.apply(frame, index) for index, frame in enumerate(clip)]
    return DegradedClip(np.stack(clip), hq, measured)


# ------------------------------------------------------------------------------------------- JSON


@lru_cache(maxsize=2)
def _operations_by_name(order: type[OrderConfig]) -> dict[str, type]:
    """The classes of all operations that a round may draw."""
    return {cls.__name__: cls for config in recipes.operation_configs(order) for cls in config.operations}


def _pack(operation: Operation | UnsharpMask) -> dict[str, Any]:
    """A field with one value per frame becomes that value alone where all frames share it."""
    packed: dict[str, Any] = {"operation": type(operation).__name__}
    for item in fields(operation):  # type: ignore[arg-type]
        value = getattr(operation, item.name)
        if isinstance(value, tuple):
            value = value[0] if len(set(value)) == 1 else list(value)
        packed[item.name] = value
    return packed


def _unpack(packed: dict[str, Any], num_frames: int) -> Operation:
    values = dict(packed)
    name = values.pop("operation")
    known = _operations_by_name(recipes.OrderConfig)
    if name not in known:
        raise ValueError(f"degradation: unknown operation {name!r}; known: {', '.join(known)}")
    cls = known[name]
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
    """Read what `to_json` wrote; the result equals the original."""
    try:
        record = json.loads(text)
        shape = _checked_shape(record["shape"])
        truth = None if record["truth"] is None else UnsharpMask(**record["truth"])
        operations = tuple(_unpack(packed, shape[0]) for packed in record["operations"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"degradation: not the JSON of a degradation ({error!r})") from error
    return Degradation(shape, truth, operations)
