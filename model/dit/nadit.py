"""The released SeedVR backbones: 3B ("dit_v2"; SeedVR2 has the same shape) and 7B ("dit").

Same packed interface as `swin_mmdit.SwinMMDiT`, same windows, rotary, attention and packing modules;
parameter names are those of the released files, so that they load strictly. Unlike the paper's model:
RMS norms, one time embedding for all layers with learned vectors per block (adaLN "single"), q/k norm,
no pooled text. Text queries run once per window and are averaged over the sample's windows.

What the released code does with one sample a call is what a packed call does here for each of its samples
(that code mixes up the text of packed samples in the 3B). Source: SeedVR commit 673b563, Apache-2.0.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dit.attention import window_attention
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

NORM_EPS = 1e-5
SINUSOID_WIDTH = 256

Kind = Literal["3b", "7b"]


@dataclass(frozen=True)
class NaDiTConfig:
    """The whole shape of one released backbone."""

    kind: Kind
    """Structure: "3b" has SwiGLU, shared layers, rotated text and a modulated head; "7b" has none of them."""
    num_layers: int
    num_heads: int
    head_dim: int
    width: int
    patch: tuple[int, int, int]
    """Latent pixels (T, H, W) per token."""
    in_channels: int
    out_channels: int
    text_dim: int
    mlp_ratio: int
    separate_layers: int
    """Layers before this one have weights of their own for text and video; later ones share ("3b" only)."""
    rotary_dim: int
    """Channels of a head from which t, h and w get a third each for their rotation."""
    windows: WindowSize
    """Window counts (T, H, W) relative to a 720p picture; odd layers are shifted by half."""

    def layer_windows(self) -> tuple[LayerWindows, ...]:
        """Windows of each layer."""
        return tuple(
            LayerWindows(released_windows, self.windows, shifted=i % 2 == 1) for i in range(self.num_layers)
        )

    def shares(self, layer: int) -> bool:
        """Whether text and video have one set of weights in this layer."""
        return self.kind == "3b" and layer >= self.separate_layers


SEEDVR_3B = NaDiTConfig(
    kind="3b",
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
)
"""SeedVR-3B and SeedVR2-3B: 3,391,475,776 parameters."""

SEEDVR_7B = NaDiTConfig(
    kind="7b",
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
        self.vid_out_norm = Scale(width) if config.kind == "3b" else None
        self.vid_out_ada = OutputModulation(width) if config.kind == "3b" else None
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


# --- parts; attribute names are the released files' ---


class Projection(nn.Module):
    """Linear layer over flattened patches."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Scale(nn.Module):
    """RMS norm over the last dimension with a learned weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


class TimeEmbedding(nn.Module):
    """Time -> one modulation for all layers: (B, attention and MLP, shift and scale and gate, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(SINUSOID_WIDTH, width)
        self.proj_hid = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = F.silu(self.proj_in(sinusoid(timestep).to(dtype)))
        out = self.proj_out(F.silu(self.proj_hid(hidden)))
        return rearrange(out, "b (c layer part) -> b layer part c", layer=2, part=3)


def sinusoid(timestep: Tensor) -> Tensor:
    """(B,) in 0..1000 -> (B, 256) fp32: sines, then cosines, of 10000^(-i/128) t (SD3 has cosines first)."""
    half = SINUSOID_WIDTH // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Modulation(nn.Module):
    """A block's learned shift, scale and gate of attention and MLP, added to the time's.

    The scale has no implicit 1: it is initialised around 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        for layer, part in product(("attn", "mlp"), ("shift", "scale", "gate")):
            noise = torch.randn(width) * width**-0.5
            self.register_parameter(f"{layer}_{part}", nn.Parameter(noise + (part == "scale")))

    def forward(self, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2, 3, width) -> those of attention and of the MLP, each (B, 3, width)."""
        attention, mlp = (modulation + torch.stack(list(self.parameters())).unflatten(0, (2, 3))).unbind(1)
        return attention, mlp


def enter(x: Tensor, modulation: Tensor, sample: Tensor) -> Tensor:
    """RMS norm without weight, times scale, plus shift. modulation: (B, 3, width); sample: (tokens,)."""
    shift, scale, _ = modulation.unbind(1)
    return torch.addcmul(per_token(shift, sample), rms_norm(x), per_token(scale, sample))


def leave(residual: Tensor, x: Tensor, modulation: Tensor, sample: Tensor) -> Tensor:
    """residual + x * gate."""
    return torch.addcmul(residual, x, per_token(modulation[:, 2], sample))


def per_token(vectors: Tensor, sample: Tensor) -> Tensor:
    """(B, width) -> each token's own; one sample's is left to broadcast."""
    return vectors if len(vectors) == 1 else vectors[sample]


class OutputModulation(nn.Module):
    """The 3B head's shift and scale. It takes the time's *attention* part.

    The released code reads that slice by a collision of two keys in a cache; its weights were trained so.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_shift = nn.Parameter(torch.randn(width) * width**-0.5)
        self.out_scale = nn.Parameter(1.0 + torch.randn(width) * width**-0.5)

    def forward(self, x: Tensor, modulation: Tensor, sample: Tensor) -> Tensor:
        shift, scale = modulation[:, 0, 0] + self.out_shift, modulation[:, 0, 1] + self.out_scale
        return torch.addcmul(per_token(shift, sample), x, per_token(scale, sample))


class GeluMLP(nn.Module):
    """The 7B's: Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, ratio * width)
        self.proj_out = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def swiglu_width(width: int, ratio: int) -> int:
    """Hidden width of the 3B's MLP: 2/3 of the ratio, rounded up to 256s."""
    return 256 * math.ceil(int(2 * width * ratio / 3) / 256)


class SwiGLU(nn.Module):
    """The 3B's: gated by SiLU, no biases."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = swiglu_width(width, ratio)
        self.proj_in_gate = nn.Linear(width, hidden, bias=False)
        self.proj_in = nn.Linear(width, hidden, bias=False)
        self.proj_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(F.silu(self.proj_in_gate(x)) * self.proj_in(x))


class Rope(nn.Module):
    """Holds the frequencies that the released files carry in every block; `rotary.py` has its own."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", frequencies)


