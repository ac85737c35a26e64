"""The noise that sampling starts from, frame by frame; restoration and validation share it."""

import torch
from torch import Tensor

from pipeline.store.hashing import stable_hash


def frame_noise(seed: int, purpose: str, start: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (t, H', W', C) on the CPU for latent frames `start`, `start` + 1, ...

    Each frame's noise depends on the seed, the purpose and the frame's number alone: the same in every
    chunk and on every machine.
    """
    frames = [
        torch.randn(
            shape[1:], generator=torch.Generator().manual_seed(stable_hash(seed, purpose, start + index))
        )
        for index in range(shape[0])
    ]
    return torch.stack(frames)
