"""The parts of the video autoencoder: residual block, per-frame attention, up- and downsampling.

Parameter names are those of the released checkpoint.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.vae.bands import convolve_in_bands, norm_silu_conv
from model.vae.causal_conv import (
    CausalConv3d,
    FrameGroupNorm,
    StreamMemory,
    channels_last,
    concatenate,
    fold_time,
    unfold_time,
)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3; plus the input, through a 1x1x1 convolution where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding=(0, 1, 1))
        self.norm2 = FrameGroupNorm(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=(0, 1, 1))
        same = in_channels == out_channels
        self.conv_shortcut = None if same else CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        h = norm_silu_conv(self.norm1, self.conv1, x, memory)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return norm_silu_conv(self.norm2, self.conv2, h, memory, add_to=x)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame; none across time."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        if not torch.is_grad_enabled() and x.shape[2] > 1:  # one frame's tokens at a time are enough
            return concatenate([self.forward(frame) for frame in x.split(1, dim=2)], dim=2)
        frames = fold_time(x)
        tokens = rearrange(self.group_norm(frames), "f c h w -> f 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out = rearrange(self.to_out[0](attended), "f 1 (h w) c -> f c h w", h=frames.shape[2])
        return unfold_time(frames + out, x.shape[0])


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        x = self.attentions[0](self.resnets[0](x, memory))
        return self.resnets[1](x, memory)


class Downsampler(nn.Module):
    """Halves space, and time if `temporal`: zeros on the right and bottom, then stride 2."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        taps, stride = (3, 2) if temporal else (1, 1)
        self.conv = CausalConv3d(channels, channels, (taps, 3, 3), stride=(stride, 2, 2))

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, (T+1)/2 or T, H/2, W/2)."""
        if memory is not None and memory.band_pixels is not None:
            # Rows are padded by the bands, columns here.
            return convolve_in_bands(
                self.conv, lambda a, b: F.pad(x[..., a:b, :], (0, 1)), x.shape[3:], memory
            )
        # Padded as frames: constant padding of a 4D channels-last tensor keeps its storage order.
        padded = F.pad(fold_time(x), (0, 1, 0, 1))
        return self.conv(unfold_time(padded, x.shape[0]), memory)


class Upsampler(nn.Module):
    """Doubles space, and time if `temporal`, by a learned 1x1x1 convolution and a rearrangement.

    In time the first frame has no past to be doubled into: its second copy is dropped, 2T - 1 frames.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        copies = 8 if temporal else 4
        self.upscale_conv = CausalConv3d(channels, channels * copies, 1)
        self.conv = CausalConv3d(channels, channels, 3, padding=(0, 1, 1))
        with torch.no_grad():  # starts as a nearest-neighbour copy
            identity = torch.eye(channels).repeat(copies, 1)
            self.upscale_conv.weight.copy_(identity[:, :, None, None, None])
            self.upscale_conv.get_parameter("bias").zero_()

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, 2T - 1 | 2T | T, 2H, 2W)."""
        first_slice = memory is None or self.conv.name not in memory.cache
        if memory is None or memory.band_pixels is None:
            return self.conv(self._double(x, first_slice), memory)

        def rows(first: int, last: int) -> Tensor:
            doubled = self._double(x[..., first // 2 : (last + 1) // 2, :], first_slice)
            return doubled[..., first % 2 : first % 2 + last - first, :]

        return convolve_in_bands(self.conv, rows, (2 * x.shape[3], 2 * x.shape[4]), memory)

    def _double(self, x: Tensor, first_slice: bool) -> Tensor:
        x = self.upscale_conv(x)
        # Channels hold (row offset, column offset, frame offset, channel), slowest first. Written channels
        # last at once: going through another order would be a second copy of the largest tensor there is.
        x = rearrange(x, "b (y x z c) t h w -> b (t z) (h y) (w x) c", y=2, x=2, z=2 if self.temporal else 1)
        if self.temporal and first_slice:
            x = torch.cat([x[:, :1], x[:, 2:]], dim=1)
        return channels_last(rearrange(x, "b t h w c -> b c t h w"))


class DownBlock(nn.Module):
    """One encoder level: residual blocks, then a downsampler on all levels but the last."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, downsampler: Downsampler | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList([ResidualBlock(a, b, groups) for a, b in pairwise(widths)])
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W')."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x, memory)
        return x


class UpBlock(nn.Module):
    """One decoder level: residual blocks, then an upsampler on all levels but the last."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, upsampler: Upsampler | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList([ResidualBlock(a, b, groups) for a, b in pairwise(widths)])
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, memory: StreamMemory | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W')."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, memory)
        return x
