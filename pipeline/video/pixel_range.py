"""Conversion between 8-bit pixels and the values in [-1, 1] that autoencoders work with."""

import numpy as np
import torch
from torch import Tensor


def to_network(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (T, H, W, 3) -> float (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames.copy()).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_pixels(video: Tensor) -> np.ndarray:
    """(1, 3, T, H, W) in about [-1, 1] -> uint8 (T, H, W, 3)."""
    pixels = ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()
