"""The settings that determine how a restored video looks, besides the weights and the size."""

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
    """Number of Euler steps of the sampler, to which time is proportional; a single step gives the smoothest
    picture and the highest PSNR. Null takes the model's own: 50, or 1 for SeedVR2."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance towards the positive prompt; 1 turns it off and halves the cost. Null
    takes the model's own: 1, or 6.5 for SeedVR."""
    condition_noise: float | None = None
    """Amount of noise on the low-quality latent, from 0 to 1000, before it is shifted by the video's size;
    more noise lets the model depart further from its input. Null takes the model's own: 100, or 0 for
    SeedVR2."""
    seed: int = 0
    """Seed of all noise; the same seed gives the same video."""
    color_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    """What the result takes from its input: colours and low frequencies (wavelet), the mean and deviation of
    each channel (adain), or nothing (none)."""
    chunk_frames: int = 21
    """Video frames that the transformer sees at once, 4n+1; longer chunks are steadier over time and take
    more memory."""
    overlap_frames: int = 8
    """Frames that neighbouring chunks share and over which they are blended, a multiple of 4."""
    slice_frames: int = 8
    """Frames that the autoencoder processes at once, a multiple of 4; this changes the memory it takes and
    not the result."""

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
        """The model's schedule, overridden by the values given here."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(of_model)}
        return dataclasses.replace(of_model, **{k: value for k, value in given.items() if value is not None})

    @property
    def chunks(self) -> ChunkPlan:
        """The chunks in latent frames."""
        latent_frames = (self.chunk_frames - 1) // TEMPORAL_FACTOR + 1
        return ChunkPlan(latent_frames, self.overlap_frames // TEMPORAL_FACTOR)
