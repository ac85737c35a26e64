"""The released SeedVR backbones: 3B ("dit_v2"; SeedVR2 has the same shape) and 7B ("dit").

Same packed interface as `swin_mmdit.SwinMMDiT`, same windows, rotary, attention and packing modules;
parameter names are those of the released files, so that they load strictly. Unlike the paper's model:
RMS norms, one time embedding for all layers with learned vectors per block (adaLN "single"), q/k norm,
no pooled text. Text queries run once per window and are averaged over the sample's windows.

What the released code does with one sample a call is what a packed call does here for each of its samples
(that code mixes up the text of packed samples in the 3B). Source: SeedVR commit 673b563, Apache-2.0.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dit.attention import window_attention
from model.dit.nadit_layers import (
    GeluMLP,
    Modulation,
    OutputModulation,
    Projection,
    Rope,
    Scale,
    SwiGLU,
    TimeEmbedding,
    gate,
    modulate,
    rms_norm,
)
from model.dit.packing import (
    LayerWindows,
    PackingPlan,
    WindowLayout,
    packing_plan,
    patch_grids,
    patchify,
    unpatchify,
)
from model.dit.rotary import (
    axis_frequencies,
    normalised_frequencies,
    released_3b_rotation,
    released_7b_rotation,
    rotate,
)
from model.dit.windows import RELEASED_WINDOW, Grid, WindowSize, released_windows


@dataclass(frozen=True)
class NaDiTConfig:
    """The whole shape of one released backbone."""

    num_layers: int
    """Number of transformer layers."""
    num_heads: int
    """Number of attention heads in every layer."""
    head_dim: int
    """Channels of each attention head."""
    width: int
    """Channels of the hidden states."""
    patch: tuple[int, int, int]
    """Latent pixels (frames, height, width) that one token covers."""
    in_channels: int
    """Channels of the network's input: the noisy latent, the low-quality latent and a mask."""
    out_channels: int
    """Channels of the predicted velocity."""
    text_dim: int
    """Width of the text embeddings."""
    mlp_ratio: int
    """Hidden width of the MLPs as a multiple of the network's width, before SwiGLU's correction."""
    separate_layers: int
    """Number of leading layers with separate weights for text and video; later layers share theirs ("3b"
    only)."""
    rotary_dim: int
    """Channels of each head that are rotated by position, a third each for time, height and width."""
    windows: WindowSize
    """Window counts (frames, height, width) relative to a 720p picture; every second layer shifts its windows
    by half."""
    swiglu: bool
    """MLPs are SwiGLUs without biases instead of Linear, GELU, Linear."""
    multimodal_rotary: bool
    """Text is rotated too, and all positions are whole numbers; else only video is, by positions from -1 to 1
    over its window."""
    modulated_head: bool
    """A norm, and a shift and scale by time, come before the last projection."""
    text_ends_at_last_attention: bool
    """The last block's text gives keys and values alone: neither modulation nor MLP of its own."""

    def layer_windows(self) -> tuple[LayerWindows, ...]:
        """Windows of each layer."""
        return tuple(
            LayerWindows(released_windows, self.windows, shifted=i % 2 == 1) for i in range(self.num_layers)
        )

    def shares(self, layer: int) -> bool:
        """Whether text and video have one set of weights in this layer."""
        return layer >= self.separate_layers


