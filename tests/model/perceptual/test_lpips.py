"""Our LPIPS equals the lpips package, with random weights of the published shapes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints import build_lpips, read_tensors
from model.perceptual.lpips import VGG16_WIDTHS, Lpips, video_lpips
from tests.reference.random_vgg16 import random_vgg16

RECORDED = Path(__file__).resolve().parents[2] / "data" / "scores" / "lpips.json"  # by record_lpips.py


def random_tables() -> dict[str, np.ndarray]:
    """Weights of VGG16 and heads under their published names, and pictures, from a seed."""
    generator = np.random.default_rng(7)
    tables = random_vgg16(generator)
    for level, width in enumerate(VGG16_WIDTHS):
        tables[f"lin{level}.model.1.weight"] = generator.random((1, width, 1, 1))
    tables["picture"], tables["truth"] = generator.uniform(-1, 1, (2, 3, 3, 48, 64))
    return {name: table.astype(np.float32) for name, table in tables.items()}


def test_distances_and_gradients_equal_the_lpips_package():
    tables = {name: torch.from_numpy(table) for name, table in random_tables().items()}
    # fp64, as recorded: in fp32 a feature next to zero is one or the other side of ReLU by the CPU's kind.
    network = build_lpips(tables, tables, "random").double()
    picture = tables["picture"].double().requires_grad_(True)
    distances = network(picture, tables["truth"].double())
    distances.sum().backward()
    recorded = json.loads(RECORDED.read_text())
    assert distances.tolist() == pytest.approx(recorded["distances"], rel=1e-5)
    assert picture.grad.flatten(1).norm(dim=1).tolist() == pytest.approx(recorded["gradient_norms"], rel=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_video_is_the_mean_of_its_frames_and_equal_videos_have_no_distance():
    torch.manual_seed(0)
    network = Lpips((4, 4, 8, 8, 8))
    a, b = torch.rand(2, 2, 3, 5, 16, 16) * 2 - 1
    frames = [network(a[:, :, t], b[:, :, t]) for t in range(5)]
    assert video_lpips(network, a, b).item() == pytest.approx(torch.stack(frames).mean().item(), rel=1e-5)
    assert video_lpips(network, a, a).item() == 0


def test_pictures_without_any_feature_have_a_finite_gradient():
    network = Lpips((4, 4, 8, 8, 8))
    for parameter in network.features.parameters():
        parameter.fill_(0.0)
    picture = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(picture, torch.ones(1, 3, 16, 16)).sum().backward()
    assert picture.grad is not None and picture.grad.isfinite().all()


def test_files_in_the_old_format_load_and_other_files_are_refused(tmp_path):
    tables = {name: torch.from_numpy(table) for name, table in random_tables().items() if "lin" in name}
    torch.save(tables, tmp_path / "vgg.pth", _use_new_zipfile_serialization=False)  # as published
    heads = read_tensors(tmp_path / "vgg.pth")
    assert torch.equal(heads["lin4.model.1.weight"], tables["lin4.model.1.weight"])
    with pytest.raises(ValueError, match=r"somewhere: .*26 missing \(features\.0\.weight"):
        build_lpips({}, heads, "somewhere")
    with pytest.raises(ValueError, match="no table of LPIPS heads"):
        build_lpips({}, {}, "somewhere")


if __name__ == "__main__":
    np.savez(sys.argv[1], **random_tables())
