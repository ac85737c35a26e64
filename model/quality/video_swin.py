"""Video Swin Transformer with the gated relative position bias of FAST-VQA (GRPB), and its score head.

Liu et al., "Video Swin Transformer", 2022; Wu et al., "FAST-VQA", 2022, section 3.3. Parameter names are
those of the published FAST-VQA and DOVER files (VQAssessment, commits 9f264e43 and f1ddc962), and so is what
these files were trained with where it differs from the paper: the gate is the L1 distance of two tokens'
cells, not one bit, so beyond a distance of one it extrapolates from the two bias tables.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Size = tuple[int, int, int]
_MASKED = -100.0
PATCH: Size = (2, 4, 4)


@dataclass(frozen=True)
class VideoSwinConfig:
    """The shape of the backbone; sizes are (frames, height, width)."""

    embed_dim: int
    """Channels after the patch embedding; each patch merging doubles them."""
    depths: tuple[int, ...]
    """Number of blocks in each layer."""
    num_heads: tuple[int, ...]
    """Number of attention heads in each layer."""
    window_size: Size
    """Attention window (frames, height, width) in tokens; every second block shifts it by half."""
    fragment_bias: tuple[bool, ...]
    """Whether each layer's position bias is gated by the fragments that two tokens come from."""
    base_size: Size | None
    """Input size (frames, height, width) in pixels for which the window is meant and with which it scales
    (FAST-VQA); None keeps the window fixed (DOVER)."""

    @property
    def out_channels(self) -> int:
        """Channels of the feature."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


def relative_position_index(window: Size) -> Tensor:
    """(N, N) row of the bias tables for each pair (query, key) of a window's N tokens."""
    axes = torch.meshgrid(*[torch.arange(n) for n in window], indexing="ij")
    position = torch.stack(axes).flatten(1)  # (3, N)
    offset = position[:, :, None] - position[:, None, :]
    depth, height, width = (part + n - 1 for part, n in zip(offset, window, strict=True))
    return (depth * (2 * window[1] - 1) + height) * (2 * window[2] - 1) + width


def partition(x: Tensor, window: Size) -> Tensor:
    """(D, H, W, C) to (windows, tokens, C), both in raster order."""
    d, h, w = window
    return rearrange(x, "(nd d) (nh h) (nw w) c -> (nd nh nw) (d h w) c", d=d, h=h, w=w)


def fragment_gate(grid: Size, window: Size, shift: Size) -> Tensor:
    """(windows, N, N): L1 distance of the cells that two tokens come from.

    Cells divide the padded token grid as many times as the clipped window has rows and columns: not as often
    as there are fragments, though both are 7 at the published size.
    """

    def cells(count: int, length: int) -> Tensor:
        return F.interpolate(torch.arange(count).float()[None, None], size=length)[0, 0]

    rows, columns = cells(window[1], grid[1]), cells(window[2], grid[2])
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).expand(grid[0], -1, -1, -1)
    tokens = partition(position.roll([-s for s in shift], dims=(0, 1, 2)), window)
    return (tokens[:, :, None] - tokens[:, None, :]).abs().sum(dim=-1)


def shift_mask(grid: Size, window: Size, shift: Size) -> Tensor:
    """(windows, N, N): 0 where two tokens of a shifted window are together in the picture too, else -100."""
    label = torch.zeros(grid)
    for axis, (length, w, s) in enumerate(zip(grid, window, shift, strict=True)):
        region = torch.zeros(length)
        if s:  # as the published code cuts it, also where a scaled window is not larger than its shift
            region[-w:-s] = 1
            region[-s:] = 2
        label += region.view([-1 if i == axis else 1 for i in range(3)]) * 3**axis
    tokens = partition(label[..., None], window)[..., 0]
    return torch.where(tokens[:, :, None] == tokens[:, None, :], 0.0, _MASKED)


