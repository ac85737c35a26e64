"""The released SeedVR-3B on this machine: its speed at true width, and the memory that loading it takes.

    python -m benchmarks.released                   (about 15 minutes on 2 cores; nothing else should run)
    python -m benchmarks.released --only forward    (or load; load needs 14 GB of disk and 16 GB of memory)

Random weights: only shapes matter here. Prints tables and writes out/bench/released.json:

forward_peak_share  FLOP/s of a forward of 4 layers (two with weights of their own for text
                    and video, two that share them, at the 3B's width, fp32) on 5 latent frames of 720p, over
                    those of the layer's largest matrix products timed just before and after it
load                for a file of the 3B's full shapes in fp16, .safetensors and .pth: peak memory of a fresh
                    process over the file's size with the dtype kept (bar 1.3), and over 1.1 times the cast
                    network plus the file's largest tensor where it is cast (bar 1)
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.attention import rounded, share_of_product_rate
from model import checkpoints
from model.dit.nadit import SEEDVR_3B, NaDiT, NaDiTConfig
from model.dit.nadit_layers import swiglu_width
from model.dit.windows import Grid
from model.flops import forward_flops

OUT = Path("out/bench/released.json")
LATENT: Grid = (5, 90, 160)
"""17 frames at 720p."""
TEXT = 58
"""Tokens of the released positive prompt."""
SLICE = dataclasses.replace(SEEDVR_3B, num_layers=4, separate_layers=2)


def forward() -> dict[str, Any]:
    """Speed of the slice."""
    torch.manual_seed(0)
    model = NaDiT(SLICE).requires_grad_(False).eval()
    rows = LATENT[0] * LATENT[1] * LATENT[2]
    video, text = torch.randn(rows, SLICE.in_channels), torch.randn(TEXT, SLICE.text_dim)
    flops = forward_flops(SLICE, LATENT, TEXT)
    counted = flops.total - flops.conditioning  # the tokens' products; what is per sample is next to nothing

    def call() -> Tensor:
        return model(video, text, [LATENT], [TEXT], torch.tensor([500.0]))

    call()  # the packing tables are made once per shape
    width, hidden = SLICE.width, swiglu_width(SLICE.width, SLICE.mlp_ratio)
    share, rates = share_of_product_rate(call, counted, repeats=3, width=width, hidden=hidden)
    result = {
        "forward_peak_share": share,
        "forward_tflop": counted / 1e12,
        "tokens": rows // 4,
        "product_gflops_lowest": min(rates) / 1e9,
        "product_gflops_highest": max(rates) / 1e9,
    }
    print(f"forward: {rounded(result)}")
    return result


# --- loading ---

# The kernel's VmHWM is of this program alone; ru_maxrss begins with what the parent process had.
_LOAD = """
import json, re, sys, torch
from model import checkpoints
from model.dit import nadit
def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
path, dtype, shape = sys.argv[1:]
config = checkpoints.config_from_header(nadit.NaDiTConfig, json.loads(shape), path)
with torch.device("meta"):
    nadit.NaDiT(config)  # torch imports 160 MB of libraries at its first empty network
before = peak_bytes()
model = checkpoints.load_nadit(path, config, getattr(torch, dtype) if dtype != "keep" else None)
for parameter in model.parameters():
    parameter.view(-1)[:: 4096 // parameter.element_size()].sum()  # every page is touched
print(json.dumps([peak_bytes() - before, sum(p.nbytes for p in model.parameters())]))
"""


def load_peak(path: Path, config: NaDiTConfig, dtype: str = "keep") -> tuple[int, int]:
    """(peak bytes above the imports, bytes of the loaded network) of loading in a process of its own."""
    shape = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-c", _LOAD, str(path), dtype, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = json.loads(done.stdout)
    return peak, size


def write_random(path: Path, config: NaDiTConfig, dtype: torch.dtype) -> int:
    """A file with a model's full shapes and random values; returns its largest tensor's bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in NaDiT(config).state_dict().items()}
    torch.manual_seed(0)
    state = {name: torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02) for name, shape in shapes.items()}
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        checkpoints.write_tensors(path, state, {})
    return max(tensor.nbytes for tensor in state.values())


def load() -> dict[str, Any]:
    """Peak memory of loading, for both formats, kept and cast."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("safetensors", "pth"):
            path = Path(folder, f"seedvr_3b.{ending}")
            largest = write_random(path, SEEDVR_3B, torch.float16)
            for dtype in ("keep", "bfloat16", "float32"):
                if dtype == "float32" and psutil.virtual_memory().available < 16e9:
                    print("load: float32 passed over, it needs 16 GB of free memory")
                    continue
                peak, size = load_peak(path, SEEDVR_3B, dtype)
                bar = 1.3 * path.stat().st_size if dtype == "keep" else 1.1 * size + largest
                rows.append({
                    "format": ending, "dtype": dtype, "file_gb": path.stat().st_size / 1e9,
                    "network_gb": size / 1e9, "peak_gb": peak / 1e9, "peak_over_network": peak / size,
                    "peak_over_bar": peak / bar,
                })  # fmt: skip
                print(f"load: {rounded(rows[-1])}")
            path.unlink()
    return {"load": rows, "load_worst_over_bar": max(row["peak_over_bar"] for row in rows)}


def main() -> None:
    parts = {"forward": forward, "load": load}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=parts, help="one part; the other keeps its last recorded numbers")
    only = parser.parse_args().only
    torch.set_num_threads(os.cpu_count() or 1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    result |= {"latent": LATENT, "text_tokens": TEXT, "threads": torch.get_num_threads()}
    for name, part in parts.items():
        if only in (None, name):
            result |= part() | {f"load_before_{name}": os.getloadavg()[0]}
            OUT.parent.mkdir(parents=True, exist_ok=True)
            OUT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
