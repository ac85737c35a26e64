"""The autoencoders' table on real clips: ours and diffusers' from disk, rFVD's parts, mistakes."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs import evaluate as job
from model.checkpoints import save_autoencoder
from model.perceptual.lpips import Lpips
from model.vae import CausalVideoAutoencoder
from pipeline.evaluation import evaluate_vae
from pipeline.evaluation.diffusers_vae import DiffusersAutoencoder
from pipeline.evaluation.evaluate_vae import EvaluateVaeConfig
from pipeline.metrics import frechet, psnr_ssim
from pipeline.store import storage
from pipeline.video import decoding
from tests.helpers import tiny_models
from tests.helpers.clips import MEDIA, make_video

VIDEO_LEVELS = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
IMAGE_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
}


class Features(nn.Module):
    """Something with the interface of the published I3D file: 400 means of the rescaled clip."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert rescale and resize and return_features
        pooled = nn.functional.adaptive_avg_pool3d(x / 127.5 - 1, (4, 10, 10))
        return pooled.flatten(1)[:, :400]


@pytest.fixture(scope="module")
def clips() -> dict[str, list[np.ndarray]]:
    """Three pieces of 13 frames, 58x70: no side is a multiple of 8."""
    names = ("city.mp4", "cup.mp4", "box.mp4")
    return {
        name: [frame[100:158, 100:170] for frame in decoding.decode_frames(str(MEDIA / name), max_frames=13)]
        for name in names
    }


@pytest.fixture(scope="module")
def root(clips, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vae")
    for name, frames in clips.items():
        make_video(root / "clips" / f"{Path(name).stem}.mkv", frames)
    make_video(root / "clips" / "short.mkv", clips["city.mp4"][:5])
    tiny_models.save_vae(root / "ours")
    torch.manual_seed(4)
    save_autoencoder(root / "ema_vae.safetensors", CausalVideoAutoencoder(tiny_models.VAE), {})
    diffusers.AutoencoderKLCogVideoX(**VIDEO_LEVELS).save_pretrained(root / "cogvideox")
    diffusers.AutoencoderKL(**IMAGE_LEVELS).save_pretrained(root / "sd")
    torch.jit.script(Features()).save(str(root / "i3d.pt"))
    return root


def config_of(root: Path, **changes) -> EvaluateVaeConfig:
    names = ("ours", "ema_vae.safetensors", "cogvideox", "sd")
    autoencoders = {name.split(".")[0]: f"file://{root}/{name}" for name in names}
    given = {"autoencoders": autoencoders, "frames": 13}
    return EvaluateVaeConfig(
        **{"clips": f"file://{root}/clips", "output": f"file://{root}/out", **given, **changes}
    )


@pytest.fixture(scope="module")
def result(root, local_ray) -> dict:
    autoencoders = {name: f"file://{root}/{name}" for name in ("ours", "cogvideox", "sd")}
    autoencoders["released"] = f"file://{root}/ema_vae.safetensors"
    arguments = ["--task", "vae", "--clips", f"file://{root}/clips", "--output", f"file://{root}/out"]
    arguments += ["--autoencoders", json.dumps(autoencoders), "--frames", "13"]
    job.main([*arguments, "--i3d", f"file://{root}/i3d.pt"])
    return storage.read_json(f"file://{root}/out/vae_evaluation.json")


def test_every_kind_of_autoencoder_has_its_row(result, root):
    table = {entry["method"]: entry for entry in result["autoencoders"]}
    assert list(table) == ["ours", "cogvideox", "sd", "released"]
    for entry in table.values():
        assert entry["clips"] == 3 and entry["errors"] == 1
        assert 3 < entry["psnr_rgb"]["mean"] < 30 and 0 < entry["ssim_rgb"]["mean"] < 1
        assert entry["rfvd"]["value"] > 0 and entry["rfvd"]["clips"] == 3
        assert entry["frames"] == [13] and entry["sizes"] == ["70x58"]
    assert [table[name]["about"]["time_compression"] for name in ("ours", "cogvideox", "sd")] == [4, 4, None]
    assert all(entry["about"]["space_compression"] == 8 for entry in table.values())
    own = sum(p.numel() for p in CausalVideoAutoencoder(tiny_models.VAE).parameters())
    assert table["ours"]["about"]["parameters_m"] == pytest.approx(own / 1e6)
    page = (root / "out" / "vae_evaluation.md").read_text()
    assert (
        "| CogVideoX, as printed in the paper | 215.6 | 4 | 8 | 16 | 34.30 | 0.9650 | 0.0623 | 6.06 |" in page
    )
    assert "rFVD of 3 clips: under 400" in page and "no LPIPS: `lpips` is none" in page
    assert "13 | 70x58 |" in page


def test_a_clip_that_is_too_short_is_a_row_with_its_reason(result):
    (row,) = [row for row in result["clips"] if row["clip"] == "short" and row["method"] == "sd"]
    assert "short.mkv: it has 5 frames, `frames` asks for 13" in row["error"]


def test_the_numbers_are_those_of_the_reconstruction(result, root, clips):
    other = DiffusersAutoencoder(root / "cogvideox", "cpu")
    made = {name: other.reconstruct(np.stack(frames)) for name, frames in clips.items()}
    for name, frames in clips.items():
        (row,) = [
            row for row in result["clips"] if row["clip"] == Path(name).stem and row["method"] == "cogvideox"
        ]
        assert made[name].shape == (13, 58, 70, 3)
        scores = [psnr_ssim.full_reference_scores(a, b) for a, b in zip(made[name], frames, strict=True)]
        assert row["psnr_rgb"] == pytest.approx(np.mean([s["psnr_rgb"] for s in scores]))
    features = frechet.VideoFeatures(root / "i3d.pt")
    true, reconstructed = (
        np.stack([features(np.stack(side[name])) for name in clips]) for side in (clips, made)
    )
    table = {entry["method"]: entry for entry in result["autoencoders"]}
    expected = frechet.frechet_distance(true, reconstructed)
    assert table["cogvideox"]["rfvd"]["value"] == pytest.approx(expected, rel=1e-4)


def test_diffusers_sees_what_it_was_made_for(root, clips):
    """9 frames are 8n+1 and 56x64 whole latent pixels: nothing is padded, the network gets the clip."""
    clip = np.stack(clips["cup.mp4"])[:9, :56, :64]
    network = diffusers.AutoencoderKLCogVideoX.from_pretrained(root / "cogvideox")
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = network.decode(network.encode(video).latent_dist.mode()).sample
    expected = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.array_equal(DiffusersAutoencoder(root / "cogvideox", "cpu").reconstruct(clip), expected)


def test_frames_stay_in_step_where_the_clip_is_padded(root, clips):
    """CogVideoX decodes an even number of latents to frames out of step, so 13 frames become 17 for it."""
    other = DiffusersAutoencoder(root / "cogvideox", "cpu")
    clip = np.stack(clips["cup.mp4"])
    padded = np.concatenate([clip, clip[-1:].repeat(4, axis=0)])
    assert np.array_equal(other.reconstruct(clip), other.reconstruct(padded)[:13])


def test_cosmos_is_one_too(tmp_path, clips):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 16, 16), "decode_block_out_channels": (8, 8, 16, 16)}
    cosmos = diffusers.AutoencoderKLCosmos(**widths, attention_resolutions=(32,), resolution=64, num_layers=1)
    cosmos.save_pretrained(tmp_path)
    loaded = DiffusersAutoencoder(tmp_path, "cpu")
    assert (loaded.space_factor, loaded.time_factor) == (8, 8)
    assert loaded.reconstruct(np.stack(clips["box.mp4"])).shape == (13, 58, 70, 3)