class _Attention(nn.Module):
    """Self-attention within windows, with its tables of position biases."""

    def __init__(self, dim: int, heads: int, window: Size, fragment_bias: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.fragment_position_bias_table = nn.Parameter(torch.zeros(rows, heads)) if fragment_bias else None
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _bias(self, window: Size, gate: Tensor, follow_window: bool) -> Tensor:
        """(1 or windows, heads, N, N)."""
        tokens = window[0] * window[1] * window[2]
        if follow_window:
            d, h, w = window
            index = self.relative_position_index.view(*self.window, *self.window)
            index = index[:d, :h, :w, :d, :h, :w].reshape(tokens, tokens)
        else:  # the leading block, geometrically right only where nothing but the depth is clipped
            index = self.relative_position_index[:tokens, :tokens]
        across = self.relative_position_bias_table[index].permute(2, 0, 1)[None]
        if self.fragment_position_bias_table is None:
            return across
        within = self.fragment_position_bias_table[index].permute(2, 0, 1)[None]
        return torch.addcmul(within, gate[:, None], across - within)

    def forward(
        self, x: Tensor, window: Size, gate: Tensor, mask: Tensor | None, follow_window: bool
    ) -> Tensor:
        """(windows, N, C) -> the same; gate and mask: (windows, N, N)."""
        bias = self._bias(window, gate, follow_window)
        if mask is not None:
            bias = bias + mask[:, None]
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(x), -1, -1, -1))
        return self.proj(rearrange(out, "b h n c -> b n (h c)"))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: Size, fragment_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads, window, fragment_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim)

    def forward(self, x: Tensor, window: Size, shift: Size, follow_window: bool) -> Tensor:
        """(B, D, H, W, C) -> the same. Each of the batch alone: full-size biases take 0.2 GB."""
        size = x.shape[1:4]
        far = [-n % w for n, w in zip(size, window, strict=True)]
        grid = (size[0] + far[0], size[1] + far[1], size[2] + far[2])
        gate = fragment_gate(grid, window, shift).to(x)
        mask = shift_mask(grid, window, shift).to(x) if any(shift) else None
        padded = F.pad(self.norm1(x), (0, 0, 0, far[2], 0, far[1], 0, far[0]))
        attended = []
        for video in padded.roll([-s for s in shift], dims=(1, 2, 3)):
            windows = self.attn(partition(video, window), window, gate, mask, follow_window)
            d, h, w = (n // side for n, side in zip(grid, window, strict=True))
            attended.append(
                rearrange(
                    windows,
                    "(nd nh nw) (d h w) c -> (nd d) (nh h) (nw w) c",
                    **{"nd": d, "nh": h, "nw": w, "d": window[0], "h": window[1], "w": window[2]},
                )
            )
        restored = torch.stack(attended).roll(shift, dims=(1, 2, 3))
        x = x + restored[:, : size[0], : size[1], : size[2]]
        return x + self.mlp(self.norm2(x))


class _Merge(nn.Module):
    """2x2 neighbouring tokens become one of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.reduction(self.norm(rearrange(x, "b d (h i) (w j) c -> b d h w (j i c)", i=2, j=2)))


class SwinLayer(nn.Module):
    """Blocks with regular and shifted windows in turn, then, but for the last layer, a merge."""

    def __init__(self, dim: int, config: VideoSwinConfig, layer: int) -> None:
        super().__init__()
        heads, window = config.num_heads[layer], config.window_size
        self.blocks = nn.ModuleList(
            _Block(dim, heads, window, config.fragment_bias[layer]) for _ in range(config.depths[layer])
        )
        self.half_window = (window[0] // 2, window[1] // 2, window[2] // 2)
        self.downsample = _Merge(dim) if layer < len(config.depths) - 1 else None

    def forward(self, x: Tensor, window: Size, follow_window: bool) -> Tensor:
        """(B, D, H, W, C) -> (B, D, H/2, W/2, 2C), or the same size in the last layer."""
        tokens = x.shape[1:4]
        d, h, w = (min(n, side) for n, side in zip(tokens, window, strict=True))
        moved = [s if n > side else 0 for n, side, s in zip(tokens, window, self.half_window, strict=True)]
        for number, block in enumerate(self.blocks):
            shift = (moved[0], moved[1], moved[2]) if number % 2 else (0, 0, 0)
            x = block(x, (d, h, w), shift, follow_window)
        return x if self.downsample is None else self.downsample(x)


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, H', W', C); sides are filled up with zeros to whole patches."""
        t, h, w = (-n % side for n, side in zip(x.shape[2:], PATCH, strict=True))
        return self.norm(self.proj(F.pad(x, (0, w, 0, h, 0, t))).permute(0, 2, 3, 4, 1))


class VideoSwin(nn.Module):
    """Normalised pixels to features."""

    def __init__(self, config: VideoSwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _PatchEmbed(config.embed_dim)
        self.layers = nn.ModuleList(
            SwinLayer(config.embed_dim * 2**i, config, i) for i in range(len(config.depths))
        )
        self.norm = nn.LayerNorm(config.out_channels)

    def window_for(self, pixels: torch.Size) -> Size:
        """The window for an input of these (frames, height, width) pixels, not yet clipped to its tokens."""
        full, base = self.config.window_size, self.config.base_size
        if base is None:
            return full
        d, h, w = (side * n // size for side, n, size in zip(full, pixels, base, strict=True))
        if min(d, h, w) < 1 or d > full[0] or h > full[1] or w > full[2]:
            raise ValueError(
                f"an input of {tuple(pixels)} (frames, height, width) is too far from the size {base} "
                "that this network is made for"
            )
        return d, h, w

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, ceil(T/2), ceil(H/32), ceil(W/32))."""
        window = self.window_for(pixels.shape[2:])
        x = self.patch_embed(pixels)
        for layer in self.layers:
            x = layer(x, window, self.config.base_size is not None)
        return self.norm(x).permute(0, 4, 1, 2, 3)


class ScoreHead(nn.Module):
    """A score at every position of a feature."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc_hid = nn.Conv3d(channels, hidden, 1)
        self.fc_last = nn.Conv3d(hidden, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 1, T, H, W)."""
        return self.fc_last(F.gelu(self.fc_hid(feature)))
