"""Crops of the kept clips for the autoencoder: decoded, cut and partly degraded for their step.

Which crops a step sees is a function of (seed, stage, step, rank).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from degradations.recipe import RecipeConfig, apply, draw
from pipeline.data import cropping
from pipeline.data.kept_clips import kept_clips
from pipeline.store import hashing, source_cache
from pipeline.training.state import ranks
from pipeline.video import decoding, pixel_range
from pipeline.video.sandbox import MediaError, Sandbox

_UNREADABLE_IN_A_ROW = 20


@dataclasses.dataclass(frozen=True)
class CropPlan:
    """What a reader draws from."""

    crop: cropping.Bucket
    """Size of video crops; image crops have one frame of it."""
    image_share: float
    degraded_share: float
    degraded_recipe: RecipeConfig
    crops_per_read: int
    seed: int


def fitting_clips(
    data_url: str, split: str, crop: cropping.Bucket, version: int | None = None
) -> list[dict[str, Any]]:
    """The kept clips that are large enough for a crop; images need one frame only. ValueError if none is.

    version: of selection/; None for the newest.
    """
    image = dataclasses.replace(crop, frames=1)
    fitting = [
        clip
        for clip in kept_clips(data_url, split, version)
        if cropping.fits(clip, image if clip["media"] == "image" else crop)
    ]
    if not fitting:
        raise ValueError(f"stages: no kept {split} clip is as large as {crop.name}")
    return fitting


class CropReader:
    """Draws clips and cuts crops from them, decoded in a child process that may die."""

    def __init__(self, plan: CropPlan, clips: Sequence[dict[str, Any]]) -> None:
        self.plan = plan
        self.images = [clip for clip in clips if clip["media"] == "image"]
        self.videos = [clip for clip in clips if clip["media"] == "video"] or self.images
        self.sandbox = Sandbox(time_limit_s=120.0)

    def crops(self, *key: object) -> list[np.ndarray]:
        """`crops_per_read` crops, uint8 (T, H, W, 3), of a clip drawn by the key.

        An unreadable clip is skipped and another one drawn; raises ValueError after 20 of them.
        """
        plan = self.plan
        generator = np.random.default_rng(hashing.stable_hash(plan.seed, *key))
        for _ in range(_UNREADABLE_IN_A_ROW):
            image = self.images and generator.random() < plan.image_share
            pool = self.images if image else self.videos
            clip = pool[generator.integers(len(pool))]
            frames = 1 if clip["media"] == "image" else plan.crop.frames
            try:
                pixels = self._read(clip, int(generator.integers(clip["num_frames"] - frames + 1)), frames)
                return [self._cut(pixels, clip, generator) for _ in range(plan.crops_per_read)]
            except (MediaError, ValueError, OSError) as error:
                print(f"skipped {clip['uri']}: {error}", flush=True)
        raise ValueError(f"data: {_UNREADABLE_IN_A_ROW} clips in a row could not be read")

    def _read(self, clip: dict[str, Any], first: int, frames: int) -> np.ndarray:
        with source_cache.local_file(clip["uri"], clip.get("source_etag")) as path:
            return self.sandbox.call(decoding.read_frames, clip, path, first, frames)

    def _cut(self, pixels: np.ndarray, clip: dict[str, Any], generator: np.random.Generator) -> np.ndarray:
        plan = self.plan
        top = generator.integers(pixels.shape[1] - plan.crop.height + 1)
        left = generator.integers(pixels.shape[2] - plan.crop.width + 1)
        cut = pixels[:, top : top + plan.crop.height, left : left + plan.crop.width]
        if generator.random() < plan.degraded_share:
            seed = int(generator.integers(2**62))
            cut = np.ascontiguousarray(cut)
            fps, shape = clip["fps"] or 25.0, (cut.shape[0], cut.shape[1], cut.shape[2])
            cut = apply(draw(plan.degraded_recipe, seed, shape, fps), cut).lq
        return cut

    def close(self) -> None:
        self.sandbox.close()


def crop_batches(
    reader: CropReader, crops_per_worker: int, stage: int, first_step: int, steps: int
) -> Iterator[list[np.ndarray]]:
    """A rank's batches of a stage from a step on: lists of crops, mixing videos and images of one size."""
    for step in range(first_step, steps):
        batch: list[np.ndarray] = []
        reads = -(-crops_per_worker // reader.plan.crops_per_read)
        for number in range(reads):
            slot = number * ranks.world_size() + ranks.rank()
            batch += reader.crops("crop", stage, step, slot)
        yield batch[:crops_per_worker]


def held_out_crops(plan: CropPlan, clips: Sequence[dict[str, Any]], count: int) -> list[np.ndarray]:
    """Fixed, undegraded crops of held-out clips, the same on every rank."""
    reader = CropReader(dataclasses.replace(plan, degraded_share=0.0), clips)
    crops: list[np.ndarray] = []
    while len(crops) < count:
        crops += reader.crops("held out", len(crops))
    reader.close()
    return crops[:count]


def by_length(crops: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Crops of equal length as one tensor each, (B, 3, T, H, W) in [-1, 1]."""
    lengths = sorted({len(crop) for crop in crops})
    groups = [[crop for crop in crops if len(crop) == length] for length in lengths]
    return [torch.cat([pixel_range.to_network(crop, device) for crop in group]) for group in groups]
