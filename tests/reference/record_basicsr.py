"""Records what basicsr 1.4.2 computes, for tests that then need no basicsr.

Runs in the reference environment:
`python tests/reference/record_basicsr.py tests/data/degradations/basicsr.npz`. It holds 200 random
draws of kernel parameters with basicsr's kernels, one small image through its unsharp mask and its
JPEG, and moments of its noises over many draws.
"""

import sys
from typing import Any

import numpy as np
import skimage.data
import torch
import torchvision.transforms.functional

sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional
from basicsr.data import degradations as basicsr  # noqa: E402
from basicsr.utils import DiffJPEG  # noqa: E402
from basicsr.utils.img_process_util import usm_sharp  # noqa: E402

KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc")


def kernels(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`parameters` (200, 7): kind, size, sigma x, sigma y, rotation, beta, omega; `kernels` (200, 21, 21)
    padded with zeros."""
    parameters, out = [], []
    for draw in range(200):
        kind, size = draw % len(KINDS), int(rng.choice(np.arange(7, 22, 2)))
        sigma_x, sigma_y = rng.uniform(0.2, 3, 2)
        rotation, omega = rng.uniform(-np.pi, np.pi), rng.uniform(np.pi / 5, np.pi)
        name = KINDS[kind]
        beta = rng.uniform(0.5, 4) if name.startswith("generalized") else rng.uniform(1, 2)
        isotropic = not name.endswith("aniso")
        if name == "sinc":
            kernel = basicsr.circular_lowpass_kernel(omega, size)
        elif name.startswith("generalized"):
            kernel = basicsr.bivariate_generalized_Gaussian(
                size, sigma_x, sigma_y, rotation, beta, isotropic=isotropic
            )
        elif name.startswith("plateau"):
            kernel = basicsr.bivariate_plateau(size, sigma_x, sigma_y, rotation, beta, isotropic=isotropic)
        else:
            kernel = basicsr.bivariate_Gaussian(size, sigma_x, sigma_y, rotation, isotropic=isotropic)
        parameters.append((kind, size, sigma_x, sigma_y, rotation, beta, omega))
        out.append(np.pad(kernel, (21 - size) // 2))
    return {"parameters": np.array(parameters), "kernels": np.array(out, np.float32)}


def picture() -> np.ndarray:
    """(96, 128, 3) uint8 of a photograph: hair, skin, cloth, edges."""
    return skimage.data.astronaut()[60:156, 150:278]


def noise_moments(level: int, vals_image: np.ndarray) -> list[float]:
    """Mean, variance (of 255) and correlation of channels of basicsr's Poisson noise, scale 1, at one level.

    `vals_image` (H, W, 3) uint8 has that level all over but for the pixels that set the count of levels.
    """
    image = torch.from_numpy(vals_image).permute(2, 0, 1)[None].float() / 255
    row = []
    for grey in (0.0, 1.0):
        noise = basicsr.generate_poisson_noise_pt(image, 1.0, grey)[0].numpy() * 255
        at = noise[:, (vals_image == level).all(axis=-1)]
        row += [at.mean(), at.var(), np.corrcoef(at)[0, 1]]
    return row


def main(path: str) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    recorded: dict[str, Any] = dict(kernels(rng))
    image = picture()
    recorded["image"] = image
    recorded["sharpened"] = (usm_sharp(image.astype(np.float32) / 255) * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    jpeg = DiffJPEG(differentiable=False)
    qualities = (30, 60, 95)
    with torch.no_grad():
        done = [jpeg(tensor, quality=torch.tensor([float(quality)]))[0] for quality in qualities]
    recorded["jpeg_qualities"] = np.array(qualities)
    recorded["jpeg"] = np.stack(
        [(one.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8) for one in done]
    )
    levels, moments = (20, 90, 200), []
    for level in levels:
        flat = np.full((600, 600, 3), level, np.uint8)
        flat[0, :100] = np.arange(100)[:, None] * 2 + 1  # 100 or 101 levels: 128 when rounded up
        moments.append(noise_moments(level, flat))
    recorded["poisson_levels"], recorded["poisson_moments"] = np.array(levels), np.array(moments)
    np.savez_compressed(path, **recorded)


if __name__ == "__main__":
    main(sys.argv[1])
