"""The scorers' networks: recorded numbers, published names and counts, and what a user may get wrong."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from model.checkpoints import load_aesthetic_head, load_dover, load_fast_vqa, read_header
from model.checkpoints.__main__ import main
from model.quality import aesthetic, dover, fast_vqa, fragments
from model.quality.dover import Dover
from model.quality.fast_vqa import FastVQA
from model.quality.video_swin import fragment_gate
from tests.helpers.random_scorers import random_state

PARITY = Path(__file__).parents[2] / "data" / "parity"


@pytest.mark.parametrize("name", ["fast_vqa_a", "dover_a", "clipiqa_a", "laion_golden", "quality_sampling"])
def test_verify_passes_the_recorded_case(name, capsys):
    assert main(["verify", str(PARITY / f"{name}.safetensors")]) == 0
    assert capsys.readouterr().out.count(" ok") >= 4


@pytest.mark.parametrize(
    "name, network, config",
    [
        ("keys_fastvqa", FastVQA, fast_vqa.PUBLISHED),
        ("keys_fastvqa", FastVQA, fast_vqa.PUBLISHED_FASTER),
        ("keys_fastvqa_m", FastVQA, fast_vqa.PUBLISHED_M),
        ("keys_dover", Dover, dover.PUBLISHED),
        ("keys_dover_mobile", Dover, dover.PUBLISHED_MOBILE),
    ],
)
def test_networks_have_the_published_tensors(name, network, config):
    published = json.loads((PARITY / f"{name}.json").read_text())
    with torch.device("meta"):
        ours = network(config)
    expected = {row["key"]: (row["shape"], row["dtype"]) for row in published["keys"]}
    found = {k: (list(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in ours.state_dict().items()}
    assert found == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == published["parameters"]


def test_gate_counts_cells_as_recorded_at_full_size():
    """How often each distance occurs in the second layer of the published network at 32x224x224."""
    recorded = {
        (0, 0, 0): {0: 1083392, 1: 2260992, 2: 1368064, 3: 196608, 4: 8192},
        (4, 3, 3): {
            **{0: 1083392, 1: 1695744, 2: 851968, 3: 147456, 4: 8192},
            **{6: 565248, 7: 442368, 8: 49152, 12: 73728},
        },
    }
    for shift, counts in recorded.items():
        gate = fragment_gate((16, 28, 28), (8, 7, 7), shift)
        found = torch.bincount(gate.flatten().int()).tolist()
        assert {value: number for value, number in enumerate(found) if number} == counts


def test_published_containers_load_and_others_are_told_apart(tmp_path):
    """FAST-VQA's files keep NumPy numbers beside the weights; DOVER.pth is bare, DOVER-Mobile differs."""
    state = random_state(FastVQA(fast_vqa.PUBLISHED_M))
    results = {"srcc": np.float64(0.87), "loss": np.array([1.0, 2.0]), "epoch": 3}
    torch.save({"state_dict": state, "validation_results": results}, tmp_path / "FAST_VQA_M_1_4.pth")
    loaded = load_fast_vqa(tmp_path / "FAST_VQA_M_1_4.pth", fast_vqa.PUBLISHED_M)
    assert torch.equal(loaded.vqa_head.fc_hid.weight, state["vqa_head.fc_hid.weight"])
    with pytest.raises(ValueError, match=r"FAST_VQA_M_1_4\.pth: does not fit FastVQA: .*missing"):
        load_fast_vqa(tmp_path / "FAST_VQA_M_1_4.pth", fast_vqa.PUBLISHED)
    mobile = random_state(Dover(dover.PUBLISHED_MOBILE))
    torch.save(mobile, tmp_path / "DOVER-Mobile.pth")
    assert load_dover(tmp_path / "DOVER-Mobile.pth").config == dover.PUBLISHED_MOBILE


def test_fast_vqa_scores_a_clip_the_same_way_each_time():
    """From frames to a number within the published scale; a short clip wraps round."""
    network = FastVQA(dataclasses.replace(fast_vqa.PUBLISHED_M, segments=1, clips=1))
    network.load_state_dict(random_state(network))
    numbers = network.frame_numbers(20)
    assert numbers == [*range(0, 20, 2), 0, 2, 4, 6, 8, 10]
    frame = torch.randint(0, 256, (140, 160, 3), dtype=torch.uint8)
    looks = [network.look(frame)] * len(numbers)
    assert looks[0].shape == (3, 1, 128, 128)
    score = network.score(torch.cat(looks, dim=1))
    assert 0 < score < 1 and score == network.score(torch.cat(looks, dim=1))
    with pytest.raises(ValueError, match="40x30 is smaller than a patch of 32x32"):
        network.look(torch.zeros(30, 40, 3, dtype=torch.uint8))


def test_dover_sees_the_parts_of_a_clip_that_it_was_trained_on():
    network = Dover(dover.PUBLISHED_MOBILE)
    technical, whole = network.frame_numbers(300)
    assert len(technical) == 96 and len(whole) == 32
    assert technical[1] - technical[0] == 2 and all(b - a == 9 for a, b in pairwise(whole))
    assert set(network.frame_numbers(20)[1]) == {0}
    frame = torch.randint(0, 256, (250, 300, 3), dtype=torch.uint8)
    close, picture = network.look(frame)
    # Patches are raw pixels: the mosaic's first one lies in the middle of the first cell of 35x42.
    assert torch.equal(close[:, 0, :32, :32], frame[1:33, 5:37].permute(2, 0, 1).float())
    assert picture.shape == (3, 1, 224, 224)


def test_wrong_sizes_of_fragments_are_named():
    size = fragments.FragmentSize((2, 2), (8, 8), aligned=4)
    places = (torch.zeros(2, 2, 1, dtype=torch.int64),) * 2
    with pytest.raises(ValueError, match="6 frames are no multiple of 4"):
        fragments.spatial_fragments(torch.zeros(3, 6, 20, 20), size, places)
    swin = FastVQA(fast_vqa.PUBLISHED).fragments_backbone
    with pytest.raises(ValueError, match="too far from the size"):
        swin.window_for(torch.Size([64, 224, 224]))


def test_aesthetic_heads_rate_the_embedding_whatever_its_length():
    case = read_header(PARITY / "laion_golden.safetensors")
    head = load_aesthetic_head(aesthetic.WEIGHTS / aesthetic.MLP_FILE)
    assert sum(p.numel() for p in head.parameters()) == case["parameters"]["mlp"]
    embedding = torch.randn(2, 768, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        once, thrice = (aesthetic.aesthetic_score(head, k * embedding) for k in (1, 3))
    assert torch.allclose(once, thrice, atol=1e-5)


@pytest.mark.parametrize("height, width", [(300, 501), (719, 405), (100, 90)])
def test_pictures_are_prepared_as_clip_prepares_them(height, width):
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    theirs = image_transform(224, is_train=False, mean=aesthetic.CLIP_MEAN, std=aesthetic.CLIP_STD)
    assert torch.equal(aesthetic.prepare(torch.from_numpy(frame))[0], theirs(Image.fromarray(frame)))
