"""Rotary position embedding over (t, h, w), local to each window.

Channels rotate in adjacent pairs (2j, 2j + 1) -> (a cos - b sin, b cos + a sin); axis blocks follow each
other in the order t | h | w from channel 0, and channels that are left over pass through. A rotation is
stored as one complex number per pair (1 for a pair that passes through), in fp32 at any width of the model:
cos and sin of a position in bf16 would be off by whole percents.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from model.dit.packing import CACHED_PLANS, WindowLayout

CACHED_ROTATIONS = 2 * CACHED_PLANS
"""Regular and shifted layers' of each plan."""


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates x (tokens, heads, head_dim) by rotation (tokens, head_dim / 2) complex64; keeps x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).flatten(-2).to(x.dtype)


def axis_frequencies(dim: int, theta: float = 10000.0) -> Tensor:
    """theta^(-2j / dim) for the dim // 2 pairs of an axis block of `dim` channels (RoPE, Su et al. 2021)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)


def normalised_frequencies(dim: int) -> Tensor:
    """The 7B checkpoint's: dim // 2 values from pi to 128 pi, for positions in -1..1."""
    return torch.linspace(1.0, 128.0, dim // 2) * math.pi


def axial_rotation(angles: Tensor, head_dim: int) -> Tensor:
    """(tokens, pairs) angles in radians -> (tokens, head_dim / 2) complex64, left-over pairs 1."""
    rotation = torch.ones(angles.shape[0], head_dim // 2, dtype=torch.complex64, device=angles.device)
    rotation[:, : angles.shape[1]] = torch.polar(torch.ones_like(angles), angles)
    return rotation


def split_head_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that go to t, h and w: a quarter to t, the rest in equal parts to h and w.

    The paper gives no split. 64 channels become 16 | 24 | 24 (CogVideoX's split): space gets more since a
    window has 32 positions in height and width and only 5 in time.
    """
    pairs = head_dim // 2
    space = (pairs - pairs // 4) // 2
    return 2 * (pairs - 2 * space), 2 * space, 2 * space


# The tables below are cached like the layouts they belong to, by identity: one per set of shapes, shared by
# all layers with the same windows.


@lru_cache(maxsize=CACHED_ROTATIONS)
def window_rotation(layout: WindowLayout, head_dim: int) -> Tensor:
    """Swin-MMDiT's rotation of each patch token (window order): (tokens, head_dim / 2) complex64."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = [
            axis_frequencies(dim).to(layout.positions.device) for dim in split_head_channels(head_dim)
        ]
        angles = [layout.positions[:, axis, None].float() * f for axis, f in enumerate(frequencies)]
        return axial_rotation(torch.cat(angles, dim=1), head_dim)


@lru_cache(maxsize=CACHED_ROTATIONS)
def released_3b_rotation(layout: WindowLayout, head_dim: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """The 3B checkpoint's rotations of patch tokens (window order) and of text tokens, complex64.

    Three equal axis blocks of rotary_dim // 3 channels. Text token i of L has position i on all three axes;
    a patch token has (L + t, h, w): the text's length shifts its time alone.
    """
    with torch.inference_mode(False), torch.no_grad():
        device = layout.positions.device
        frequencies = axis_frequencies(rotary_dim // 3).to(device)
        tokens = torch.tensor(layout.tokens_per_sample, device=device)
        offset = torch.tensor(layout.text_lengths, device=device).repeat_interleave(tokens)
        positions = layout.positions.float()
        positions[:, 0] += offset
        text = torch.cat([torch.arange(n, device=device) for n in layout.text_lengths])
        text_positions = text.float()[:, None].expand(-1, 3)
        video_angles, text_angles = (
            (p[:, :, None] * frequencies).flatten(1) for p in (positions, text_positions)
        )
        return axial_rotation(video_angles, head_dim), axial_rotation(text_angles, head_dim)


@lru_cache(maxsize=CACHED_ROTATIONS)
def released_7b_rotation(layout: WindowLayout, head_dim: int, rotary_dim: int) -> Tensor:
    """The 7B checkpoint's rotation of patch tokens (window order), complex64; its text is not rotated.

    Positions run from -1 to 1 over the window's own extent (an extent of one has -1), so a border window
    spans as much angle as a whole one. Blocks of rotary_dim // 3 channels.
    """
    with torch.inference_mode(False), torch.no_grad():
        frequencies = normalised_frequencies(rotary_dim // 3).to(layout.positions.device)
        # Frequencies reach 400: positions are read from torch.linspace itself, to the last bit.
        longest = int(layout.extents.max())
        table = torch.zeros(longest + 1, longest)
        for n in range(1, longest + 1):
            table[n, :n] = torch.linspace(-1.0, 1.0, n)
        positions = table.to(layout.positions.device)[layout.extents, layout.positions]
        return axial_rotation((positions[:, :, None] * frequencies).flatten(1), head_dim)