class Attention(nn.Module):
    """Windowed joint attention of video and text."""

    def __init__(self, config: NaDiTConfig, streams: Sequence[str]) -> None:
        super().__init__()
        self.kind, self.head_dim, self.rotary_dim = config.kind, config.head_dim, config.rotary_dim
        inner = config.num_heads * config.head_dim
        self.proj_qkv = nn.ModuleDict({s: nn.Linear(config.width, 3 * inner, bias=False) for s in streams})
        self.proj_out = nn.ModuleDict({s: nn.Linear(inner, config.width) for s in streams})
        self.norm_q = nn.ModuleDict({s: Scale(config.head_dim) for s in streams})
        self.norm_k = nn.ModuleDict({s: Scale(config.head_dim) for s in streams})
        frequencies = axis_frequencies if config.kind == "3b" else normalised_frequencies
        self.rope = Rope(frequencies(config.rotary_dim // 3))

    def forward(
        self, x: Tensor, c: Tensor, layout: WindowLayout, video: str, text: str
    ) -> tuple[Tensor, Tensor]:
        """x: (patch tokens, width), window order; c: (text tokens, width); video, text: weights' names."""
        video_q, video_k, video_v = self._qkv(x, video)
        text_q, text_k, text_v = self._qkv(c, text)
        if self.kind == "3b":
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
        self.text_ends_here = config.kind == "3b" and layer == config.num_layers - 1
        shared = config.shares(layer)
        streams = ("all",) if shared else ("vid", "txt")
        self.video, self.text = ("all", "all") if shared else ("vid", "txt")
        mlp = SwiGLU if config.kind == "3b" else GeluMLP
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
        entering = enter(x, video_attention, tokens)
        if self.text_ends_here:
            attended, _ = self.attn(entering, rms_norm(c), layout, self.video, self.text)
        else:
            text_attention, text_mlp = self.ada[self.text](modulation)
            entering_text = enter(c, text_attention, text_tokens)
            attended, attended_text = self.attn(entering, entering_text, layout, self.video, self.text)
            c = leave(c, attended_text, text_attention, text_tokens)
            c = leave(c, self.mlp[self.text](enter(c, text_mlp, text_tokens)), text_mlp, text_tokens)
        x = leave(x, attended, video_attention, tokens)
        return leave(x, self.mlp[self.video](enter(x, video_mlp, tokens)), video_mlp, tokens), c


def rms_norm(x: Tensor) -> Tensor:
    """RMS norm over the channels, without weight."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
