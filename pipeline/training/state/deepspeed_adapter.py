"""Everything read or changed in DeepSpeed beyond its public interface, for the versions named here only.

ZeRO 1 and 2 cut all parameters, laid end to end, into one piece per rank; ZeRO 3 cuts each parameter. Here
both are runs of values of named parameters, so that averages and checkpoints depend on neither the stage nor
the number of ranks. DeepSpeed has no public way to them for all stages, nor one to drop a step by its
gradient norm.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from packaging.specifiers import SpecifierSet
from torch import Tensor

TESTED_VERSIONS = ">=0.19.8,<0.20"
"""Versions of DeepSpeed, as in pyproject.toml."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_version() -> None:
    """Raise ValueError if the installed DeepSpeed is not a version that this file was tested with."""
    installed = importlib.metadata.version("deepspeed")
    if installed not in SpecifierSet(TESTED_VERSIONS):
        raise ValueError(
            f"deepspeed: version {installed} is installed, and training reads internals of "
            f"deepspeed{TESTED_VERSIONS} alone; pip install 'deepspeed{TESTED_VERSIONS}'"
        )


def join_ranks(backend: str) -> None:
    """DeepSpeed's communication over torch's process group; call it before an engine is made."""
    import deepspeed  # slow to import, and only workers need it

    # Its shared-memory all-reduce takes 90 s to compile at the first start; gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def screen_steps(engine: Any, accepts: Callable[[float], bool]) -> None:
    """Have `accepts` decide on every optimiser step by the gradients' global norm.

    The norm is infinite if it is not finite. A step that is refused changes nothing. All ranks see the same
    norm.
    """
    optimiser = engine.optimizer
    name = "_get_norm_groups" if engine.zero_optimization_stage() == 3 else "scaled_global_norm"
    measure = getattr(optimiser, name)

    def screened() -> Tensor | list[Tensor]:
        norms = measure()  # ZeRO 3: of each part
        parts = [float(norm) for norm in (norms if isinstance(norms, list) else [norms])]
        finite = all(math.isfinite(part) and part >= 0 for part in parts)
        if accepts(math.hypot(*parts) if finite else math.inf):
            return norms
        # DeepSpeed drops a step whose gradient norm is negative.
        if isinstance(norms, list):
            return [torch.full_like(part, -1.0) for part in norms]
        return torch.full_like(norms, -1.0)

    setattr(optimiser, name, screened)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Of a module's parameter, of which ZeRO 3 leaves nothing in it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# -- what a rank keeps in fp32 --------------------------------------------------------------------------


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
    """After the masters have been filled, set the module's weights from them on all ranks."""
    optimiser = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimiser.update_lp_params()
        return
    optimiser._partition_all_parameters()
    for group in range(len(optimiser.fp32_partitioned_groups_flat)):
        optimiser._reassign_or_swap_out_partitioned_parameters(group)
    if optimiser.persistent_parameters:
        optimiser.persistent_parameters[0].all_gather(optimiser.persistent_parameters)
