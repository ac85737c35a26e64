"""Swin-MMDiT, the paper's diffusion transformer: SD3-Medium's MMDiT with window attention (section 3.1).

Separate weights for video and text, adaLN modulation from time and pooled text, gated residuals, no q/k
norm (SD3-Medium has none). Regular and shifted windows alternate by layer; 3D rotary embedding inside each
window stands in for SD3's position table. Text has no position and is not rotated. Input is packed: any mix
of images and videos of any size, and the result for a sample does not depend on what is packed with it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dit.attention import window_attention
from model.dit.packing import (
    LayerWindows,
    WindowLayout,
    packing_plan,
    patch_grids,
    patchify,
    unpatchify,
)
from model.dit.rotary import rotate, window_rotation
from model.dit.windows import Extent, Grid, WindowSize, fixed_windows

NORM_EPS = 1e-6
SINUSOID_WIDTH = 256


@dataclass(frozen=True)
class SwinMMDiTConfig:
    """The whole shape of one Swin-MMDiT."""

    num_layers: int
    """Number of transformer layers."""
    num_heads: int
    """Number of attention heads in every layer."""
    head_dim: int
    """Channels of each attention head; the network is `num_heads` times as wide."""
    mlp_ratio: int
    """Hidden width of the MLPs as a multiple of the network's width."""
    patch: tuple[int, int, int]
    """Latent pixels (frames, height, width) that one token covers."""
    in_channels: int
    """Channels of the network's input: the noisy latent, the low-quality latent and a mask (33 for latents of
    16 channels)."""
    out_channels: int
    """Channels of the predicted velocity, as many as a latent has."""
    text_dim: int
    """Width of the text embeddings, which is T5's (4096 for T5-XXL)."""
    pooled_dim: int
    """Width of the pooled text embedding, which is CLIP-L's and bigG's together (2048 for SD3's encoders)."""
    windows: tuple[WindowSize, ...]
    """Attention windows (frames, height, width) in latent pixels, or "full" for a whole axis; the layers go
    through the list in turn."""
    shifted: tuple[bool, ...]
    """Whether a layer's windows are shifted by half a window; the layers go through the list in turn."""
    rotary: bool
    """Whether attention uses a 3D rotary embedding within each window; without it the network has no notion
    of position."""

    def __post_init__(self) -> None:
        if not self.windows or not self.shifted:
            raise ValueError("model.dit.windows, model.shifted: give at least one entry each")
        self.layer_windows()

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    def layer_windows(self) -> tuple[LayerWindows, ...]:
        """Windows of each layer, in tokens. ValueError if a window is not a multiple of the patch."""
        return tuple(
            LayerWindows(
                fixed_windows,
                _window_in_tokens(self.windows[i % len(self.windows)], self.patch),
                self.shifted[i % len(self.shifted)],
            )
            for i in range(self.num_layers)
        )


def _window_in_tokens(window: WindowSize, patch: tuple[int, int, int]) -> WindowSize:
    t, h, w = (_extent_in_tokens(extent, size) for extent, size in zip(window, patch, strict=True))
    return t, h, w


def _extent_in_tokens(extent: Extent, patch: int) -> Extent:
    if extent == "full":
        return "full"
    if extent < 1 or extent % patch:
        raise ValueError(
            f"model.windows: extent {extent} (latent pixels) is not a multiple of the patch {patch}"
        )
    return extent // patch


SD3_MEDIUM = SwinMMDiTConfig(
    num_layers=24,
    num_heads=24,
    head_dim=64,
    mlp_ratio=4,
    patch=(1, 2, 2),
    in_channels=33,
    out_channels=16,
    text_dim=4096,
    pooled_dim=2048,
    windows=((5, 64, 64),),
    shifted=(False, True),
    rotary=True,
)
"""The paper's model: 2,028,432,448 parameters, SD3-Medium's and 17 more input channels."""

TINY = SwinMMDiTConfig(
    num_layers=4,
    num_heads=4,
    head_dim=32,
    mlp_ratio=4,
    patch=(1, 2, 2),
    in_channels=33,
    out_channels=16,
    text_dim=64,
    pooled_dim=48,
    windows=((2, 8, 8),),
    shifted=(False, True),
    rotary=True,
)
"""For tests and the demo; its text widths are those of `text_encoders.TINY_ENCODERS`."""


