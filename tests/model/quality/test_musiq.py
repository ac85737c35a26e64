"""MUSIQ against what pyiqa's port said of the same pictures and weights (tests/reference/record_musiq.py)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints import load_musiq
from model.quality.musiq import PUBLISHED, Musiq
from tests.reference.record_musiq import OUTPUTS, picture, seeded_tensor

RECORDED = Path(__file__).parents[2] / "data" / "scores" / "musiq.npz"


def seeded(outputs: int) -> Musiq:
    network = Musiq(dataclasses.replace(PUBLISHED, outputs=outputs))
    state = {
        name: torch.from_numpy(seeded_tensor(name, tuple(t.shape)))
        for name, t in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


@pytest.mark.parametrize("outputs, parameters", [(1, 27_125_825), (10, 27_129_290)])
def test_scores_are_those_of_the_common_port(outputs, parameters):
    network = seeded(outputs)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == 248
    with np.load(RECORDED) as recorded:
        pictures, scores = recorded["pictures"], recorded[f"scores_{outputs}"]
    assert outputs in OUTPUTS and len(scores) == 5 and scores.std() > 0.03
    ours = [network.score(torch.from_numpy(picture(*map(int, one)))) for one in pictures]
    assert np.abs(ours - scores).max() < 1e-5


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


def test_googles_file_becomes_the_network(tmp_path):
    network = seeded(10)
    arrays = as_google(network)
    np.savez(tmp_path / "ava_ckpt.npz", **arrays, **{"opt/state/step": np.array(7)})
    loaded = load_musiq(tmp_path / "ava_ckpt.npz")
    assert loaded.config.outputs == 10
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("change", ["missing", "foreign", "pickled", "no file"])
def test_what_is_no_musiq_is_refused_in_one_line(tmp_path, change):
    path = tmp_path / "koniq_ckpt.npz"
    arrays = {"opt/target/cls": np.zeros((1, 1, 384), np.float32)}
    if change == "foreign":
        arrays["opt/target/Transformer/other"] = np.zeros(3)
    if change == "pickled":
        arrays["opt/target/cls"] = np.array([{"a": 1}], dtype=object)
    if change != "no file":
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"koniq_ckpt\.npz") as told:
        load_musiq(path)
    assert "\n" not in str(told.value)
