"""A video autoencoder inflated from an image autoencoder codes still images as that one does."""

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints import load_inflated_autoencoder
from model.vae import AutoencoderConfig

CONFIG = AutoencoderConfig(
    widths=(8, 8, 16, 16),
    latent_channels=16,
    norm_groups=4,
    encoder_layers=2,
    decoder_layers=3,
    time_halvings=2,
    latent_scale=1.5305,
    latent_shift=0.0609,
)


@pytest.fixture(scope="module")
def image_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(  # Stable Diffusion 3's structure, narrow
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CONFIG.widths,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_still_pictures_get_the_image_models_latents(image_model, tmp_path, frames):
    save_file(image_model.state_dict(), tmp_path / "image.safetensors")
    autoencoder = load_inflated_autoencoder(tmp_path / "image.safetensors", CONFIG)
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    expected = image_model.encode(image).latent_dist
    mean, log_variance = autoencoder.encode(image[:, :, None].expand(-1, -1, frames, -1, -1))
    for latent_frame in range(mean.shape[2]):
        assert (mean[:, :, latent_frame] - expected.mean).abs().max() <= 1e-5
        assert (log_variance[:, :, latent_frame] - expected.logvar).abs().max() <= 1e-5
    decoded = autoencoder.decode_unscaled(mean)
    assert decoded.shape[2] == frames
    truth = image_model.decode(expected.mean).sample
    assert (decoded - truth[:, :, None]).abs().max() <= 2e-5


def test_an_image_model_of_another_width_is_refused(image_model, tmp_path):
    state = image_model.state_dict()
    state["encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    save_file(state, tmp_path / "image.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight \(4, 3, 3, 3, 3\)"):
        load_inflated_autoencoder(tmp_path / "image.safetensors", CONFIG)