class SwinMMDiT(nn.Module):
    """The network: velocity of packed noisy latents."""

    def __init__(self, config: SwinMMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_pixels = config.width, math.prod(config.patch)
        self.layers = config.layer_windows()
        self.video_in = nn.Linear(config.in_channels * patch_pixels, width)
        self.text_in = nn.Linear(config.text_dim, width)
        self.time_in = EmbeddingMLP(SINUSOID_WIDTH, width)
        self.pooled_in = EmbeddingMLP(config.pooled_dim, width)
        last = config.num_layers - 1
        self.blocks = nn.ModuleList([Block(config, context_pre_only=i == last) for i in range(last + 1)])
        self.modulation_out = nn.Linear(width, 2 * width)
        self.video_out = nn.Linear(width, config.out_channels * patch_pixels)
        self.checkpointed_blocks: frozenset[int] = frozenset()
        if self.video_in.weight.device.type != "meta":
            self.reset_parameters()

    @classmethod
    def create(cls, config: SwinMMDiTConfig, device: torch.device | str, dtype: torch.dtype) -> "SwinMMDiT":
        """Built on the meta device, then allocated once in its final place and dtype, then initialised."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device)
        model.reset_parameters()
        return model

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier; modulations and the output zero, so that blocks start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mlp in (self.time_in, self.pooled_in):
            nn.init.normal_(mlp.hidden.weight, std=0.02)
            nn.init.normal_(mlp.out.weight, std=0.02)
        modulations = [m.modulation for m in self.modules() if isinstance(m, Stream | ContextStream)]
        for linear in (*modulations, self.modulation_out, self.video_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def checkpoint_activations(self, blocks: Iterable[int]) -> None:
        """Recompute these blocks' activations in the backward pass instead of keeping them."""
        self.checkpointed_blocks = frozenset(blocks)

    def compile_mlps(self) -> None:
        """torch.compile for the MLPs, whose only changing dimension is the number of tokens."""
        for module in self.modules():
            if isinstance(module, Stream):
                module.mlp.compile(dynamic=True)

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        video_shapes: Sequence[Grid],
        text_lengths: Sequence[int],
        timestep: Tensor,
        pooled: Tensor | None,
    ) -> Tensor:
        """Velocity of each latent pixel: (sum of latent pixels, 16).

        video: (sum of latent pixels, 33); text: (sum of text tokens, text_dim); video_shapes: (T, H, W) in
        latent pixels, H and W even; timestep: (B,) in 0..1000; pooled: (B, pooled_dim).
        """
        if pooled is None:
            raise ValueError("Swin-MMDiT needs pooled text embeddings, one per sample")
        grids = patch_grids(video_shapes, self.config.patch)
        plan = packing_plan(self.layers, grids, text_lengths, video.device)
        conditioning = F.silu(self._conditioning(timestep, pooled))
        dtype = self.video_in.weight.dtype
        x = self.video_in(patchify(video.to(dtype), video_shapes, self.config.patch))
        c = self.text_in(text.to(dtype))
        for index, (block, layout, reorder) in enumerate(
            zip(self.blocks, plan.layouts, plan.reorder, strict=True)
        ):
            if reorder is not None:
                x = x[reorder]
            rotation = window_rotation(layout, self.config.head_dim) if self.config.rotary else None
            if index in self.checkpointed_blocks and torch.is_grad_enabled():
                x, c = checkpoint(block, x, c, conditioning, layout, rotation, use_reentrant=False)
            else:
                x, c = block(x, c, conditioning, layout, rotation)
        scale, shift = self.modulation_out(conditioning).chunk(2, dim=-1)
        x = self.video_out(modulated_norm(x, shift, scale, plan.layouts[-1].tokens_per_sample))
        # The head works per token, so 64 channels go back to packed order instead of the full width.
        return unpatchify(x[plan.restore], grids, self.config.patch)

    def _conditioning(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """(B, width) from time and pooled text."""
        dtype = self.video_in.weight.dtype
        return self.time_in(sinusoid(timestep).to(dtype)) + self.pooled_in(pooled.to(dtype))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear: SD3's embedding of the time's sinusoid and of the pooled text."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, width)."""
        return self.out(F.silu(self.hidden(x)))


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> the same shape."""
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class Stream(nn.Module):
    """One modality's weights in a block. Modulation: shift, scale, gate of attention, then of the MLP."""

    def __init__(self, config: SwinMMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = MLP(width, config.mlp_ratio * width)


class ContextStream(nn.Module):
    """The text's weights in the last block: keys and values only. Modulation: scale, shift (SD3's order).

    `qkv` keeps its query rows, as SD3's file does, so that all blocks are alike; nothing reads their result.
    """

    def __init__(self, config: SwinMMDiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)


class Block(nn.Module):
    """One transformer block over packed video (window order) and text."""

    def __init__(self, config: SwinMMDiTConfig, context_pre_only: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.video = Stream(config)
        self.text: Stream | ContextStream = ContextStream(config) if context_pre_only else Stream(config)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        conditioning: Tensor,
        layout: WindowLayout,
        rotation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x: (patch tokens, width) in the layout's window order; c: (text tokens, width); both are returned.

        conditioning: (B, width), after its SiLU; rotation: (patch tokens, head_dim / 2) complex, or None.
        """
        tokens, text_tokens = layout.tokens_per_sample, layout.text_lengths
        shift, scale, gate, *mlp_modulation = self.video.modulation(conditioning).chunk(6, dim=-1)
        q, k, v = self._heads(self.video.qkv(modulated_norm(x, shift, scale, tokens)))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if isinstance(self.text, Stream):
            text_shift, text_scale, text_gate, *text_mlp = self.text.modulation(conditioning).chunk(6, dim=-1)
            text_qkv = self._heads(self.text.qkv(modulated_norm(c, text_shift, text_scale, text_tokens)))
            attended, text_attended = window_attention((q, k, v), text_qkv, layout)
            assert text_attended is not None
            c = gated_residual(c, text_gate, self.text.out(text_attended.flatten(1)), text_tokens)
            c = feed_forward(self.text.mlp, c, text_mlp, text_tokens)
        else:
            text_scale, text_shift = self.text.modulation(conditioning).chunk(2, dim=-1)
            # The query is computed and dropped: for some hundred text tokens that costs nothing.
            _, text_k, text_v = self._heads(
                self.text.qkv(modulated_norm(c, text_shift, text_scale, text_tokens))
            )
            attended, _ = window_attention((q, k, v), (None, text_k, text_v), layout)
        x = gated_residual(x, gate, self.video.out(attended.flatten(1)), tokens)
        return feed_forward(self.video.mlp, x, mlp_modulation, tokens), c

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, 3 * width) -> q, k, v, each (tokens, heads, head_dim), views."""
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        return q, k, v


def feed_forward(mlp: nn.Module, x: Tensor, modulation: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Add gate * mlp(modulated norm of x) to x; modulation is (shift, scale, gate), each (B, width)."""
    shift, scale, gate = modulation
    return gated_residual(x, gate, mlp(modulated_norm(x, shift, scale, rows)), rows)


# Both work sample by sample, the modulation broadcasting: gathered for every token it would cost 3 to 9 times
# as much, backward too, where a gather sums thousands of rows into B.


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, rows: Sequence[int]) -> Tensor:
    """LayerNorm without weights, times 1 + scale, plus shift. x: (tokens, width); shift, scale: (B, width).

    rows: tokens of each of the B samples. The norm's own weight and bias do it in one pass over x.
    """
    width = x.shape[-1:]
    samples = zip(x.split(list(rows)), 1 + scale, shift, strict=True)
    return _joined([F.layer_norm(part, width, weight, bias, NORM_EPS) for part, weight, bias in samples])


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, rows: Sequence[int]) -> Tensor:
    """Add gate * y to x, with gate (B, width) spread over the tokens of each sample."""
    samples = zip(x.split(list(rows)), gate, y.split(list(rows)), strict=True)
    return _joined([torch.addcmul(part, sample_gate, y_part) for part, sample_gate, y_part in samples])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sinusoid(timestep: Tensor) -> Tensor:
    """(B,) in 0..1000 -> (B, 256) fp32: cosines, then sines, of 10000^(-i/128) t (SD3)."""
    half = SINUSOID_WIDTH // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