def test_frames_can_be_brought_to_one_size(root):
    config = config_of(root, size=[32, 48], autoencoders={"sd": f"file://{root}/sd"})
    row = next(row for row in evaluate_vae.plan_rows(config) if row["clip"] == "cup")
    measured = evaluate_vae.Measure(config)(row)["result"]
    assert measured["error"] is None and (measured["height"], measured["width"]) == (32, 48)


def test_lpips_is_null_unless_named_and_a_mean_over_frames(root):
    clip = np.zeros((3, 32, 32, 3), np.uint8)
    torch.manual_seed(0)
    network = Lpips((4, 4, 4, 4, 4))
    other = clip.copy()
    other[0] = 200
    alone = evaluate_vae.perceptual_distance(network, other[:1], clip[:1])
    assert alone > 0 and evaluate_vae.perceptual_distance(network, clip, clip) == 0
    assert evaluate_vae.perceptual_distance(network, other, clip) == pytest.approx(alone / 3, rel=1e-5)
    assert evaluate_vae.Measure(config_of(root)).lpips is None


@pytest.mark.parametrize("case", ["nothing", "unet", "pickled", "missing"])
def test_what_is_no_autoencoder_is_one_line(root, tmp_path, case):
    if case == "unet":
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    if case == "pickled":
        vae = diffusers.AutoencoderKL(**IMAGE_LEVELS)
        vae.save_pretrained(tmp_path, safe_serialization=False)
    url = f"file://{tmp_path / 'none.safetensors' if case == 'missing' else tmp_path}"
    config = config_of(root, autoencoders={"x": url})
    error = evaluate_vae.Measure(config)(evaluate_vae.plan_rows(config)[0])["result"]["error"]
    assert error and "\n" not in error and error.startswith("x: ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"autoencoders": {}}, "autoencoders: empty"),
        ({"autoencoders": {"a": "relative"}}, r"autoencoders\.a: .* is relative"),
        ({"frames": 0}, "frames: 0"),
        ({"frames": 9, "i3d": "file:///i3d.pt"}, "frames: 9; rFVD needs at least 10"),
        ({"size": [256]}, "size"),
        ({"lpips": "squeeze"}, "lpips .* is relative"),
        ({"lpips": "file:///nowhere"}, "lpips: file:///nowhere has no vgg16"),
    ],
)
def test_wrong_configs_name_their_key(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **wrong)
