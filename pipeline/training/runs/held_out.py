"""The fixed samples, times and noises on which a transformer is measured before and after each stage."""

import dataclasses
import json
from collections.abc import Callable

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.store import hashing
from pipeline.training.samples.batch import Batch, collate, training_sample
from pipeline.training.samples.latent_reader import Reader
from pipeline.training.samples.sample_order import ScheduledSample
from pipeline.training.state import ranks


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Triples (sample, time, noise), in packs."""

    packs: list[Batch]
    triples: int
    set_hash: str
    """Hash that identifies the set."""


def held_out_set(reader: Reader, rows: pa.Table, triples: int, tokens_per_pack: int, seed: int) -> HeldOut:
    """Build the set: index rows in turn, with times at even quantiles of the training distribution."""
    quantiles = (torch.arange(triples) + 0.5) / triples
    times = (1000 * torch.sigmoid(torch.special.ndtri(quantiles))).tolist()
    ordered = rows.sort_by("sample_id").slice(0, triples).to_pylist()
    # Negative epochs draw what no training step uses.
    scheduled = [ScheduledSample(ordered[i % len(ordered)], -1 - i) for i in range(triples)]
    packs: list[list[Batch]] = [[]]
    load = 0
    for sample, timestep in zip(scheduled, times, strict=True):
        if packs[-1] and load + sample.tokens > tokens_per_pack:
            packs.append([])
            load = 0
        packs[-1].append(training_sample(reader, sample, seed, False, timestep))
        load += sample.tokens
    names = [
        (sample.row["sample_id"], sample.epoch, timestep)
        for sample, timestep in zip(scheduled, times, strict=True)
    ]
    set_hash = hashing.stable_id(json.dumps(names), seed)
    return HeldOut([collate(pack) for pack in packs], triples, set_hash)


@torch.no_grad()
def held_out_loss(
    velocity: Callable[[Batch], Tensor],
    held_out: HeldOut,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Mean over the triples of a network's loss; ranks share the packs."""
    total = torch.zeros(1, device=device)
    for pack in held_out.packs[ranks.rank() :: ranks.world_size()]:
        batch = pack.to(device, dtype)
        total += batch.sample_losses(velocity(batch)).sum()
    return float(ranks.all_reduced(total)) / held_out.triples
