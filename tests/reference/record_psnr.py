"""Records basicsr 1.4.2's PSNR and SSIM, in RGB and on luma, for a test that then needs no basicsr.

Runs in the reference environment, at the root of the project:
`PYTHONPATH=. .reference/bin/python tests/reference/record_psnr.py tests/data/scores/psnr.json`.
"""

import json
import sys

import numpy as np

SIZES = ((48, 64), (37, 53), (120, 90))
BORDERS = (0, 4)


def frame_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 (H, W, 3) RGB frames: waves and edges; the same blurred, noisy, lighter."""
    rng = np.random.default_rng([height, width])
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / 5 + channel) * np.cos(y / (7 + channel)) for channel in range(3)]
    truth = np.stack(waves, axis=-1) + 30 * ((x // 8 + y // 8) % 2)[..., None]
    blurred = (truth + np.roll(truth, 1, axis=0) + np.roll(truth, 1, axis=1)) / 3
    other = blurred + rng.normal(2, 9, truth.shape)
    return np.clip(other, 0, 255).round().astype(np.uint8), np.clip(truth, 0, 255).round().astype(np.uint8)


def main(path: str) -> None:
    import torchvision.transforms.functional

    # A module that newer torchvision has moved.
    sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional
    from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim

    recorded = {}
    for height, width in SIZES:
        for border in BORDERS:
            left, right = (frame[..., ::-1] for frame in frame_pair(height, width))  # basicsr's are BGR
            recorded[f"{height}x{width}, border {border}"] = {
                f"{name}_{colours}": float(measure(left, right, border, test_y_channel=colours == "y"))
                for name, measure in (("psnr", calculate_psnr), ("ssim", calculate_ssim))
                for colours in ("rgb", "y")
            }
    with open(path, "w") as file:
        json.dump(recorded, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
