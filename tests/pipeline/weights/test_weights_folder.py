"""Weights folders: what is saved is loaded again, and nothing else is."""

from pathlib import Path

import pytest
import torch

from pipeline.weights import weights_folder
from tests.helpers import tiny_models


def test_models_come_back_as_they_were_saved(tmp_path: Path):
    vae = weights_folder.load_vae(tiny_models.save_vae(tmp_path / "vae"))
    dit, prompts = weights_folder.load_dit(tiny_models.save_dit(tmp_path / "dit"))
    assert vae.config == tiny_models.VAE and dit.config == tiny_models.DIT
    assert prompts.null.shape == (7, 24)
    assert prompts.pooled is not None and prompts.pooled.shape == (12,)
    again = f"file://{tmp_path}/again"
    digest = weights_folder.save_weights(again, weights_folder.VAE, vae.config, vae.state_dict())
    assert (
        digest == weights_folder.weights_hash(f"file://{tmp_path}/vae") == weights_folder.weights_hash(again)
    )
    for name, tensor in weights_folder.load_vae(again).state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name])


def test_what_is_not_whole_is_refused(tmp_path: Path):
    url = tiny_models.save_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match="kind 'vae', wanted swin_mmdit or nadit"):
        weights_folder.load_dit(url)
    file = tmp_path / "vae" / weights_folder.WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="does not match the sha256"):
        weights_folder.load_vae(url)
    (tmp_path / "vae" / weights_folder.CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"no config\.json here"):
        weights_folder.load_vae(url)
