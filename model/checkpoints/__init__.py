"""Weights in and out: files of tensors, and each network filled with exactly what its file has.

Imports the networks, and nothing of the model imports it; only this package opens files.
"""

from model.checkpoints.autoencoder import (
    build_autoencoder,
    load_autoencoder,
    load_inflated_autoencoder,
    released_autoencoder_config,
    save_autoencoder,
)
from model.checkpoints.files import (
    check_fits,
    config_from_header,
    load_strict,
    read_header,
    read_tensor,
    read_tensors,
    write_tensors,
)
from model.checkpoints.scorers import (
    build_dists,
    build_lpips,
    load_aesthetic_head,
    load_clip,
    load_dover,
    load_fast_vqa,
    load_musiq,
)
from model.checkpoints.transformer import (
    build_backbone,
    load_nadit,
    load_sd3_transformer,
    released_backbone_config,
    save_backbone,
    stated_backbone,
)

__all__ = [
    "build_autoencoder",
    "build_backbone",
    "build_dists",
    "build_lpips",
    "check_fits",
    "config_from_header",
    "load_aesthetic_head",
    "load_autoencoder",
    "load_clip",
    "load_dover",
    "load_fast_vqa",
    "load_inflated_autoencoder",
    "load_musiq",
    "load_nadit",
    "load_sd3_transformer",
    "load_strict",
    "read_header",
    "read_tensor",
    "read_tensors",
    "released_autoencoder_config",
    "released_backbone_config",
    "save_autoencoder",
    "save_backbone",
    "stated_backbone",
    "write_tensors",
]
