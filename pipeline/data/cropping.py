"""Which samples a clip yields: buckets, random crops and seeds, all drawn from ids alone.

The paper crops and never shrinks (section 3.3), so a clip smaller than a bucket yields no sample in it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.store import hashing, schema

_SIDE = schema.SPATIAL_FACTOR * schema.PATCH


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A size that samples are cropped to, in pixels; frames are 4n+1."""

    frames: int
    """Frames of a sample, 4n+1; a size of 1 frame is for images."""
    height: int
    """Height of a sample in pixels, a multiple of 16."""
    width: int
    """Width of a sample in pixels, a multiple of 16."""

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames - 1) % schema.TEMPORAL_FACTOR:
            raise ValueError(f"buckets: {self.frames} frames; a bucket's frames are 4n+1 (1, 5, 9, 21, ...)")
        if self.height < _SIDE or self.width < _SIDE or self.height % _SIDE or self.width % _SIDE:
            raise ValueError(f"buckets: {self.height}x{self.width}; sides are multiples of {_SIDE}")

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Native:
    """Samples of the clip's own size: sides floored to multiples of 16, frames to 4n+1."""

    max_frames: int
    """Largest number of frames of a native-size sample; longer clips are cut to it."""
    max_pixels: int
    """Largest number of pixels in a frame; larger clips give no native-size sample."""


def native_bucket(clip: dict[str, Any], native: Native) -> Bucket | None:
    """The bucket of a clip's own size, or None if it is too small or too large."""
    height, width = clip["height"] // _SIDE * _SIDE, clip["width"] // _SIDE * _SIDE
    if not height or not width or clip["height"] * clip["width"] > native.max_pixels:
        return None
    frames = min(clip["num_frames"], native.max_frames)
    return Bucket((frames - 1) // schema.TEMPORAL_FACTOR * schema.TEMPORAL_FACTOR + 1, height, width)


def fits(clip: dict[str, Any], bucket: Bucket) -> bool:
    """Whether the clip is long and large enough. Images go to 1-frame buckets only, videos to the others."""
    kind_fits = (clip["media"] == "image") == (bucket.frames == 1)
    return (
        kind_fits
        and clip["num_frames"] >= bucket.frames
        and clip["height"] >= bucket.height
        and clip["width"] >= bucket.width
    )


def plan_samples(
    clip: dict[str, Any], buckets: Sequence[Bucket], native: Native | None, variants: int, seed: int
) -> list[dict[str, Any]]:
    """The planned rows of one clip: id, bucket, crop and seed of every sample."""
    chosen = [(bucket.name, bucket) for bucket in buckets if fits(clip, bucket)]
    if native is not None and (own := native_bucket(clip, native)) is not None:
        chosen.append(("native", own))
    rows = []
    for name, bucket in chosen:
        for variant in range(variants):
            sample_id = hashing.stable_id(clip["clip_id"], name, variant)
            sample_seed = hashing.stable_hash(seed, sample_id)
            rows.append(
                {
                    "sample_id": sample_id,
                    "clip_id": clip["clip_id"],
                    "bucket": name,
                    "num_frames": bucket.frames,
                    "height": bucket.height,
                    "width": bucket.width,
                    "crop": random_crop(clip, bucket, sample_seed),
                    "seed": sample_seed,
                }
            )
    return rows


def random_crop(clip: dict[str, Any], bucket: Bucket, seed: int) -> list[int]:
    """First frame, top and left of a crop, drawn uniformly from all that fit."""
    draw = np.random.default_rng(seed)
    rooms = (
        clip["num_frames"] - bucket.frames,
        clip["height"] - bucket.height,
        clip["width"] - bucket.width,
    )
    return [int(draw.integers(0, room + 1)) for room in rooms]
