"""The video autoencoder's weights: the released file, ours, and an image autoencoder's to start from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoints.files import (
    build_network,
    config_from_header,
    read_header,
    read_tensors,
    write_tensors,
)
from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder
from model.vae.inflation import inflate


def build_autoencoder(
    config: AutoencoderConfig, state: Mapping[str, Tensor], source: str | Path
) -> CausalVideoAutoencoder:
    """The autoencoder of `config` holding `state`, in evaluation mode."""
    return build_network(lambda: CausalVideoAutoencoder(config), state, source)


def load_autoencoder(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalVideoAutoencoder:
    """An autoencoder saved by `save_autoencoder`, or the released `ema_vae` (.pth or .safetensors).

    A file that states no configuration is taken for the released one and checked strictly. Whatever
    precision the file has, the network computes in `dtype`.
    """
    header = read_header(path)
    config = FULL_CONFIG
    if "autoencoder" in header:
        config = config_from_header(AutoencoderConfig, header["autoencoder"], path)
    return build_autoencoder(config, read_tensors(path, device), path).to(dtype)


def load_inflated_autoencoder(path: str | Path, config: AutoencoderConfig) -> CausalVideoAutoencoder:
    """An autoencoder to start training from: an image autoencoder's weights (diffusers names), inflated."""
    return build_autoencoder(config, inflate(read_tensors(path), config), path).to(torch.float32)


def save_autoencoder(
    path: str | Path, autoencoder: CausalVideoAutoencoder, header: Mapping[str, Any]
) -> None:
    """Write weights and configuration; `header` holds further facts to store (step, source)."""
    config = dataclasses.asdict(autoencoder.config)
    write_tensors(path, autoencoder.state_dict(), {**header, "autoencoder": config})


def released_autoencoder_config(released: Mapping[str, Any]) -> AutoencoderConfig:
    """Our configuration from the released code's; scale and shift are constants there, not in it."""
    return AutoencoderConfig(
        widths=tuple(released["block_out_channels"]),
        latent_channels=released["latent_channels"],
        norm_groups=released["norm_num_groups"],
        encoder_layers=released["layers_per_block"],
        decoder_layers=released["layers_per_block"] + 1,
        time_halvings=released["temporal_scale_num"],
        latent_scale=FULL_CONFIG.latent_scale,
        latent_shift=FULL_CONFIG.latent_shift,
    )
