"""Tensors in Parquet columns: raw little-endian bf16 bytes next to a `_shape` list (PyArrow has no bf16)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_columns(name: str, tensor: Tensor) -> dict[str, Any]:
    """{name: bytes, name_shape: list} of a tensor, rounded to bf16 in its own axis order."""
    words = tensor.detach().cpu().contiguous().to(torch.bfloat16).view(torch.int16).numpy()
    return {name: words.astype("<i2").tobytes(), f"{name}_shape": list(tensor.shape)}


def from_columns(row: dict[str, Any], name: str) -> Tensor:
    """The float32 tensor of a row's column; ValueError if bytes and shape disagree."""
    shape, data = row[f"{name}_shape"], row[name]
    if len(data) != 2 * int(np.prod(shape)):
        raise ValueError(f"column {name}: {len(data)} bytes do not make a bf16 tensor of shape {shape}")
    words = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16))
    return words.view(torch.bfloat16).float().reshape(tuple(shape))
