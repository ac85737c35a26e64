"""The paper's transformer: SD3's own numbers, packing, windows, memory switches, size."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints import load_sd3_transformer
from model.dit.packing import patchify
from model.dit.swin_mmdit import SD3_MEDIUM, TINY, SwinMMDiT, SwinMMDiTConfig
from model.dit.windows import Grid
from tests.helpers.processes import output_of
from tests.helpers.released_models import sd3_transformer
from tests.model.dit import making_peak


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_model(config: SwinMMDiTConfig) -> SwinMMDiT:
    """Every parameter random: a fresh model's zero gates would hide all that the blocks do."""
    model = SwinMMDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


def random_inputs(config: SwinMMDiTConfig, shapes: list[Grid], text_lengths: list[int]) -> dict:
    return {
        "video": torch.randn(sum(t * h * w for t, h, w in shapes), config.in_channels),
        "text": torch.randn(sum(text_lengths), config.text_dim),
        "video_shapes": shapes,
        "text_lengths": text_lengths,
        "timestep": torch.linspace(50.0, 950.0, len(shapes)),
        "pooled": torch.randn(len(shapes), config.pooled_dim),
    }


class TestAgainstSD3:
    """diffusers' SD3Transformer2DModel with a zero position table is Swin-MMDiT with one whole window."""

    config = replace(TINY, windows=((1, 64, 64),), rotary=False)

    @pytest.fixture
    def sd3(self):
        model = sd3_transformer(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        return model

    def test_outputs_gradients_and_report(self, sd3, tmp_path):
        save_file(sd3.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
        ours = SwinMMDiT(self.config)
        report = load_sd3_transformer(ours, tmp_path)
        last = self.config.num_layers - 1
        assert set(report.left) == {
            "pos_embed.pos_embed",
            f"transformer_blocks.{last}.attn.add_q_proj.weight",
            f"transformer_blocks.{last}.attn.add_q_proj.bias",
        }
        assert set(report.taken) | set(report.left) == set(sd3.state_dict())
        assert "16 to 32" in str(report)

        latent, text, pooled = torch.randn(2, 16, 12, 20), torch.randn(2, 9, 64), torch.randn(2, 48)
        timestep = torch.tensor([350.0, 900.0])
        target = torch.randn(2, 16, 12, 20)
        theirs = sd3(latent, text, pooled, timestep, return_dict=False)[0]
        video = torch.cat([latent, torch.zeros(2, 17, 12, 20)], dim=1)
        out = ours(
            video.permute(0, 2, 3, 1).reshape(-1, 33),
            text.flatten(0, 1),
            [(1, 12, 20)] * 2,
            [9, 9],
            timestep,
            pooled,
        )
        out = out.reshape(2, 12, 20, 16).permute(0, 3, 1, 2)
        assert (out - theirs).abs().max() <= 1e-5
        ((theirs - target) ** 2).mean().backward()
        ((out - target) ** 2).mean().backward()
        # SD3's gradients, brought into our layout by the same loader: every tensor has its counterpart.
        state = {name: torch.zeros_like(tensor) for name, tensor in sd3.state_dict().items()}
        state |= {name: p.grad for name, p in sd3.named_parameters() if p.grad is not None}
        save_file(state, tmp_path / "gradients.safetensors")
        expected = SwinMMDiT(self.config)
        load_sd3_transformer(expected, tmp_path / "gradients.safetensors")
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        for name, parameter in expected.named_parameters():
            largest = parameter.abs().max()
            assert largest > 0 and (gradients[name] - parameter).abs().max() <= 1e-5 * largest, name

    def test_sharded_file_gives_the_same(self, sd3, tmp_path):
        state = sd3.state_dict()
        names = sorted(state)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, members in shards.items():
            save_file({name: state[name] for name in members}, tmp_path / file)
        index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
        index_file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        index_file.write_text(json.dumps(index))
        save_file(state, tmp_path / "whole.safetensors")
        sharded, whole = SwinMMDiT(self.config), SwinMMDiT(self.config)
        load_sd3_transformer(sharded, index_file)
        load_sd3_transformer(whole, tmp_path / "whole.safetensors")
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_a_file_that_is_no_sd3_is_refused(self, tmp_path):
        save_file({"some.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="not an SD3 transformer"):
            load_sd3_transformer(SwinMMDiT(self.config), tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="no such file"):
            load_sd3_transformer(SwinMMDiT(self.config), tmp_path / "y.safetensors")

    def test_another_transformer_is_refused(self, sd3, tmp_path):
        """One with more in it (SD3.5 normalises queries and keys), of more layers, or of another width."""
        state = sd3.state_dict()
        file = tmp_path / "other.safetensors"
        save_file({**state, "transformer_blocks.0.attn.norm_q.weight": torch.ones(32)}, file)
        with pytest.raises(ValueError, match=r"no place for 'transformer_blocks.0.attn.norm_q.weight'"):
            load_sd3_transformer(SwinMMDiT(self.config), file)
        save_file(state, file)
        with pytest.raises(ValueError, match="not an SD3 transformer of 3 layers"):
            load_sd3_transformer(SwinMMDiT(replace(self.config, num_layers=3)), file)
        with pytest.raises(ValueError, match=r"'proj_out.weight' makes .* but video_out.weight is"):
            load_sd3_transformer(SwinMMDiT(replace(self.config, out_channels=8)), file)


class TestPacking:
    shapes: list[Grid] = [(3, 10, 12), (1, 6, 4), (5, 18, 10), (1, 26, 22)]  # noqa: RUF012
    text_lengths = [7, 3, 0, 12]  # noqa: RUF012

    def test_packed_equals_one_by_one(self):
        model = random_model(TINY)
        inputs = random_inputs(TINY, self.shapes, self.text_lengths)
        with torch.no_grad():
            packed = model(**inputs).split([t * h * w for t, h, w in self.shapes])
            videos = inputs["video"].split([t * h * w for t, h, w in self.shapes])
            texts = inputs["text"].split(self.text_lengths)
            for i, shape in enumerate(self.shapes):
                alone = model(
                    videos[i], texts[i], [shape], [len(texts[i])], inputs["timestep"][i : i + 1],
                    inputs["pooled"][i : i + 1],
                )  # fmt: skip
                assert alone.std() > 0.1
                assert (packed[i] - alone).abs().max() <= 1e-5

    def test_any_even_size_runs(self):
        """No size is special: one pixel pair, a long strip, one frame or many, all in one batch and alone."""
        shapes: list[Grid] = [(1, 2, 2), (1, 2, 94), (13, 6, 2), (2, 34, 18)]
        model = random_model(TINY)
        with torch.no_grad():
            out = model(**random_inputs(TINY, shapes, [1, 5, 2, 3]))
            assert out.shape == (sum(t * h * w for t, h, w in shapes), 16) and out.isfinite().all()

    def test_every_input_matters(self):
        model = random_model(TINY)
        inputs = random_inputs(TINY, self.shapes[:1], self.text_lengths[:1])
        with torch.no_grad():
            out = model(**inputs)
            for name in ("video", "text", "timestep", "pooled"):
                assert (model(**{**inputs, name: inputs[name] * 0.9}) - out).abs().max() > 1e-3, name

    def test_odd_latents_and_missing_pooled_are_refused(self):
        model = SwinMMDiT(TINY)
        with pytest.raises(ValueError, match=r"\(1, 5, 4\).*pad"):
            model(**random_inputs(TINY, [(1, 5, 4)], [2]))
        with pytest.raises(ValueError, match="pooled"):
            model(**{**random_inputs(TINY, [(1, 4, 4)], [2]), "pooled": None})


def test_windows_stop_information_and_shifts_carry_it_on():
    """With one layer a pixel reaches its own window only; two layers, the second shifted, reach beyond."""
    config = replace(TINY, num_layers=1, windows=((1, 4, 4),), shifted=(False,))
    inputs = random_inputs(config, [(1, 8, 8)], [0])

    def reached(model: SwinMMDiT) -> torch.Tensor:
        changed = inputs["video"].clone()
        changed[0] += 1.0
        with torch.no_grad():
            difference = (model(**inputs) - model(**{**inputs, "video": changed})).abs().amax(-1)
        return (difference > 1e-6).reshape(8, 8)

    one = reached(random_model(config))
    assert one[:4, :4].all() and not one[4:].any() and not one[:, 4:].any()
    two = reached(random_model(replace(config, num_layers=2, shifted=(False, True))))
    assert two[:6, :6].all() and not two[6:].any()
    full = reached(random_model(replace(config, windows=((1, "full", "full"),))))
    assert full.all()


def test_rotary_tells_positions_apart():
    """Without it, equal pixels give equal results wherever they are; with it, they do not."""
    for rotary, same in ((False, True), (True, False)):
        model = random_model(replace(TINY, num_layers=2, rotary=rotary, windows=((1, "full", "full"),)))
        inputs = random_inputs(TINY, [(1, 4, 8)], [2])
        inputs["video"] = inputs["video"].reshape(4, 8, 33)
        inputs["video"][:2, :2] = inputs["video"][2:, 6:]
        inputs["video"] = inputs["video"].reshape(-1, 33)
        with torch.no_grad():
            out = model(**inputs).reshape(4, 8, 16)
        assert torch.allclose(out[:2, :2], out[2:, 6:], atol=1e-5) == same


def test_checkpointed_blocks_give_the_same_gradients():
    model = random_model(TINY)
    inputs = random_inputs(TINY, TestPacking.shapes, TestPacking.text_lengths)
    gradients = []
    for blocks in ([], [0, 2, 3]):
        model.zero_grad()
        model.checkpoint_activations(blocks)
        model(**inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.slow
def test_compiled_model_gives_the_same():
    """One compilation serves every length."""
    config = replace(TINY, num_layers=1)
    model = random_model(config)
    calls = [random_inputs(config, [shape], [3]) for shape in ((2, 6, 8), (3, 10, 12))]
    results: list[list[torch.Tensor]] = []
    for compiled in (False, True):
        if compiled:
            model.compile_mlps()
        model.zero_grad()
        outs = [model(**inputs) for inputs in calls]
        sum(out.square().mean() for out in outs).backward()
        results.append([*outs, *(parameter.grad.clone() for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


class TestMemory:
    """A model is made in its place: nothing is ever there twice."""

    def peak(self, *arguments: str) -> float:
        """Peak memory of making (and loading) a model in a fresh process, over its parameters' bytes."""
        return float(output_of("tests.model.dit.making_peak", *arguments))

    def test_making(self):
        assert 0.95 < self.peak() < 1.1

    def test_starting_from_sd3(self, tmp_path):
        save_file(sd3_transformer(making_peak.CONFIG).state_dict(), tmp_path / "sd3.safetensors")
        assert 0.95 < self.peak(str(tmp_path / "sd3.safetensors")) < 1.25


def test_inference_first_then_training():
    """Tables cached under inference_mode must serve a backward pass later."""
    model, inputs = random_model(TINY), random_inputs(TINY, [(2, 14, 6)], [5])
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).mean().backward()
    assert model.video_in.weight.grad.abs().sum() > 0


def test_a_fresh_model_predicts_zero_and_gates_are_closed():
    model = SwinMMDiT.create(TINY, "cpu", torch.float32)
    assert not model(**random_inputs(TINY, [(1, 4, 4)], [2])).any()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_full_size():
    with torch.device("meta"):
        model = SwinMMDiT(SD3_MEDIUM)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_028_432_448


def test_config_says_which_window_does_not_fit():
    for extent in (7, 0, -2):
        with pytest.raises(ValueError, match=f"model.windows: extent {extent}"):
            replace(TINY, windows=((1, extent, 8),))
    with pytest.raises(ValueError, match="at least one"):
        replace(TINY, shifted=())
    assert pickle.loads(pickle.dumps(TINY)) == TINY


@pytest.mark.parametrize("t", [1, 3, 5])
@pytest.mark.parametrize("side", [32, 64, "full"])
def test_the_windows_of_table_4(t, side):
    """The paper's ablation at its own sizes: 13 frames of 720p, layer by layer."""
    config = replace(SD3_MEDIUM, windows=((t, side, side),))
    regular, shifted = (
        layer.rule((13, 45, 80), layer.window, layer.shifted) for layer in config.layer_windows()[:2]
    )
    half = 0 if side == "full" else side // 4
    expected = [] if side == "full" else list(range(side // 2, 45, side // 2))
    assert sorted({h.start for _, h, _ in regular}) == [0, *expected]
    assert sorted({h.start for _, h, _ in shifted}) == ([0, *range(half, 45, side // 2)] if half else [0])
    assert {f.start for f, _, _ in regular} == set(range(0, 13, t))
    assert {f.start for f, _, _ in shifted} == {0, *range(t // 2, 13, t)}


def test_windows_differ_by_layer():
    config = replace(TINY, windows=((1, 8, 8), (2, "full", 4)), shifted=(True, False, False))
    layers = config.layer_windows()
    assert [layer.window for layer in layers] == [(1, 4, 4), (2, "full", 2)] * 2
    assert [layer.shifted for layer in layers] == [True, False, False, True]
    with torch.no_grad():
        assert random_model(config)(**random_inputs(config, [(3, 10, 14)], [4])).isfinite().all()


def test_patch_order_is_row_then_column_then_channel():
    video = torch.arange(2 * 4 * 3).float().reshape(8, 3)
    tokens = patchify(video, [(1, 2, 4)], (1, 2, 2))
    assert tokens[0].tolist() == [*video[0], *video[1], *video[4], *video[5]]
