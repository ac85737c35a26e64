"""Records what pyiqa's MUSIQ says of seeded pictures with seeded weights, for tests that then need no pyiqa.

Runs in the reference environment: `python tests/reference/record_musiq.py tests/data/scores/musiq.npz`. The
file holds sizes and scores only: weights and pictures are drawn here and in the test from the same seeds.
"""

import re
import sys
import zlib

import numpy as np

PICTURES = (
    (40, 56, 0),
    (96, 300, 6),
    (250, 130, 3),
    (33, 481, 0),
    (224, 224, 7),
)  # height, width, bits cut off
OUTPUTS = (1, 10)
_LEADING_ONES = {"cls": 2, "position_embedding": 1}  # axes of length one that only pyiqa's tensors have


def seeded_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a parameter by its name in model/quality/musiq.py, of a size that keeps signals alive."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape).astype(np.float32)
    if re.search(r"(norm\d?|gn\w+)\.weight$", name):
        return 1 + np.float32(0.1) * values
    if len(shape) == 1 or "embedding" in name.split(".")[-1]:
        return np.float32(0.3) * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def picture(height: int, width: int, cut: int) -> np.ndarray:
    """uint8 (H, W, 3) of noise, dark and nearly flat where bits are cut off."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8) >> cut


def our_name(name: str) -> str:
    """A parameter's name in model/quality/musiq.py from the one in pyiqa 0.1.16."""
    name = name.removeprefix("transformer_encoder.")
    for theirs, ours in (
        (r"posembed_input\.position_emb", "position_embedding"),
        (r"scaleembed_input\.scale_emb", "scale_embedding"),
        (r"encoder_norm", "norm"),
        (r"transformer\.encoderblock_(\d+)\.(mlp\.)?", r"blocks.\1."),
        (r"head\.0\.", "head."),
    ):
        name = re.sub(theirs, ours, name)
    return name


def main(path: str) -> None:
    import torch
    from pyiqa.archs.musiq_arch import MUSIQ

    recorded: dict[str, np.ndarray] = {"pictures": np.array(PICTURES)}
    for outputs in OUTPUTS:
        network = MUSIQ(num_class=outputs, pretrained=False).eval()
        state = {}
        for theirs, tensor in network.state_dict().items():
            name = our_name(theirs)
            shape = tuple(tensor.shape)[_LEADING_ONES.get(name, 0) :]
            state[theirs] = torch.from_numpy(seeded_tensor(name, shape)).reshape(tensor.shape)
        network.load_state_dict(state)
        scores = []
        for size in PICTURES:
            pixels = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad():
                scores.append(network(pixels).item())
        recorded[f"scores_{outputs}"] = np.array(scores)
    np.savez_compressed(path, **recorded)


if __name__ == "__main__":
    main(sys.argv[1])
