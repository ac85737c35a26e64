"""What determines how a restored video looks, beside the weights and the size."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from model import flow
from pipeline.restoration.chunking import ChunkPlan
from pipeline.store.schema import TEMPORAL_FACTOR
from pipeline.weights.backbones import Schedule


@dataclass(frozen=True)
class Sampling:
    """Everything but the weights and the size that determines how a restored video looks."""

    steps: int | None = None
    """Euler steps of the sampler; one step gives the smoothest picture and the highest PSNR (null: as the
    model is meant to be sampled, 50, SeedVR2 1)"""
    guidance_scale: float | None = None
    """of classifier-free guidance towards the positive prompt; 1 is none and costs half as much (null: 1,
    SeedVR 6.5)"""
    condition_noise: float | None = None
    """noise on the low-quality latent, 0 to 1000, before it is shifted by the video's size; more noise frees
    the model further from its input (null: 100, SeedVR2 0)"""
    seed: int = 0
    """of all noise; the same seed gives the same video"""
    color_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    """take colours and low frequencies (wavelet) or channel means and deviations (adain) from the input"""
    chunk_frames: int = 21
    """video frames that the transformer sees at once, 4n+1: the more, the steadier, and the more memory"""
    overlap_frames: int = 8
    """frames that neighbouring chunks share and blend over, a multiple of 4"""
    slice_frames: int = 8
    """frames that the autoencoder takes at once, a multiple of 4; changes memory, not the result"""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"sampling.steps: {self.steps}; it must be at least 1")
        if self.condition_noise is not None and not 0 <= self.condition_noise <= flow.MAX_TIME:
            raise ValueError(f"sampling.condition_noise: {self.condition_noise} is not within 0 to 1000")
        if self.chunk_frames < 1 or self.chunk_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(f"sampling.chunk_frames: {self.chunk_frames} is not 4n+1 (1, 5, 9, ...)")
        for key in ("overlap_frames", "slice_frames"):
            if getattr(self, key) % TEMPORAL_FACTOR or getattr(self, key) < 0:
                raise ValueError(f"sampling.{key}: {getattr(self, key)} is not a multiple of 4")
        if self.slice_frames < TEMPORAL_FACTOR:
            raise ValueError("sampling.slice_frames: it must be at least 4")
        if self.overlap_frames > self.chunk_frames - 1:
            raise ValueError(
                f"sampling.overlap_frames: {self.overlap_frames} leaves nothing new in chunks of "
                f"{self.chunk_frames} frames; at most {self.chunk_frames - 1}"
            )

    def schedule(self, of_model: Schedule) -> Schedule:
        """The model's schedule with what is given here in its place."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(of_model)}
        return dataclasses.replace(of_model, **{k: value for k, value in given.items() if value is not None})

    @property
    def chunks(self) -> ChunkPlan:
        """In latent frames."""
        latent_frames = (self.chunk_frames - 1) // TEMPORAL_FACTOR + 1
        return ChunkPlan(latent_frames, self.overlap_frames // TEMPORAL_FACTOR)
