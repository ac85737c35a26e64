"""Random weights of the scorers' networks, in the forms in which they are published."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

from model.quality.musiq import PUBLISHED, Musiq
from tests.reference.record_musiq import seeded_tensor

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "patch_size": None}
VIT = {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 112}


def tiny_clip(folder: Path, embed_dim: int, vision: dict, seed: int) -> str:
    """A CLIP with random weights in a folder, as open_clip reads it."""
    folder.mkdir()
    config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": True}
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**{**config, "vision_cfg": open_clip.CLIPVisionCfg(**vision)})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def seeded_musiq(outputs: int) -> Musiq:
    """The network whose scores tests/reference/record_musiq.py records."""
    network = Musiq(dataclasses.replace(PUBLISHED, outputs=outputs))
    state = {
        name: torch.from_numpy(seeded_tensor(name, tuple(t.shape)))
        for name, t in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def as_google(network: Musiq) -> dict[str, np.ndarray]:
    """The network's weights as Google's files hold them: Flax's names, axes and separate heads."""
    heads, width = PUBLISHED.heads, PUBLISHED.width
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in network.state_dict().items():
        value, parts = tensor.numpy(), name.split(".")
        leaf = {"weight": "kernel", "bias": "bias"}.get(parts[-1], "")
        norm_leaf = {"weight": "scale", "bias": "bias"}.get(parts[-1], "")
        if parts[0] == "blocks":
            block, part = f"Transformer/encoderblock_{parts[1]}", parts[2]
            if part == "attention":
                key = f"{block}/MultiHeadDotProductAttention_1/{parts[3]}/{leaf}"
                if parts[3] == "out":
                    value = value.T.reshape(heads, width // heads, width) if leaf == "kernel" else value
                else:
                    value = (
                        value.T.reshape(width, heads, -1) if leaf == "kernel" else value.reshape(heads, -1)
                    )
            elif part.startswith("norm"):
                key = f"{block}/LayerNorm_{ {'norm1': 0, 'norm2': 2}[part] }/{norm_leaf}"
            else:
                key = f"{block}/MlpBlock_3/Dense_{ {'fc1': 0, 'fc2': 1}[part] }/{leaf}"
                value = value.T
        elif parts[0] == "position_embedding":
            key, value = "Transformer/posembed_input/pos_embedding", value[None]
        elif parts[0] == "scale_embedding":
            key, value = "Transformer/scaleembed_input/scale_embedding", value[None]
        elif parts[0] == "cls":
            key, value = "Transformer/cls", value[None, None]
        elif parts[0] == "norm":
            key = f"Transformer/encoder_norm/{norm_leaf}"
        elif parts[0] in ("embedding", "head"):
            key, value = f"{parts[0]}/{leaf}", value.T
        elif value.ndim == 4:
            path = "conv_root" if parts[0] == "conv_root" else f"block1/unit1/{parts[1]}"
            key, value = f"{path}/kernel", value.transpose(2, 3, 1, 0)
        else:
            path = "gn_root" if parts[0] == "gn_root" else f"block1/unit1/{parts[1]}"
            key, value = f"{path}/{norm_leaf}", value.reshape(1, 1, 1, -1)
        arrays[f"opt/target/{key}"] = value
    return arrays


def random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Small weights for a network of the published shape."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=generator) * 0.02 if t.is_floating_point() else t
        for name, t in network.state_dict().items()
    }
