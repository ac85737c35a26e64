"""The released backbones once more, as plainly as the published architecture can be written: one video a
call, a loop over windows, weights taken by name from a state dict. What the packed network must equal."""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dit.nadit import NaDiTConfig

Interval = tuple[int, int]


def axis_windows(n: int, size: int, shifted: bool) -> list[Interval]:
    shift = 0.5 if shifted and size < n else 0.0
    if not shift:
        return [(i * size, min((i + 1) * size, n)) for i in range(math.ceil(n / size))]
    last = math.ceil((n - 0.5) / size)
    cut = [(max(int((i - 0.5) * size), 0), min(int((i + 0.5) * size), n)) for i in range(last + 1)]
    return [(start, stop) for start, stop in cut if stop > start]


def windows(grid: tuple[int, int, int], counts, shifted: bool) -> list[tuple[Interval, Interval, Interval]]:
    frames, height, width = grid
    scale = math.sqrt(3600 / (height * width))
    sizes = (
        math.ceil(min(frames, 30) / counts[0]),
        math.ceil(round(height * scale) / counts[1]),
        math.ceil(round(width * scale) / counts[2]),
    )
    return list(product(*(axis_windows(n, size, shifted) for n, size in zip(grid, sizes, strict=True))))


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x: (tokens, heads, head_dim); angles: (tokens, pairs), for adjacent channels from 0 on."""
    out = x.clone()
    a, b = x[..., 0 : 2 * angles.shape[1] : 2], x[..., 1 : 2 * angles.shape[1] : 2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    out[..., 0 : 2 * angles.shape[1] : 2] = a * cos - b * sin
    out[..., 1 : 2 * angles.shape[1] : 2] = b * cos + a * sin
    return out


def window_angles(config: NaDiTConfig, extent: tuple[int, int, int], text: int) -> Tensor:
    dim = config.rotary_dim // 3
    if config.multimodal_rotary:
        frequencies = torch.tensor([10000.0 ** (-2 * j / dim) for j in range(dim // 2)])
        axes = [torch.arange(n).float() + (text if axis == 0 else 0) for axis, n in enumerate(extent)]
    else:
        frequencies = torch.linspace(1, 128, dim // 2) * math.pi
        axes = [torch.linspace(-1, 1, n) for n in extent]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return torch.cat([positions[:, i, None] * frequencies for i in range(3)], dim=1)


class Plain:
    def __init__(self, config: NaDiTConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def name(self, block: int, part: str, stream: str) -> str:
        shared = block >= self.config.separate_layers
        return f"blocks.{block}.{part}.{'all' if shared else stream}"

    def time(self, t: float) -> Tensor:
        """(2 layers, 3 parts, width)."""
        frequencies = torch.tensor([10000.0 ** (-i / 128) for i in range(128)])
        wave = torch.cat([(t * frequencies).sin(), (t * frequencies).cos()])
        hidden = F.silu(self.linear("emb_in.proj_hid", F.silu(self.linear("emb_in.proj_in", wave))))
        return self.linear("emb_in.proj_out", hidden).reshape(-1, 2, 3).permute(1, 2, 0)

    def ada(self, block: int, stream: str, emb: Tensor, layer: int) -> list[Tensor]:
        name = self.name(block, "ada", stream)
        kind = ("attn", "mlp")[layer]
        return [
            emb[layer, i] + self.state[f"{name}.{kind}_{p}"] for i, p in enumerate(("shift", "scale", "gate"))
        ]

    def mlp(self, block: int, stream: str, x: Tensor) -> Tensor:
        name = self.name(block, "mlp", stream)
        if not self.config.swiglu:
            return self.linear(
                f"{name}.proj_out", F.gelu(self.linear(f"{name}.proj_in", x), approximate="tanh")
            )
        gated = F.silu(self.linear(f"{name}.proj_in_gate", x)) * self.linear(f"{name}.proj_in", x)
        return self.linear(f"{name}.proj_out", gated)

    def qkv(self, block: int, stream: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        whole = self.linear(self.name(block, "attn.proj_qkv", stream), x)
        q, k, v = whole.reshape(-1, 3, config.num_heads, config.head_dim).unbind(1)
        weights = [self.state[f"{self.name(block, f'attn.norm_{n}', stream)}.weight"] for n in "qk"]
        return norm(q, weights[0]), norm(k, weights[1]), v

    def attention(self, block: int, x: Tensor, c: Tensor, grid) -> tuple[Tensor, Tensor]:
        config, text = self.config, len(c)
        video, words = self.qkv(block, "vid", x), self.qkv(block, "txt", c)
        if config.multimodal_rotary:
            dim = config.rotary_dim // 3
            frequencies = torch.tensor([10000.0 ** (-2 * j / dim) for j in range(dim // 2)])
            angles = (torch.arange(text).float()[:, None] * frequencies).repeat(1, 3)
            words = (turn(words[0], angles), turn(words[1], angles), words[2])
        places = torch.arange(len(x)).reshape(grid)
        out, text_out = torch.zeros_like(video[0]), []
        for window in windows(grid, config.windows, block % 2 == 1):
            rows = places[tuple(slice(*interval) for interval in window)].flatten()
            angles = window_angles(config, tuple(stop - start for start, stop in window), text)
            q, k = (torch.cat([turn(video[i][rows], angles), words[i]]) for i in (0, 1))
            v = torch.cat([video[2][rows], words[2]])
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(config.head_dim)
            attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
            out[rows] = attended[: len(rows)]
            text_out.append(attended[len(rows) :])
        return (
            self.linear(self.name(block, "attn.proj_out", "vid"), out.flatten(1)),
            self.linear(self.name(block, "attn.proj_out", "txt"), torch.stack(text_out).mean(0).flatten(1)),
        )

    def __call__(self, video: Tensor, text: Tensor, shape: tuple[int, int, int], t: float) -> Tensor:
        """video: (T H W, 33) -> (T H W, 16)."""
        config, emb = self.config, self.time(t)
        frames, height, width = shape
        grid = (frames, height // 2, width // 2)
        patches = video.reshape(frames, grid[1], 2, grid[2], 2, -1).permute(0, 1, 3, 2, 4, 5)
        x = self.linear("vid_in.proj", patches.reshape(frames * grid[1] * grid[2], -1))
        c = self.linear("txt_in", text)
        for block in range(config.num_layers):
            ends = config.text_ends_at_last_attention and block == config.num_layers - 1
            shift, scale, gate = self.ada(block, "vid", emb, 0)
            entering_text = norm(c)
            if not ends:
                text_shift, text_scale, text_gate = self.ada(block, "txt", emb, 0)
                entering_text = entering_text * text_scale + text_shift
            attended, attended_text = self.attention(block, norm(x) * scale + shift, entering_text, grid)
            x = x + attended * gate
            shift, scale, gate = self.ada(block, "vid", emb, 1)
            x = x + self.mlp(block, "vid", norm(x) * scale + shift) * gate
            if not ends:
                c = c + attended_text * text_gate
                shift, scale, gate = self.ada(block, "txt", emb, 1)
                c = c + self.mlp(block, "txt", norm(c) * scale + shift) * gate
        if config.modulated_head:
            x = norm(x, self.state["vid_out_norm.weight"])
            x = x * (emb[0, 1] + self.state["vid_out_ada.out_scale"])
            x = x + emb[0, 0] + self.state["vid_out_ada.out_shift"]
        out = self.linear("vid_out.proj", x).reshape(frames, grid[1], grid[2], 2, 2, -1)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(frames * height * width, -1)
