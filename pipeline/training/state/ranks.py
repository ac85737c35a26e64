"""Communication between ranks besides gradients. Every rank must make each of these calls."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size()


def all_reduced(value: Tensor) -> Tensor:
    """The sum over ranks of a small tensor."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def from_all(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
