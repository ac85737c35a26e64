"""The layers of the released backbones; attribute names are the released files'."""

import math
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-5
SINUSOID_WIDTH = 256


class Projection(nn.Module):
    """Linear layer over flattened patches."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return self.proj(x)


class Scale(nn.Module):
    """RMS norm over the last dimension with a learned weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


class TimeEmbedding(nn.Module):
    """Time -> one modulation for all layers: (B, attention and MLP, shift and scale and gate, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(SINUSOID_WIDTH, width)
        self.proj_hid = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) in 0..1000 -> (B, 2, 3, width)."""
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


def modulate(x: Tensor, modulation: Tensor, sample: Tensor) -> Tensor:
    """RMS norm without weight, times scale, plus shift. modulation: (B, 3, width); sample: (tokens,)."""
    shift, scale, _ = modulation.unbind(1)
    return torch.addcmul(per_token(shift, sample), rms_norm(x), per_token(scale, sample))


def gate(residual: Tensor, x: Tensor, modulation: Tensor, sample: Tensor) -> Tensor:
    """The residual plus gate times x."""
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
        """x: (tokens, width); modulation: (B, 2, 3, width); sample: (tokens,) of each token."""
        shift, scale = modulation[:, 0, 0] + self.out_shift, modulation[:, 0, 1] + self.out_scale
        return torch.addcmul(per_token(shift, sample), x, per_token(scale, sample))


class GeluMLP(nn.Module):
    """MLP of the 7B: Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, ratio * width)
        self.proj_out = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def swiglu_width(width: int, ratio: int) -> int:
    """Hidden width of the 3B's MLP: 2/3 of the ratio, rounded up to 256s."""
    return 256 * math.ceil(int(2 * width * ratio / 3) / 256)


class SwiGLU(nn.Module):
    """MLP of the 3B: gated by SiLU, without biases."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = swiglu_width(width, ratio)
        self.proj_in_gate = nn.Linear(width, hidden, bias=False)
        self.proj_in = nn.Linear(width, hidden, bias=False)
        self.proj_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        return self.proj_out(F.silu(self.proj_in_gate(x)) * self.proj_in(x))


class Rope(nn.Module):
    """Holds the frequencies that the released files carry in every block; `rotary.py` has its own."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", frequencies)


def rms_norm(x: Tensor) -> Tensor:
    """RMS norm over the channels, without weight."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
