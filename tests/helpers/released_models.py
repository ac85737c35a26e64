"""Released checkpoints at tiny widths: the real structure and names, seeded random weights."""

import dataclasses
from pathlib import Path

import pytest
import torch

from model import checkpoints
from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiT
from model.dit.swin_mmdit import SwinMMDiTConfig
from model.vae.autoencoder import CausalVideoAutoencoder
from pipeline.weights.backbones import ModelConfig
from tests.helpers import tiny_models

TEXT_DIM = 24
SHAPES = {
    size: dataclasses.replace(
        config,
        num_layers=3,
        num_heads=2,
        head_dim=16,
        width=32,
        patch=(1, 2, 2),
        in_channels=33,
        out_channels=16,
        text_dim=TEXT_DIM,
        mlp_ratio=4,
        separate_layers=1 if size == "3b" else 3,
        rotary_dim=16 if size == "3b" else 8,
        windows=(4, 3, 3),
    )
    for size, config in (("3b", SEEDVR_3B), ("7b", SEEDVR_7B))
}
KINDS = ("seedvr-3b", "seedvr-7b", "seedvr2-3b", "seedvr2-7b")


def save_backbone(path: Path, kind: str) -> str:
    """A random backbone in fp16, as the community ships them, with its shape in the header; its URL."""
    torch.manual_seed(2)
    checkpoints.save_backbone(path, NaDiT(SHAPES[kind[-2:]]).half(), {})
    return f"file://{path}"


def sd3_transformer(config: SwinMMDiTConfig) -> torch.nn.Module:
    """diffusers' SD3 transformer of this shape, its position table zero."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=config.num_layers,
        attention_head_dim=config.head_dim, num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim, caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim, out_channels=16, pos_embed_max_size=16,
    )  # fmt: skip
    model.pos_embed.pos_embed.zero_()
    return model


def save_vae(path: Path) -> str:
    """A random autoencoder as one file, like `ema_vae`; its URL."""
    torch.manual_seed(0)
    checkpoints.save_autoencoder(path, CausalVideoAutoencoder(tiny_models.VAE), {})
    return f"file://{path}"


def save_prompts(folder: Path) -> tuple[str, str]:
    """Two prompt tensors as released: bf16, bare, of different lengths; their URLs."""
    torch.manual_seed(3)
    urls = []
    for name, tokens in (("pos_emb.pt", 6), ("neg_emb.pt", 7)):
        torch.save(torch.randn(tokens, TEXT_DIM).bfloat16(), folder / name)
        urls.append(f"file://{folder / name}")
    return urls[0], urls[1]


def model_config(folder: Path, kind: str, **changes) -> ModelConfig:
    """All files of a released model, and the config that names them."""
    positive, negative = save_prompts(folder)
    values = {
        "weights": save_backbone(folder / f"{kind}.safetensors", kind),
        "vae": save_vae(folder / "ema_vae.safetensors"),
        "kind": kind,
        "positive": positive,
        "negative": negative,
    }
    return ModelConfig(**{**values, **changes})
