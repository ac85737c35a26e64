"""Our DISTS equals DISTS_pytorch's network as pyiqa has it, with random weights of the published shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints import build_dists
from model.perceptual.dists import Dists
from tests.reference.record_dists import random_tables

RECORDED = Path(__file__).resolve().parents[2] / "data" / "scores" / "dists.json"  # by record_dists.py


def test_distances_equal_the_packages():
    tables = {name: torch.from_numpy(table) for name, table in random_tables().items()}
    network = build_dists(tables, {name: tables[name] for name in ("alpha", "beta")}, "random")
    recorded = json.loads(RECORDED.read_text())
    distances = network(tables["picture"], tables["truth"])
    assert distances.tolist() == pytest.approx(recorded["distances"], abs=1e-5)
    odd = network(tables["picture"][..., :41, :57], tables["truth"][..., :41, :57])
    assert odd.tolist() == pytest.approx(recorded["odd"], abs=1e-5)
    assert min(recorded["distances"]) > 0.01 and not any(p.requires_grad for p in network.parameters())


def test_equal_pictures_have_no_distance_and_noise_has_more_than_a_shift():
    torch.manual_seed(0)
    network = Dists((4, 4, 8, 8, 8))
    picture = torch.rand(1, 3, 32, 32)
    assert network(picture, picture).item() == pytest.approx(0, abs=1e-5)
    assert network(picture, torch.rand_like(picture)).item() > network(picture, picture * 0.98).item() > 0


def test_other_files_are_refused():
    features = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(ValueError, match="somewhere: no table of DISTS weights"):
        build_dists(features, {"alpha": torch.zeros(3)}, "somewhere")
    heads = {name: torch.from_numpy(np.zeros((1, 1475, 1, 1), np.float32)) for name in ("alpha", "beta")}
    with pytest.raises(ValueError, match=r"somewhere: .*missing \(features\.0\.bias"):
        build_dists(features, heads, "somewhere")
