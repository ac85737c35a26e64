"""VGG16's convolutions with random weights, for comparisons with packages whose networks stand on them."""

import numpy as np

_INPUTS = {0: 3, 2: 64, 5: 64, 7: 128, 10: 128, 12: 256, 14: 256, 17: 256, 19: 512, 21: 512}
_INPUTS |= {24: 512, 26: 512, 28: 512}
_OUTPUTS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}


def random_vgg16(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights and biases under torchvision's names, fp64."""
    tables = {}
    for layer, inputs in _INPUTS.items():
        shape = (_OUTPUTS.get(layer, 512), inputs, 3, 3)
        tables[f"features.{layer}.weight"] = generator.normal(0, (2 / (9 * inputs)) ** 0.5, shape)
        tables[f"features.{layer}.bias"] = generator.normal(0, 0.1, shape[0])
    return tables
