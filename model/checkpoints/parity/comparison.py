"""A recorded case, and one of its outputs against ours: the largest error, and what is allowed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PASS_LINE = 2e-5
"""Largest absolute error allowed for the networks; the reference's own fp32 noise is 7e-6."""
RELATIVE_PASS_LINE = 1e-5
"""Allowed for single numbers, relative to max(1, |recorded|)."""


@dataclass(frozen=True)
class Case:
    """What one file of recorded numbers holds."""

    header: Mapping[str, Any]
    """Configuration and single numbers."""
    tensors: Mapping[str, Tensor]
    """Weights (`state.*`), inputs and outputs by name; empty for a file of JSON."""
    source: str
    """The file, for messages."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without it."""
        start = f"{prefix}."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


@dataclass(frozen=True)
class Comparison:
    """One output against its record."""

    output: str
    error: float
    """Largest absolute difference; NaN never passes."""
    pass_line: float

    @property
    def passed(self) -> bool:
        """Whether the error is at most the limit."""
        return self.error <= self.pass_line

    def __str__(self) -> str:
        return f"{self.output:40s} {self.error:.2e}  {'ok' if self.passed else f'ABOVE {self.pass_line:.0e}'}"


def compare(output: str, ours: Tensor, recorded: Tensor, pass_line: float = PASS_LINE) -> Comparison:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        shapes = f"{tuple(ours.shape)} for {tuple(recorded.shape)}"
        return Comparison(f"{output} {shapes}", float("inf"), pass_line)
    return Comparison(output, (ours.double() - recorded.double()).abs().max().item(), pass_line)


def relative(output: str, ours: Any, recorded: Any) -> Comparison:
    """For numbers of any size: the largest |a - b| / max(1, |b|), to pass at 1e-5."""
    ours, recorded = (torch.as_tensor(x).double().flatten() for x in (ours, recorded))
    if ours.shape != recorded.shape:
        return Comparison(f"{output} {len(ours)} for {len(recorded)}", float("inf"), RELATIVE_PASS_LINE)
    error = ((ours - recorded).abs() / recorded.abs().clamp(min=1)).max().item()
    return Comparison(output, error, RELATIVE_PASS_LINE)


def exact(output: str, ours: Any, recorded: Any) -> Comparison:
    """Equal or not: an error of 0 or infinite."""
    return Comparison(output, 0.0 if ours == recorded else float("inf"), 0.0)
