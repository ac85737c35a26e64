"""Records lpips 0.1.4's distances and gradients with random weights, for a test that then needs no lpips.

Runs in the reference environment: `python tests/reference/record_lpips.py TABLES.npz OUT.json`, where
TABLES.npz holds weights and pictures as `python -m tests.model.perceptual.test_lpips TABLES.npz` (here)
writes them.
"""

import json
import sys

import lpips
import numpy as np
import torch


def main(tables_path: str, out_path: str) -> None:
    with np.load(tables_path) as file:
        tables = {name: torch.from_numpy(file[name]) for name in file.files}
    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    own = network.state_dict()
    for name, tensor in own.items():
        # net.slice2.5.weight is torchvision's features.5.weight.
        published = f"features.{'.'.join(name.split('.')[2:])}" if name.startswith("net.") else name
        if published in tables:
            tensor.copy_(tables[published])
    network = network.double()
    picture = tables["picture"].double().requires_grad_(True)
    distances = network(picture, tables["truth"].double()).flatten()
    distances.sum().backward()
    assert picture.grad is not None
    recorded = {
        "distances": distances.tolist(),
        "gradient_norms": picture.grad.flatten(1).norm(dim=1).tolist(),
    }
    with open(out_path, "w") as file:
        json.dump(recorded, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
