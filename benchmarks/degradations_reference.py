"""The Real-ESRGAN chain through basicsr's own functions: the other side of benchmarks/degradations.py.

Runs in the reference environment (basicsr 1.4.2, torch), alone: `python -m
benchmarks.degradations_reference CLIP.npy DRAWN.json OUT.npz`. Takes the parameters as this project's JSON,
one value for all frames, and gives per operation the CPU seconds, and the result of each deterministic one on
its own input.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional

from benchmarks.memory import status_bytes

sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional
from basicsr.data import degradations as basicsr  # noqa: E402
from basicsr.utils import DiffJPEG, USMSharp  # noqa: E402
from basicsr.utils.img_process_util import filter2D  # noqa: E402


def kernel(packed: dict) -> torch.Tensor:
    """Padded to 21, as Real-ESRGAN's data set does."""
    size = packed["size_px"]
    kind = packed["kind"]
    sigmas = (packed["sigma_x_px"], packed["sigma_y_px"], packed["rotation_rad"])
    isotropic = not kind.endswith("aniso")
    if kind == "sinc":
        values = basicsr.circular_lowpass_kernel(packed["omega_rad"], size)
    elif kind.startswith("generalized"):
        values = basicsr.bivariate_generalized_Gaussian(size, *sigmas, packed["beta"], isotropic=isotropic)
    elif kind.startswith("plateau"):
        values = basicsr.bivariate_plateau(size, *sigmas, packed["beta"], isotropic=isotropic)
    else:
        values = basicsr.bivariate_Gaussian(size, *sigmas, isotropic=isotropic)
    values = np.pad(values, (21 - size) // 2)
    return torch.from_numpy(values.astype(np.float32))[None]


def step(packed: dict, clip: torch.Tensor, jpeg: DiffJPEG) -> torch.Tensor:
    """One operation on (T, 3, H, W) float in [0, 1], by the call that Real-ESRGAN's training makes."""
    name = packed["operation"]
    if name == "Blur":
        # one kernel a frame, as in training: 8 times faster here than basicsr's path for a shared one
        kernels = kernel(packed).repeat(clip.size(0), 1, 1)
        return filter2D(clip.contiguous(), kernels)  # it takes a view
    if name == "Resize":
        size = (packed["height_px"], packed["width_px"])
        return F.interpolate(clip, size=size, mode=packed["interpolation"])
    per_frame = clip.new_ones(clip.size(0))  # a scalar fails for grey noise on more than one frame
    if name == "GaussianNoise":
        strength, add = packed["sigma"], basicsr.add_gaussian_noise_pt
    elif name == "PoissonNoise":
        strength, add = packed["scale"], basicsr.add_poisson_noise_pt
    if name.endswith("Noise"):
        return add(clip, strength * per_frame, clip=True, gray_noise=float(packed["grey"]) * per_frame)
    assert name == "Jpeg", name
    quality = clip.new_full((clip.size(0),), packed["quality"])
    return jpeg(torch.clamp(clip, 0, 1), quality=quality)


def main(clip_path: str, drawn_path: str, out_path: str) -> None:
    torch.set_num_threads(1)
    pixels = np.load(clip_path)
    with open(drawn_path) as file:
        drawn = json.load(file)
    jpeg = DiffJPEG(differentiable=False)
    seconds: list[float] = []
    shares: dict[str, float] = {}
    with torch.no_grad():
        for degradation in drawn["chains"]:
            start = time.process_time()
            clip = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
            for packed in degradation["operations"]:
                since = time.process_time()
                clip = step(packed, clip, jpeg)
                name = packed["operation"]
                shares[name] = shares.get(name, 0.0) + time.process_time() - since
            clip = torch.clamp((clip * 255).round(), 0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            clip.contiguous().numpy()
            seconds.append(time.process_time() - start)
        peak = status_bytes("VmHWM")
        single = torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2).contiguous().float() / 255
        results: dict[str, Any] = {}
        for index, packed in enumerate(drawn["single"]):
            sharpen = packed["operation"] == "UnsharpMask"
            done = USMSharp()(single) if sharpen else step(packed, single, jpeg)
            results[f"r{index}"] = done[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
    report = {"seconds": seconds, "shares": shares, "peak_bytes": peak}
    np.savez(out_path, report=json.dumps(report), **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
