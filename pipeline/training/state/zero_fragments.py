"""What a rank keeps of a training in fp32: its fragments of the weights, Adam's moments, the moving average.

ZeRO 1 and 2 cut all parameters, laid end to end, into one piece a rank; ZeRO 3 cuts each parameter. Here
both are runs of values of named parameters, so that averages and checkpoints know no stage and no number
of ranks. DeepSpeed has no public way to them for all stages: this file alone reads its optimisers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A run of one parameter's values, of which this rank keeps the fp32 master and the moments."""

    name: str
    """of the parameter in the engine's module"""
    shape: tuple[int, ...]
    """of the whole parameter"""
    start: int
    """its first value's place in the flattened parameter"""
    flat: Tensor
    """the fp32 tensor that the optimiser updates; the fragment is a part of it"""
    offset: int
    """its first value's place in `flat`"""
    numel: int

    @property
    def master(self) -> Tensor:
        """A view, (numel,)."""
        return self.flat.detach().narrow(0, self.offset, self.numel)

    def moment(self, engine: Any, key: str) -> Tensor | None:
        """A view of one of Adam's moments, (numel,); None before the first step."""
        state = engine.optimizer.optimizer.state.get(self.flat)
        return state[key].narrow(0, self.offset, self.numel) if state else None


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank keeps, in the order of the module's parameters."""
    sharded = engine.zero_optimization_stage() == 3
    return list(_fragments_of_3(engine) if sharded else _fragments_of_1_2(engine))


def _fragments_of_1_2(engine: Any) -> Iterator[Fragment]:
    for name, parameter in engine.module.named_parameters():
        kept = parameter._hp_mapping
        if kept is not None:  # else other ranks keep all of it
            flat = engine.optimizer.single_partition_of_fp32_groups[kept.param_group_index]
            inner, outer = kept.hp_fragment_address, kept.lp_fragment_address
            shape = tuple(parameter.shape)
            yield Fragment(name, shape, outer.start, flat, inner.start, inner.numel)


def _fragments_of_3(engine: Any) -> Iterator[Fragment]:
    optimiser = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        group, offset, _ = optimiser.grad_position[optimiser.get_param_id(parameter)]
        share = parameter.ds_tensor.ds_numel  # the last rank's is padded
        start = share * dist.get_rank()
        numel = min(share, parameter.ds_numel - start)
        if numel > 0:
            flat = optimiser.fp32_partitioned_groups_flat[group]
            yield Fragment(name, tuple(parameter.ds_shape), start, flat, offset, numel)


def optimiser_step(engine: Any) -> int:
    """Optimiser steps done, without skipped ones."""
    steps = [int(state["step"]) for state in engine.optimizer.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def prepare_moments(engine: Any, step: int) -> None:
    """Zero moments, as after `step` steps, for each tensor that the optimiser updates; to be filled."""
    optimiser = engine.optimizer.optimizer
    for fragment in fragments(engine):
        state = optimiser.state[fragment.flat]
        if not state:
            state |= {key: torch.zeros_like(fragment.flat.detach()) for key in MOMENTS}
        state["step"] = torch.tensor(float(step))


@torch.no_grad()
def spread_masters(engine: Any) -> None:
    """After the masters were filled: the module's weights, on all ranks, from them."""
    optimiser = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimiser.update_lp_params()
        return
    optimiser._partition_all_parameters()
    for group in range(len(optimiser.fp32_partitioned_groups_flat)):
        optimiser._reassign_or_swap_out_partitioned_parameters(group)
    if optimiser.persistent_parameters:
        optimiser.persistent_parameters[0].all_gather(optimiser.persistent_parameters)


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
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.zeros(shape, dtype=torch.float32, device=self.engine.device)
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
