"""The samples of a step as batches, with their noise drawn, packed end to end.

Noise, times and text drops come from (seed, epoch, sample_id), so a sample is the same wherever it is made.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model import flow, text_encoders
from model.dit.windows import Grid
from pipeline.store import hashing
from pipeline.training.samples.latent_reader import Reader
from pipeline.training.samples.sample_order import SampleStream, ScheduledSample, pack_step


@dataclasses.dataclass
class Batch:
    """One pack: samples end to end, one row per latent pixel, W varying fastest.

    data, noise, condition: (rows, 16) = clean HQ latent, the noise end of its path, LQ latent with its own
    noise. text: (text tokens, D). pooled: (B, P). timestep: (B,) in 0..1000. Data, noise and times are fp32.
    """

    data: Tensor
    noise: Tensor
    condition: Tensor
    text: Tensor
    pooled: Tensor
    video_shapes: list[Grid]
    text_lengths: list[int]
    timestep: Tensor
    sample_ids: list[str]
    buckets: list[str]

    @property
    def rows(self) -> list[int]:
        """(B,) latent pixels of each sample."""
        return [t * h * w for t, h, w in self.video_shapes]

    @property
    def video(self) -> Tensor:
        """(rows, 33) in the text's precision: noisy latent 16, condition 16, mask 1."""
        noisy = flow.interpolate(self.data, self.noise, flow.spread(self.timestep, self.rows))
        return flow.network_input(noisy.to(self.text.dtype), self.condition)

    @property
    def target(self) -> Tensor:
        """(rows, 16) fp32, the velocity noise - data."""
        return flow.velocity(self.data, self.noise)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Move to a device; what only the network sees gets its precision."""
        tensors = {name: getattr(self, name).to(device) for name in ("data", "noise", "timestep")}
        seen = {name: getattr(self, name).to(device, dtype) for name in ("condition", "text", "pooled")}
        return dataclasses.replace(self, **tensors, **seen)

    def sample_losses(self, velocity: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,), in fp32."""
        squared = (velocity.float() - self.target).square().mean(dim=1)
        return torch.stack([part.mean() for part in squared.split(self.rows)])


def draw_generator(seed: int, epoch: int, sample_id: str) -> torch.Generator:
    """A generator for all of a sample's randomness in one epoch, whichever rank or pack it goes to."""
    return torch.Generator().manual_seed(hashing.stable_hash(seed, "draw", epoch, sample_id))


def training_sample(
    reader: Reader,
    scheduled: ScheduledSample,
    seed: int,
    drop_text: bool = True,
    timestep: float | None = None,
    one_step_share: float = 0.0,
) -> Batch:
    """One sample, as a batch of its own, with its noise, time, condition noise and text drops drawn.

    `timestep` fixes the time. A share `one_step_share` of the samples is pure noise with a clean condition.
    """
    row, epoch = scheduled.row, scheduled.epoch
    generator = draw_generator(seed, epoch, row["sample_id"])
    hq, lq = reader.latents(row, epoch)
    shape = (hq.shape[0], hq.shape[1], hq.shape[2])
    hq, lq = hq.flatten(0, 2), lq.flatten(0, 2)
    draws = flow.draw_training(lq, [shape], generator)
    time = draws.time if timestep is None else torch.full((1,), timestep)
    condition = draws.condition
    drops = text_encoders.draw_drops(generator) if drop_text else (False, False, False)
    if one_step_share and torch.rand((), generator=generator) < one_step_share:
        time, condition = torch.full((1,), flow.MAX_TIME), lq
    tokens, pooled = reader.prompt(row["clip_id"], drops)
    return Batch(
        data=hq,
        noise=draws.noise,
        condition=condition,
        text=tokens,
        pooled=pooled[None],
        video_shapes=[shape],
        text_lengths=[len(tokens)],
        timestep=time,
        sample_ids=[row["sample_id"]],
        buckets=[row["bucket"]],
    )


def collate(samples: Sequence[Batch]) -> Batch:
    """Concatenate batches."""

    def joined(name: str) -> Any:
        parts = [getattr(sample, name) for sample in samples]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else list(itertools.chain(*parts))

    return Batch(**{field.name: joined(field.name) for field in dataclasses.fields(Batch)})


@dataclasses.dataclass
class Step:
    """One rank's share of a step."""

    batches: list[Batch]
    """its packs"""
    samples: int
    """of all ranks"""
    imbalance: float
    """(max - mean) / mean of the ranks' counted FLOPs"""
    next_position: int
    """of the stream, after the step"""


def rank_steps(  # noqa: PLR0913 - where a rank stands among the others
    reader: Reader,
    stream: SampleStream,
    position: int,
    packs_per_step: int,
    tokens_per_pack: int,
    rank: int,
    world_size: int,
    one_step_share: float = 0.0,
) -> Iterator[Step]:
    """A rank's steps from a position on; packs go to ranks in turn."""

    def sample(position: int) -> Batch:
        return training_sample(reader, stream[position], stream.seed, one_step_share=one_step_share)

    while True:
        packed = pack_step(stream, position, packs_per_step, tokens_per_pack)
        position = packed.next_position
        yield Step(
            [collate([sample(number) for number in pack]) for pack in packed.packs[rank::world_size]],
            sum(map(len, packed.packs)),
            packed.imbalance(world_size),
            position,
        )
