"""Numbers recorded from the released code, run again through ours: one function per kind of case.

A case is a header (`case`, `config`, notes) and tensors: `state.*` weights, `in.*` inputs, `out.*`
outputs. `model.checkpoints` opens the files and prints; here is only what to run and what to compare.
To add a kind: write its function, and let `check` tell it by what the case holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.checkpoints import build_autoencoder, released_autoencoder_config

PASS_LINE = 2e-5
"""Largest absolute error allowed for the networks; the reference's own fp32 noise is 7e-6."""


@dataclass(frozen=True)
class Comparison:
    """One output against its record."""

    output: str
    error: float
    """Largest absolute difference; NaN never passes."""
    pass_line: float

    @property
    def passed(self) -> bool:
        """Whether the error is on or below the line."""
        return self.error <= self.pass_line

    def __str__(self) -> str:
        return f"{self.output:40s} {self.error:.2e}  {'ok' if self.passed else f'ABOVE {self.pass_line:.0e}'}"


def compare(output: str, ours: Tensor, recorded: Tensor, pass_line: float = PASS_LINE) -> Comparison:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        shapes = f"{tuple(ours.shape)} for {tuple(recorded.shape)}"
        return Comparison(f"{output} {shapes}", float("inf"), pass_line)
    return Comparison(output, (ours.double() - recorded.double()).abs().max().item(), pass_line)


def check(case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Iterator[Comparison]:
    """Run the case whatever its kind; ValueError if it is none that we know."""
    config = case.get("config", {})
    if "latent_channels" in config and "block_out_channels" in config:
        return check_autoencoder(case, tensors, source)
    raise ValueError(f"{source}: not a parity case of a known kind")


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


@torch.no_grad()
def check_autoencoder(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """Moments of each clip and its decoded mean, in one pass and streamed in slices of 4 and 8 frames.

    The decoder gets the recorded mean, so that its error is its own and not the encoder's made larger.
    """
    config = released_autoencoder_config(case["config"])
    autoencoder = build_autoencoder(config, part(tensors, "state"), source)
    inputs, recorded = part(tensors, "in"), part(tensors, "out")
    for clip in sorted({name.split(".")[0] for name in inputs}):
        video = inputs[f"{clip}.x"]
        recorded_mean = recorded[f"{clip}.mean"]
        mean, log_variance = autoencoder.encode(video)
        yield compare(f"{clip}.mean", mean, recorded_mean)
        yield compare(f"{clip}.logvar", log_variance, recorded[f"{clip}.logvar"])
        yield compare(f"{clip}.dec", autoencoder.decode_unscaled(recorded_mean), recorded[f"{clip}.dec"])
        for slice_frames in (4, 8):
            moments = list(autoencoder.encode_stream([video], slice_frames))
            means = torch.cat([m for m, _ in moments], dim=2)
            log_variances = torch.cat([v for _, v in moments], dim=2)
            latent = autoencoder.to_latent(recorded_mean, log_variances, noise=None)
            frames, height, width = video.shape[2:]
            decoded = autoencoder.decode_stream([latent], frames, height, width, slice_frames)
            streamed = f"slices of {slice_frames}: {clip}"
            yield compare(f"{streamed}.mean", means, recorded_mean)
            yield compare(f"{streamed}.logvar", log_variances, recorded[f"{clip}.logvar"])
            yield compare(f"{streamed}.dec", torch.cat(list(decoded), dim=2), recorded[f"{clip}.dec"])
