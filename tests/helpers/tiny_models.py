"""Models of the real structure at tiny widths with seeded random weights, as folders, for several tests."""

from pathlib import Path

import torch

from model.dit.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from model.vae.wavelet_start import start_as_wavelets
from pipeline.weights import weights_folder

VAE = AutoencoderConfig(
    widths=(8, 8, 16, 16),
    latent_channels=16,
    norm_groups=4,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)
WAVELET_VAE = AutoencoderConfig(
    widths=(8, 16, 36, 40),
    latent_channels=16,
    norm_groups=1,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=1.0,
    latent_shift=0.0,
)
"""As narrow as a start as wavelets can be."""
DIT = SwinMMDiTConfig(
    num_layers=2,
    num_heads=2,
    head_dim=16,
    mlp_ratio=2,
    patch=(1, 2, 2),
    in_channels=33,
    out_channels=16,
    text_dim=24,
    pooled_dim=12,
    windows=((2, 8, 8),),
    shifted=(False, True),
    rotary=True,
)


def started_as_wavelets(config: AutoencoderConfig) -> CausalVideoAutoencoder:
    """An autoencoder as it starts out, already a codec."""
    torch.manual_seed(0)
    autoencoder = CausalVideoAutoencoder(config)
    start_as_wavelets(autoencoder)
    return autoencoder


def save_vae(folder: Path | str) -> str:
    """A random autoencoder's weights folder (a path or a URL); returns its URL."""
    torch.manual_seed(0)
    vae = CausalVideoAutoencoder(VAE)
    url = folder if isinstance(folder, str) else f"file://{folder}"
    weights_folder.save_weights(url, weights_folder.VAE, VAE, vae.state_dict())
    return url


def save_dit(folder: Path) -> str:
    """A random transformer's weights folder, its zero-initialised layers random too; returns its URL."""
    torch.manual_seed(1)
    dit = SwinMMDiT(DIT)
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in dit.state_dict().items()}
    url = f"file://{folder}"
    null = weights_folder.Prompts(torch.randn(7, DIT.text_dim), torch.randn(DIT.pooled_dim))
    weights_folder.save_weights(url, weights_folder.SWIN_MMDIT, DIT, state, null)
    return url
