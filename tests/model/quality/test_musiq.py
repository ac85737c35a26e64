"""MUSIQ against what pyiqa's port said of the same pictures and weights (tests/reference/record_musiq.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints import load_musiq
from tests.helpers.random_scorers import as_google, seeded_musiq
from tests.reference.record_musiq import OUTPUTS, picture

RECORDED = Path(__file__).parents[2] / "data" / "scores" / "musiq.npz"


@pytest.mark.parametrize("outputs, parameters", [(1, 27_125_825), (10, 27_129_290)])
def test_scores_are_those_of_the_common_port(outputs, parameters):
    network = seeded_musiq(outputs)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == 248
    with np.load(RECORDED) as recorded:
        pictures, scores = recorded["pictures"], recorded[f"scores_{outputs}"]
    assert outputs in OUTPUTS and len(scores) == 5 and scores.std() > 0.03
    ours = [network.score(torch.from_numpy(picture(*map(int, one)))) for one in pictures]
    assert np.abs(ours - scores).max() < 1e-5


def test_googles_file_becomes_the_network(tmp_path):
    network = seeded_musiq(10)
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
