"""The moving average of a network's weights, which is the result of a training."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.training.state.deepspeed_adapter import fragments, whole_shape


class MovingAverage:
    """fp32 moving average of an engine's weights; each rank keeps that of its own fragments."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.fragments = fragments(engine)
        self.own = [fragment.master.clone() for fragment in self.fragments]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for own, fragment in zip(self.own, self.fragments, strict=True):
            own.lerp_(fragment.master, 1 - decay)

    @torch.no_grad()
    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's average, on every rank, one after another."""
        pairs = zip(self.fragments, self.own, strict=True)
        own = {fragment.name: (fragment, kept) for fragment, kept in pairs}
        for name, parameter in self.engine.module.named_parameters():
            whole = torch.zeros(whole_shape(parameter), dtype=torch.float32, device=self.engine.device)
            if name in own:
                fragment, kept = own[name]
                whole.view(-1)[fragment.start : fragment.start + fragment.numel] = kept.to(whole.device)
            dist.all_reduce(whole)  # the fragments do not overlap
            yield name, whole

    def gathered(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The whole average by the module's parameter names, on every rank and its device."""
        return {name: whole.to(dtype) for name, whole in self._whole_parameters()}

    def collected(self) -> dict[str, Tensor]:
        """The whole average in fp32 in the memory of rank 0's host; nothing on the other ranks."""
        pairs = ((name, whole.cpu()) for name, whole in self._whole_parameters())
        return {name: whole for name, whole in pairs if dist.get_rank() == 0}
