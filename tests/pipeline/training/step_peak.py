"""Peak memory of a training step's activations in bytes: kept or recomputed."""

import ctypes
import dataclasses
import sys

import torch

from benchmarks.memory import reset_peak, status_bytes
from model.dit.packing import packing_plan, patch_grids
from model.dit.rotary import window_rotation
from model.dit.swin_mmdit import SD3_MEDIUM, SwinMMDiT

CHANGES = {"num_layers": 4, "num_heads": 4, "text_dim": 64, "pooled_dim": 64}
"""What sets the network apart from the paper's."""
SHAPES, TEXTS = [(6, 24, 48), (1, 64, 64), (3, 32, 48)], [58, 100, 154]

if __name__ == "__main__":
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # freed memory goes back, so the peak is that of the tensors
    torch.set_num_threads(1)
    config = dataclasses.replace(SD3_MEDIUM, **CHANGES)
    model = SwinMMDiT(config)
    if sys.argv[1] == "recomputed":
        model.checkpoint_activations(range(4))
    video = torch.randn(sum(t * h * w for t, h, w in SHAPES), 33)
    text, pooled = torch.randn(sum(TEXTS), 64), torch.randn(3, 64)
    # A small step first: torch imports 160 MB of libraries at its first checkpoint; the gradients stay, too.
    model(video[:16], text[:2], [(1, 4, 4)], [2], torch.full((1,), 500.0), pooled[:1]).sum().backward()
    tables = packing_plan(model.layers, patch_grids(SHAPES, config.patch), TEXTS, torch.device("cpu"))
    for layout in set(tables.layouts):
        window_rotation(layout, config.head_dim)
    libc.malloc_trim(0)
    before = reset_peak()
    model(video, text, SHAPES, TEXTS, torch.full((3,), 500.0), pooled).square().mean().backward()
    print(status_bytes("VmHWM") - before)
