"""Peak memory of making a model over its parameters' bytes: [SD3.safetensors].

With a file, of loading it too.
"""

import sys
from dataclasses import replace

import torch

from benchmarks.memory import reset_peak, status_bytes
from model.checkpoints import load_sd3_transformer
from model.dit.swin_mmdit import SD3_MEDIUM, TINY, SwinMMDiT

CONFIG = replace(SD3_MEDIUM, num_layers=3, num_heads=12)

if __name__ == "__main__":
    SwinMMDiT.create(TINY, "cpu", torch.float32)  # what a first call loads for good
    before = reset_peak()
    model = SwinMMDiT.create(CONFIG, "cpu", torch.float32)
    if len(sys.argv) > 1:
        load_sd3_transformer(model, sys.argv[1])
    print((status_bytes("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
