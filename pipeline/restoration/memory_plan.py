"""Fitting a restoration into a given memory: the autoencoder's slices and bands, chunk length, offloading.

The longest chunks are tried first, since they decide how steady the picture is. For each length the order is:
weights that stay on the device, weights that move there and back with each chunk, then the memory of the
autoencoder's convolutions on the host too, from where it moves with each slice; and within these the
autoencoder's fastest slices and bands. Only the length of the chunks changes the picture.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from model.preprocess import SIDE_MULTIPLE
from model.vae import budget
from pipeline.store.schema import PATCH, SPATIAL_FACTOR, TEMPORAL_FACTOR

VALUES_PER_HIDDEN = 5.5
"""The transformer's activations alive at once, in values per token and unit of its MLP's hidden width. The
growth of the process was 5.0 to 5.4 of them on the CPU in fp32, widths 128 to 384, 6000 to 22000 tokens."""
_USABLE_SHARE = 0.85
"""Share of the free memory found; the rest is for the allocator and for the file's decoder."""
KEPT_OFF = ((False, False), (True, False), (True, True))
"""What is kept off the device (idle networks, the autoencoder's memory of past frames), cheapest first: the
former move once per chunk, the latter with every slice."""
_PIXEL_COPIES = 6
"""fp32 copies of a slice's frames while colours are corrected."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """A restoration's plan for its memory, with the expected peak."""

    chunk_frames: int
    overlap_frames: int
    slice_frames: int
    band_pixels: int | None
    offload: bool
    tails_on_host: bool
    expected_gib: float
    """on the device"""
    host_gib: float
    """in the host's memory, of what is kept there instead"""

    def describe(self) -> str:
        """The plan in one readable line."""
        bands = "whole frames" if self.band_pixels is None else f"bands of {self.band_pixels} pixels"
        moved = ", networks moved off the device when not in use" if self.offload else ""
        moved += ", its memory of past frames on the host" if self.tails_on_host else ""
        host = f", {self.host_gib:.2f} GiB of the host's" if self.host_gib else ""
        return (
            f"chunks of {self.chunk_frames} frames, {self.overlap_frames} shared; autoencoder: slices of "
            f"{self.slice_frames} frames, {bands}{moved}; expected peak {self.expected_gib:.2f} GiB{host}"
        )


@dataclasses.dataclass(frozen=True)
class Models:
    """Facts about the networks that a plan depends on."""

    vae: Any  # AutoencoderConfig, hashable
    vae_bytes: int
    dit_bytes: int
    dit_hidden: int
    """widest MLP layer of the transformer"""
    bytes_per_value: int
    device: str

    @classmethod
    def of(cls, vae: Any, dit: nn.Module, device: torch.device) -> "Models":
        """Of loaded networks."""
        hidden = max((m.in_features for m in dit.modules() if isinstance(m, nn.Linear)), default=1)
        size = next(vae.parameters()).element_size()
        return cls(vae.config, _weight_bytes(vae), _weight_bytes(dit), hidden, size, device.type)


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def free_gib(device: str, processes: int) -> float:
    """Memory in GiB that each of `processes` on this machine may use.

    It is the device's memory or, for the CPU, that of the machine or container.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] * _USABLE_SHARE / 2**30
    free = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no such limit
        pass
    return free * _USABLE_SHARE / processes / 2**30


def plans(
    models: Models, size: tuple[int, int], chunk_frames: int, overlap_frames: int, slice_frames: int
) -> Iterator[MemoryPlan]:
    """All plans for a result of (height, width) pixels, the preferred one first.

    The requested chunks and slices are the largest ones tried.
    """
    height, width = (side + -side % SIDE_MULTIPLE for side in size)
    slices = [(slice_frames, None), *[choice for choice in budget.CHOICES if choice[0] < slice_frames]]
    slices += [choice for choice in budget.CHOICES if choice[0] >= slice_frames and choice[1] is not None]
    longest = (chunk_frames - 1) // TEMPORAL_FACTOR
    for latents in sorted({longest, *(length for length in (5, 3, 2, 1) if length < longest)}, reverse=True):
        overlap = overlap_frames
        if latents < longest:
            overlap = min(overlap, max(1, latents // 2) * TEMPORAL_FACTOR)
        for kept_off in KEPT_OFF if models.device == "cuda" else KEPT_OFF[:1]:
            for frames, band in slices:
                expected = _expected_bytes(models, (height, width), latents + 1, frames, band, kept_off)
                host = _host_bytes(models, (height, width), kept_off)
                chunk = latents * TEMPORAL_FACTOR + 1
                yield MemoryPlan(chunk, overlap, frames, band, *kept_off, expected / 2**30, host / 2**30)


def _tail_bytes(models: Models, size: tuple[int, int]) -> int:
    """What the convolutions of both streams remember, all the time."""
    return budget.cache_values(models.vae, *size) * models.bytes_per_value


def _host_bytes(models: Models, size: tuple[int, int], kept_off: tuple[bool, bool]) -> int:
    offload, tails_on_host = kept_off
    weights = max(models.vae_bytes, models.dit_bytes) if offload else 0
    return weights + (_tail_bytes(models, size) if tails_on_host else 0)


def _expected_bytes(
    models: Models,
    size: tuple[int, int],
    latents: int,
    frames: int,
    band: int | None,
    kept_off: tuple[bool, bool],
) -> float:
    (height, width), (offload, tails_on_host) = size, kept_off
    value = models.bytes_per_value
    tails = 0 if tails_on_host else _tail_bytes(models, size)
    vae_work = budget.working_values(models.vae, height, width, frames, band, tails_on_host) * value
    tokens = latents * (height // (SPATIAL_FACTOR * PATCH)) * (width // (SPATIAL_FACTOR * PATCH))
    dit_work = tokens * models.dit_hidden * VALUES_PER_HIDDEN * value
    pixels = (frames + 1) * height * width * 3 * 4 * _PIXEL_COPIES
    if offload:
        return tails + max(models.vae_bytes + max(vae_work, pixels), models.dit_bytes + dit_work)
    return tails + models.vae_bytes + models.dit_bytes + max(vae_work, dit_work, pixels)


def plan_memory(candidates: list[MemoryPlan], budget_gib: float) -> MemoryPlan:
    """The first plan within the budget; the smallest if none is."""
    fitting = (plan for plan in candidates if plan.expected_gib <= budget_gib)
    return next(fitting, min(candidates, key=lambda plan: plan.expected_gib))


def step_down(candidates: list[MemoryPlan], plan: MemoryPlan, part: str) -> MemoryPlan | None:
    """The next smaller plan after `part` of the work ran out of memory; None if there is none.

    The transformer gets room by offloading the other network, then by shorter chunks; everything else by
    shorter slices and narrower bands, then by offloading.
    """

    def of_autoencoder(one: MemoryPlan) -> tuple[int, int | None]:
        return one.slice_frames, one.band_pixels

    later = candidates[candidates.index(plan) + 1 :]
    if part == "transformer":
        return next((one for one in later if of_autoencoder(one) == of_autoencoder(plan)), None)
    return next((one for one in later if one.chunk_frames == plan.chunk_frames), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
