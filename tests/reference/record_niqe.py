"""Records basicsr 1.4.2's NIQE of 20 frames, for a test that then needs no basicsr.

Runs in the reference environment: `python tests/reference/record_niqe.py FRAMES.npz OUT.json`, where
FRAMES.npz holds uint8 RGB frames frame_00, frame_01, ... as `tests/pipeline/metrics/test_niqe.py` makes them
(`python tests/pipeline/metrics/test_niqe.py FRAMES.npz`).
"""

import json
import sys
import time
import types

import numpy as np
import scipy.ndimage
import torchvision.transforms.functional

# Modules that newer scipy and torchvision have moved.
filters = types.ModuleType("scipy.ndimage.filters")
vars(filters)["convolve"] = scipy.ndimage.convolve
sys.modules.setdefault("scipy.ndimage.filters", filters)
sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional
from basicsr.metrics.niqe import calculate_niqe  # noqa: E402


def main(frames_path: str, out_path: str) -> None:
    values = {}
    start = time.monotonic()
    with np.load(frames_path) as frames:
        for name in sorted(frames.files):
            values[name] = calculate_niqe(frames[name][:, :, ::-1], crop_border=0)
    print(f"{(time.monotonic() - start) / len(values):.2f} s a frame")
    with open(out_path, "w") as file:
        json.dump(values, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
