"""The released backbones: recorded numbers, names and shapes, packing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import released
from model import checkpoints
from model.checkpoints.parity import cases
from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiT, NaDiTConfig
from model.dit.windows import Grid
from pipeline.weights import weights_folder
from tests.model.dit.plain_nadit import Plain

DATA = Path(__file__).parents[2] / "data/parity"


RELEASED = {"3b": SEEDVR_3B, "7b": SEEDVR_7B}


def tiny(kind: str, **changes) -> NaDiTConfig:
    config = {
        "num_layers": 3, "num_heads": 2, "head_dim": 32, "width": 64, "patch": (1, 2, 2),
        "in_channels": 33, "out_channels": 16, "text_dim": 40, "mlp_ratio": 4,
        "separate_layers": 1 if kind == "3b" else 3, "windows": (4, 3, 3),
        "rotary_dim": 32 if kind == "3b" else 16,
    }  # fmt: skip
    return dataclasses.replace(RELEASED[kind], **{**config, **changes})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("case", ["dit_v1_a", "dit_v2_a"])
def test_recorded_numbers(case):
    path = DATA / f"{case}.safetensors"
    header, tensors = checkpoints.read_header(path), checkpoints.read_tensors(path)
    for result in cases.check(header, tensors, source=str(path)):
        assert result.passed, result
    # The time and the text must tell: a case with one of them changed is caught.
    broken = {**tensors, "in.timestep": tensors["in.timestep"] + 1}
    assert not all(result.passed for result in cases.check(header, broken, source=str(path)))


@pytest.mark.parametrize("case", ["dit_v1_a", "dit_v2_a"])
def test_buffers_equal_what_rotary_computes_with(case):
    path = DATA / f"{case}.safetensors"
    config = checkpoints.released_backbone_config(checkpoints.read_header(path)["config"])
    recorded = checkpoints.read_tensors(path)["state.blocks.0.attn.rope.rope.freqs"]
    assert torch.allclose(NaDiT(config).state_dict()["blocks.0.attn.rope.rope.freqs"], recorded, rtol=1e-6)


@pytest.mark.parametrize(("name", "config"), [("keys_3b", SEEDVR_3B), ("keys_7b", SEEDVR_7B)])
def test_full_size_has_exactly_the_released_names_and_shapes(name, config):
    released = json.loads((DATA / f"{name}.json").read_text())
    with torch.device("meta"):
        model = NaDiT(config)
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ours == {key: shape for key, (shape, _) in released["keys"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == released["total_parameters"]
    assert checkpoints.released_backbone_config(released["config"]) == config


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_packed_equals_one_by_one_with_gradients(kind):
    model = NaDiT(tiny(kind))
    shapes: list[Grid] = [(3, 50, 44), (1, 4, 6), (6, 8, 4)]
    text_lengths = [5, 1, 7]
    rows = [t * h * w for t, h, w in shapes]
    video, text = torch.randn(sum(rows), 33), torch.randn(sum(text_lengths), 40)
    times = torch.tensor([900.0, 20.0, 400.0])
    packed = model(video, text, shapes, text_lengths, times)
    packed.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat(
        [
            model(v, t, [shape], [len(t)], times[i : i + 1])
            for i, (v, t, shape) in enumerate(
                zip(video.split(rows), text.split(text_lengths), shapes, strict=True)
            )
        ]
    )
    alone.square().mean().backward()
    assert (packed - alone).abs().max() <= 1e-5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert (gradients[name] - parameter.grad).abs().max() <= 1e-5 * gradients[
                name
            ].abs().max() + 1e-7, name


def test_checkpointed_blocks_give_the_same_gradients():
    model = NaDiT(tiny("3b"))
    inputs = (torch.randn(96, 33), torch.randn(4, 40), [(2, 6, 8)], [4], torch.tensor([300.0]))
    gradients = []
    for blocks in ((), (0, 2)):
        model.zero_grad()
        model.checkpoint_activations(blocks)
        model(*inputs).square().mean().backward()
        gradients.append(model.vid_in.proj.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8) and gradients[0].any()


def test_a_last_layer_of_its_own_has_no_text_beyond_attention():
    """3B structure without shared layers: what the released code leaves out of the last layer."""
    names = NaDiT(tiny("3b", separate_layers=3)).state_dict()
    assert "blocks.1.mlp.txt.proj_in.weight" in names and "blocks.2.mlp.vid.proj_in.weight" in names
    assert not [name for name in names if name.startswith(("blocks.2.mlp.txt", "blocks.2.ada.txt"))]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_loads_from_either_format_and_casts(suffix, tmp_path):
    model, path = NaDiT(tiny("3b")), tmp_path / f"model.{suffix}"
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(half, path) if suffix == "safetensors" else torch.save(half, path)
    kept = checkpoints.load_nadit(path, model.config)
    assert all(torch.equal(tensor, half[name]) for name, tensor in kept.state_dict().items())
    cast = checkpoints.load_nadit(path, model.config, torch.float32)
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in cast.state_dict().items())
    with pytest.raises(ValueError, match="3B or 7B"):
        checkpoints.load_nadit(path)
    with pytest.raises(ValueError, match="unexpected"):
        checkpoints.load_nadit(path, tiny("3b", num_layers=2))


def test_saved_file_states_its_configuration(tmp_path):
    model = NaDiT(tiny("7b"))
    checkpoints.save_backbone(tmp_path / "m.safetensors", model, {"step": 5})
    loaded = checkpoints.load_nadit(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("safetensors", "keep"),
        ("pth", "bfloat16"),
        pytest.param("pth", "keep", marks=pytest.mark.slow),
        pytest.param("safetensors", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_loading_holds_no_second_copy(suffix, dtype, tmp_path):
    """Peak of a fresh process: 1.3 times the file as it is; 1.1 times the target, plus a tensor, if cast."""
    config = tiny("3b", width=768, num_layers=6, head_dim=128, num_heads=6, rotary_dim=128)
    path = tmp_path / f"m.{suffix}"
    largest = released.write_random(path, config, torch.float32)
    peak, size = released.load_peak(path, config, dtype)
    bar = 1.3 * path.stat().st_size if dtype == "keep" else 1.1 * size + largest
    assert 100e6 < size < peak < bar, (peak, size, largest)


def test_odd_latents_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 5, 4\).*pad"):
        NaDiT(tiny("7b"))(torch.randn(20, 33), torch.randn(2, 40), [(1, 5, 4)], [2], torch.tensor([1.0]))


OTHER_SHAPES = (
    {},
    {"num_heads": 3, "head_dim": 24, "rotary_dim": 24},  # heads that do not add up to the width
    {"num_heads": 2, "head_dim": 32, "rotary_dim": 22},  # an odd third: 3 pairs of 7 channels
    {"width": 96, "num_layers": 4, "text_dim": 8, "mlp_ratio": 2},
    {"windows": (2, 2, 5)},
)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *[(kind, changes) for kind in ("3b", "7b") for changes in OTHER_SHAPES],
        ("3b", {"separate_layers": 0}),
        ("3b", {"separate_layers": 3}),
    ],
)
def test_packed_shapes_of_all_kinds_equal_the_plain_network(kind, changes):
    """Images, long and thin videos, one-token texts, windows of one token: against a loop over windows."""
    config = tiny(kind, **changes)
    model = NaDiT(config)
    state = {n: t + 0.1 * torch.randn_like(t) * (t.ndim == 1) for n, t in model.state_dict().items()}
    rope = {n: t for n, t in model.state_dict().items() if n.endswith("freqs")}
    model.load_state_dict(state | rope)
    plain = Plain(config, dict(model.state_dict()))
    shapes: list[Grid] = [(1, 2, 2), (1, 26, 40), (7, 48, 4), (31, 2, 6), (2, 64, 62)]
    text_lengths, times = [1, 9, 3, 64, 2], torch.tensor([1000.0, 20.0, 0.0, 613.7, 231.4])
    rows = [t * h * w for t, h, w in shapes]
    video, text = torch.randn(sum(rows), 33), torch.randn(sum(text_lengths), config.text_dim)
    with torch.no_grad():
        packed = model(video, text, shapes, text_lengths, times).split(rows)
        for i, (v, t) in enumerate(zip(video.split(rows), text.split(text_lengths), strict=True)):
            expected = plain(v, t, shapes[i], times[i].item())
            assert expected.std() > 0.1
            assert (packed[i] - expected).abs().max() <= 2e-5, shapes[i]


@pytest.mark.parametrize("kind", ["3b", "7b"])
def test_a_shape_that_names_its_structure_as_version_0_1_did_is_read(kind, tmp_path):
    config = tiny(kind)
    flags = ("swiglu", "multimodal_rotary", "modulated_head", "text_ends_at_last_attention")
    stored = {name: value for name, value in dataclasses.asdict(config).items() if name not in flags}
    stored["kind"] = kind
    model = NaDiT(config)
    checkpoints.write_tensors(tmp_path / "old.safetensors", model.state_dict(), {"backbone": stored})
    assert checkpoints.load_nadit(tmp_path / "old.safetensors").config == config
    description = {"kind": weights_folder.NADIT, "config": json.loads(json.dumps(stored))}
    assert weights_folder.shape_from_json(description) == config
