"""Records the distances of DISTS_pytorch 0.1's network with random weights, for a test that then needs none.

Runs in the reference environment, at the root of the project:
`PYTHONPATH=. .reference/bin/python tests/reference/record_dists.py tests/data/scores/dists.json`. The package
loads its backbone from the network; here a torchvision VGG16 with random weights takes its place.
"""

import json
import sys
from typing import Any

import numpy as np

from tests.reference.random_vgg16 import random_vgg16

HEADS = 3 + 64 + 128 + 256 + 512 + 512


def random_tables() -> dict[str, np.ndarray]:
    """Weights of VGG16 and of DISTS under their published names, and pictures in 0 to 1, from a seed."""
    generator = np.random.default_rng(11)
    tables = random_vgg16(generator)
    for name in ("alpha", "beta"):
        tables[name] = generator.random((1, HEADS, 1, 1))
    tables["truth"] = generator.random((2, 3, 48, 64))
    tables["picture"] = np.clip(tables["truth"] + generator.normal(0, 0.2, (2, 3, 48, 64)), 0, 1)
    return {name: table.astype(np.float32) for name, table in tables.items()}


def main(path: str) -> None:
    import torch
    from DISTS_pytorch import DISTS
    from torchvision import models

    tables = {name: torch.from_numpy(table) for name, table in random_tables().items()}
    vgg16: Any = models.vgg16
    vgg = vgg16(weights=None)
    vgg.load_state_dict({k: v for k, v in tables.items() if k.startswith("features.")}, strict=False)
    models.vgg16 = lambda *_, **__: vgg
    network = DISTS(load_weights=False).eval()
    network.alpha.data, network.beta.data = tables["alpha"], tables["beta"]
    picture, truth = tables["picture"], tables["truth"]
    with torch.no_grad():
        recorded = {
            "distances": network(picture, truth).tolist(),
            "odd": network(picture[..., :41, :57], truth[..., :41, :57]).tolist(),
        }
    with open(path, "w") as file:
        json.dump(recorded, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
