"""A start as wavelets: the untrained network already carries a picture; widths that cannot are named."""

import dataclasses

import pytest
import torch
from skimage import data

from model.vae.autoencoder import CausalVideoAutoencoder
from tests.helpers.tiny_models import WAVELET_VAE, started_as_wavelets


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of values in [-1, 1]."""
    return float(-10 * torch.log10(((a - b) / 2).square().mean()))


@torch.no_grad()
@pytest.mark.parametrize("config", [WAVELET_VAE, dataclasses.replace(WAVELET_VAE, widths=(12, 24, 40, 64))])
def test_an_untrained_network_carries_a_moving_picture(config):
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    video = torch.stack([picture[:, 100:228, 120 + t : 248 + t] for t in range(9)], dim=1)[None]  # a slow pan
    autoencoder = started_as_wavelets(config)
    mean, log_variance = autoencoder.encode(video)
    assert psnr_db(autoencoder.decode_unscaled(mean), video) > 23
    # The posterior's noise does not drown it.
    noisy = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape)
    assert psnr_db(autoencoder.decode_unscaled(noisy), video) > 21
    random = CausalVideoAutoencoder(config)
    assert psnr_db(random.decode_unscaled(random.encode(video)[0]), video) < 15


def test_every_parameter_still_gets_a_gradient_or_is_one_step_from_it():
    # A branch that ends in zeros learns its last convolution first.
    autoencoder = started_as_wavelets(WAVELET_VAE)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    mean, log_variance = autoencoder.encode(video)
    loss = (autoencoder.decode_unscaled(mean) - video).abs().mean() + log_variance.square().mean()
    loss.backward()
    still = {name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in still if ".conv2." in name or "conv_out." in name or "to_out" in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_groups": 2}, "norm_groups 2: a start as wavelets needs 1"),
        ({"widths": (6, 16, 36, 40)}, "level 0 has 6 channels, a start as wavelets needs 8"),
        ({"widths": (8, 16, 36, 36)}, "widths: a start as wavelets needs the first two to differ"),
        ({"widths": (8, 16, 36, 32)}, "level 3 has 32 channels, a start as wavelets needs 34"),
    ],
)
def test_what_cannot_hold_it_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        started_as_wavelets(dataclasses.replace(WAVELET_VAE, **change))
