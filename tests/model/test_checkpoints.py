"""Weights in and out: strict, in one message; the verify command on recorded cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints import (
    build_autoencoder,
    load_autoencoder,
    load_strict,
    read_header,
    read_tensors,
    released_autoencoder_config,
    save_autoencoder,
)
from model.checkpoints.__main__ import main
from model.vae import AutoencoderConfig, CausalVideoAutoencoder

VAE_CASE = Path(__file__).parents[1] / "data" / "parity" / "vae_a.safetensors"
CONFIG = AutoencoderConfig(
    widths=(4, 8),
    latent_channels=2,
    norm_groups=2,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=1,
    latent_scale=0.5,
    latent_shift=0.1,
)


@pytest.fixture
def autoencoder() -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(CONFIG)


def test_autoencoder_saves_and_loads_with_its_configuration(autoencoder, tmp_path):
    save_autoencoder(tmp_path / "vae.safetensors", autoencoder, {"step": 3})
    loaded = load_autoencoder(tmp_path / "vae.safetensors")
    assert loaded.config == CONFIG
    assert read_header(tmp_path / "vae.safetensors")["step"] == 3
    video = torch.rand(1, 3, 3, 8, 8)
    assert torch.equal(loaded.encode(video)[0], autoencoder.encode(video)[0])


def test_pth_and_safetensors_hold_the_same(autoencoder, tmp_path):
    torch.save(autoencoder.state_dict(), tmp_path / "vae.pth")
    loaded = build_autoencoder(CONFIG, read_tensors(tmp_path / "vae.pth"), "vae.pth")
    assert all(torch.equal(t, autoencoder.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_load_names_everything_that_differs(autoencoder):
    state = dict(autoencoder.state_dict())
    del state["encoder.conv_in.bias"]
    state["decoder.extra"] = torch.zeros(1)
    state["decoder.conv_out.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as told:
        load_strict(autoencoder, state, "some.pth")
    message = str(told.value)
    for word in (
        "some.pth",
        "missing (encoder.conv_in.bias)",
        "decoder.extra",
        "decoder.conv_out.bias (5,) for (3,)",
    ):
        assert word in message
    assert "\n" not in message


def test_released_file_of_another_network_is_refused(autoencoder, tmp_path):
    save_file(autoencoder.state_dict(), tmp_path / "ema_vae.safetensors")
    with pytest.raises(ValueError, match="does not fit CausalVideoAutoencoder"):
        load_autoencoder(tmp_path / "ema_vae.safetensors")


@pytest.mark.parametrize("name", ["none.safetensors", "weights.ckpt", "code.pth"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, name):
    if name == "weights.ckpt":
        (tmp_path / name).write_bytes(b"x")
    if name == "code.pth":
        torch.save({"a": "not a tensor"}, tmp_path / name)
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_verify_passes_the_recorded_autoencoder(capsys):
    assert main(["verify", str(VAE_CASE)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok") == 36  # 4 clips x (one pass, slices of 4 and 8) x (mean, logvar, dec)


@pytest.mark.parametrize(("halvings", "frames"), [(0, 3), (1, 7), (2, 13)])
def test_verify_takes_other_shapes_and_configurations(tmp_path, capsys, halvings, frames):
    torch.manual_seed(1)
    released = {
        "block_out_channels": [8, 16, 24],
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "temporal_scale_num": halvings,
    }
    autoencoder = CausalVideoAutoencoder(released_autoencoder_config(released)).eval()
    tensors = {f"state.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    for name, size in (("clip0", (2, 3, frames, 20, 28)), ("still", (1, 3, 1, 8, 12))):
        with torch.no_grad():
            video = torch.rand(size) * 2 - 1
            mean, log_variance = autoencoder.encode(video)
            tensors |= {f"in.{name}.x": video, f"out.{name}.mean": mean, f"out.{name}.logvar": log_variance}
            tensors[f"out.{name}.dec"] = autoencoder.decode_unscaled(mean)
    header = {"json": json.dumps({"case": "vae_other", "config": released})}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "c.safetensors", header)
    assert main(["verify", str(tmp_path / "c.safetensors")]) == 0
    assert capsys.readouterr().out.count(" ok") == 18


@pytest.mark.parametrize("change", [1e-4, float("nan")])
def test_verify_fails_on_a_wrong_number(tmp_path, capsys, change):
    tensors = load_file(VAE_CASE)
    clips = {name: t for name, t in tensors.items() if name.startswith("state.") or ".clip2." in name}
    clips["out.clip2.dec"][0, 0, 0, 0, 0] += change
    header = {"json": json.dumps(read_header(VAE_CASE))}
    save_file(clips, tmp_path / "wrong.safetensors", metadata=header)
    assert main(["verify", str(tmp_path / "wrong.safetensors")]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_verify_refuses_what_it_does_not_know(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    command = [sys.executable, "-m", "model.checkpoints", "verify", str(tmp_path / "other.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=VAE_CASE.parents[3])
    assert done.returncode == 1
    assert "not a parity case" in done.stderr
    assert "Traceback" not in done.stderr
    for kind in ("vae", "dit", "keys_dover_mobile"):
        assert kind in done.stderr


def test_verify_takes_the_kind_from_the_option_where_the_name_does_not_say(tmp_path, capsys):
    case = tmp_path / "recorded.json"
    case.write_text((VAE_CASE.parent / "windows_a.json").read_text())
    assert main(["verify", str(case)]) == 1
    assert main(["verify", "--kind", "windows", str(case)]) == 0
    assert main(["verify", "--kind", "sampler", str(case)]) == 1
    assert "recorded.json: not a whole case of kind sampler: it has no 'runs'" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(VAE_CASE.parent.glob("keys_*.json")), ids=lambda path: path.stem)
def test_verify_compares_names_and_shapes_of_full_size(path, tmp_path, capsys):
    assert main(["verify", str(path)]) == 0
    recorded = json.loads(path.read_text())
    rows = recorded["keys"]
    if isinstance(rows, list):
        rows[0]["shape"][0] += 1
    else:
        next(iter(rows.values()))[0][0] += 1
    (tmp_path / path.name).write_text(json.dumps(recorded))
    assert main(["verify", str(tmp_path / path.name)]) == 1
    assert capsys.readouterr().out.count("ABOVE") == 1