def config_values(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored NaDiTConfig, also of one from version 0.1.0, which named its structure.

    `kind` stood for all four flags ("3b" had them, "7b" none), and a "7b" shared no layers.
    """
    values = dict(stored)
    if "kind" in values:
        is_3b = values.pop("kind") == "3b"
        flags = ("swiglu", "multimodal_rotary", "modulated_head", "text_ends_at_last_attention")
        values |= dict.fromkeys(flags, is_3b)
        if not is_3b:
            values["separate_layers"] = values["num_layers"]
    return values


SEEDVR_3B = NaDiTConfig(
    num_layers=32,
    num_heads=20,
    head_dim=128,
    width=2560,
    patch=(1, 2, 2),
    in_channels=33,
    out_channels=16,
    text_dim=5120,
    mlp_ratio=4,
    separate_layers=10,
    rotary_dim=128,
    windows=RELEASED_WINDOW,
    swiglu=True,
    multimodal_rotary=True,
    modulated_head=True,
    text_ends_at_last_attention=True,
)
"""SeedVR-3B and SeedVR2-3B: 3,391,475,776 parameters."""

SEEDVR_7B = NaDiTConfig(
    num_layers=36,
    num_heads=24,
    head_dim=128,
    width=3072,
    patch=(1, 2, 2),
    in_channels=33,
    out_channels=16,
    text_dim=5120,
    mlp_ratio=4,
    separate_layers=36,
    rotary_dim=64,
    windows=RELEASED_WINDOW,
    swiglu=False,
    multimodal_rotary=False,
    modulated_head=False,
    text_ends_at_last_attention=False,
)
"""SeedVR-7B: 8,239,607,872 parameters."""


class NaDiT(nn.Module):
    """The network: velocity of packed noisy latents."""

    def __init__(self, config: NaDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_pixels = config.width, math.prod(config.patch)
        self.layers = config.layer_windows()
        self.vid_in = Projection(config.in_channels * patch_pixels, width)
        self.txt_in = nn.Linear(config.text_dim, width)
        self.emb_in = TimeEmbedding(width)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_layers)])
        self.vid_out_norm = Scale(width) if config.modulated_head else None
        self.vid_out_ada = OutputModulation(width) if config.modulated_head else None
        self.vid_out = Projection(width, config.out_channels * patch_pixels)
        self.checkpointed_blocks: frozenset[int] = frozenset()

    def checkpoint_activations(self, blocks: Iterable[int]) -> None:
        """Recompute these blocks' activations in the backward pass instead of keeping them."""
        self.checkpointed_blocks = frozenset(blocks)

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        video_shapes: Sequence[Grid],
        text_lengths: Sequence[int],
        timestep: Tensor,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Velocity of each latent pixel: (sum of latent pixels, 16).

        video: (sum of latent pixels, 33); text: (sum of text tokens, text_dim); video_shapes: (T, H, W) in
        latent pixels, H and W even; timestep: (B,) in 0..1000; pooled: not used, these models have none.
        """
        config = self.config
        grids = patch_grids(video_shapes, config.patch)
        plan = packing_plan(self.layers, grids, text_lengths, video.device)
        dtype = self.txt_in.weight.dtype
        modulation = self.emb_in(timestep, dtype)
        x = self.vid_in(patchify(video.to(dtype), video_shapes, config.patch))
        c = self.txt_in(text.to(dtype))
        for index, (block, layout, reorder) in enumerate(
            zip(self.blocks, plan.layouts, plan.reorder, strict=True)
        ):
            if reorder is not None:
                x = x[reorder]
            if index in self.checkpointed_blocks and torch.is_grad_enabled():
                x, c = checkpoint(block, x, c, modulation, layout, plan, use_reentrant=False)
            else:
                x, c = block(x, c, modulation, layout, plan)
        if self.vid_out_norm is not None and self.vid_out_ada is not None:
            x = self.vid_out_ada(self.vid_out_norm(x), modulation, plan.sample_of_token)
        # The head works per token, so 64 channels go back to packed order instead of the full width.
        return unpatchify(self.vid_out(x)[plan.restore], grids, config.patch)


class Attention(nn.Module):
    """Windowed joint attention of video and text."""

    def __init__(self, config: NaDiTConfig, streams: Sequence[str]) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.multimodal_rotary = config.multimodal_rotary
        inner = config.num_heads * config.head_dim
        self.proj_qkv = nn.ModuleDict({s: nn.Linear(config.width, 3 * inner, bias=False) for s in streams})
        self.proj_out = nn.ModuleDict({s: nn.Linear(inner, config.width) for s in streams})
        self.norm_q = nn.ModuleDict({s: Scale(config.head_dim) for s in streams})
        self.norm_k = nn.ModuleDict({s: Scale(config.head_dim) for s in streams})
        frequencies = axis_frequencies if config.multimodal_rotary else normalised_frequencies
        self.rope = Rope(frequencies(config.rotary_dim // 3))

    def forward(
        self, x: Tensor, c: Tensor, layout: WindowLayout, video: str, text: str
    ) -> tuple[Tensor, Tensor]:
        """x: (patch tokens, width), window order; c: (text tokens, width); video, text: weights' names."""
        video_q, video_k, video_v = self._qkv(x, video)
        text_q, text_k, text_v = self._qkv(c, text)
        if self.multimodal_rotary:
            rotation, text_rotation = released_3b_rotation(layout, self.head_dim, self.rotary_dim)
            text_q, text_k = rotate(text_q, text_rotation), rotate(text_k, text_rotation)
        else:
            rotation = released_7b_rotation(layout, self.head_dim, self.rotary_dim)
        video_q, video_k = rotate(video_q, rotation), rotate(video_k, rotation)
        x, attended = window_attention((video_q, video_k, video_v), (text_q, text_k, text_v), layout)
        assert attended is not None
        return self.proj_out[video](x.flatten(1)), self.proj_out[text](attended.flatten(1))

    def _qkv(self, x: Tensor, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.proj_qkv[stream](x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return self.norm_q[stream](q), self.norm_k[stream](k), v


class Block(nn.Module):
    """One block. In the 3B's last one, text enters attention unmodulated and takes nothing from it."""

    def __init__(self, config: NaDiTConfig, layer: int) -> None:
        super().__init__()
        self.text_ends_here = config.text_ends_at_last_attention and layer == config.num_layers - 1
        shared = config.shares(layer)
        streams = ("all",) if shared else ("vid", "txt")
        self.video, self.text = ("all", "all") if shared else ("vid", "txt")
        mlp = SwiGLU if config.swiglu else GeluMLP
        self.attn = Attention(config, streams)
        beyond_attention = (self.video,) if self.text_ends_here else streams
        self.mlp = nn.ModuleDict({s: mlp(config.width, config.mlp_ratio) for s in beyond_attention})
        self.ada = nn.ModuleDict({s: Modulation(config.width) for s in beyond_attention})

    def forward(
        self, x: Tensor, c: Tensor, modulation: Tensor, layout: WindowLayout, plan: PackingPlan
    ) -> tuple[Tensor, Tensor]:
        """x: (patch tokens, width), window order; c: (text tokens, width); both are returned."""
        tokens, text_tokens = plan.sample_of_token, plan.sample_of_text
        video_attention, video_mlp = self.ada[self.video](modulation)
        video = modulate(x, video_attention, tokens)
        if self.text_ends_here:
            attended, _ = self.attn(video, rms_norm(c), layout, self.video, self.text)
        else:
            text_attention, text_mlp = self.ada[self.text](modulation)
            text = modulate(c, text_attention, text_tokens)
            attended, attended_text = self.attn(video, text, layout, self.video, self.text)
            c = gate(c, attended_text, text_attention, text_tokens)
            c = gate(c, self.mlp[self.text](modulate(c, text_mlp, text_tokens)), text_mlp, text_tokens)
        x = gate(x, attended, video_attention, tokens)
        return gate(x, self.mlp[self.video](modulate(x, video_mlp, tokens)), video_mlp, tokens), c
