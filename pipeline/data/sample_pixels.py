"""Pixels of one sample: decode, crop and degrade, in a CPU task anywhere in the cluster.

These tasks' processes and their decoding processes import this module: torch stays with the encoders.
"""

import dataclasses
import json
import time
from typing import Any

import numpy as np

from degradations.config import RecipeConfig
from degradations.recipe import apply, draw, to_json
from pipeline.store import source_cache
from pipeline.video import decoding
from pipeline.video.sandbox import MediaError
from pipeline.video.sandbox import shared as shared_sandbox


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """What of a precompute's config makes the pixels."""

    video_recipe: RecipeConfig
    image_recipe: RecipeConfig
    decode_seconds: float


def degrade(frames: np.ndarray, clip: dict[str, Any], config: PixelConfig, seed: int) -> dict[str, Any]:
    """Degrade frames: HQ (sharpened if the recipe says so) and LQ, uint8 (T, H, W, 3), and their record."""
    recipe = config.image_recipe if clip["media"] == "image" else config.video_recipe
    shape = (frames.shape[0], frames.shape[1], frames.shape[2])
    degradation = draw(recipe, seed, shape, clip["fps"] or 25.0)
    applied = apply(degradation, frames)
    record = {"operations": json.loads(to_json(degradation)), "measured": applied.measured}
    return {"hq": applied.hq, "lq": applied.lq, "degradation": json.dumps(record)}


def read_crop(
    clip: dict[str, Any], path: str, first: int, count: int, window: tuple[int, int, int, int]
) -> np.ndarray:
    """Frames [first, first + count) of a clip, cut to (top, left, height, width): uint8 (T, H, W, 3)."""
    top, left, height, width = window
    frames = decoding.read_frames(clip, path, first, count)
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def prepare_sample(planned: dict[str, Any], config: PixelConfig) -> dict[str, Any]:
    """Decode, crop and degrade one planned sample: {hq, lq, degradation} or {error}, and its CPU seconds."""
    start = time.monotonic()
    clip, (first, top, left) = planned["clip"], planned["crop"]
    try:
        with source_cache.local_file(clip["uri"], clip.get("source_etag")) as path:
            count = planned["num_frames"]
            window = (top, left, planned["height"], planned["width"])
            sandbox = shared_sandbox(config.decode_seconds)
            frames = sandbox.call(read_crop, clip, path, first, count, window)
        made = degrade(frames, clip, config, planned["seed"])
    except (MediaError, ValueError, OSError) as error:
        made = {"error": f"{type(error).__name__}: {clip['uri']}: {error}"}
    return {**made, "seconds": time.monotonic() - start}
