"""MUSIQ: the quality of a picture from patches at three scales (Ke et al., "MUSIQ", ICCV 2021).

Written after Google's Apache-2.0 source (google-research/musiq), whose `.npz` files `from_google` reads:
`koniq_ckpt.npz`, `spaq_ckpt.npz`, `paq2piq_ckpt.npz` (about 0 to 100) and `ava_ckpt.npz` (1 to 10). Published
tables are mostly measured with pyiqa's port, so where the two differ this is pyiqa's: pictures are resized by
a bicubic without antialiasing (Google: a Gaussian), deviations of kernels are unbiased, the GELU is exact
(Google: its tanh form).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class MusiqConfig:
    """The network's shape."""

    outputs: int
    """Number of outputs: 1 is the score itself (KonIQ, SPAQ, PaQ-2-PiQ), 10 is a distribution over the scores
    1 to 10 (AVA)."""
    width: int
    """Channels of the transformer's hidden states."""
    heads: int
    """Number of attention heads in every layer."""
    layers: int
    """Number of transformer layers."""
    mlp_width: int
    """Hidden channels of the MLPs."""
    longer_sides: tuple[int, ...]
    """Longer sides, in pixels, of the resized pictures; the picture at its native size follows them."""
    grid: int
    """Number of rows and of columns in the learned grid of positions."""


PUBLISHED = MusiqConfig(
    outputs=1, width=384, heads=6, layers=14, mlp_width=1152, longer_sides=(224, 384), grid=10
)
PATCH_PX = 32
_STEM, _STEM_OUT = 64, 256
_LAYER_NORM_EPS = 1e-6


class _StandardConv(nn.Conv2d):
    """Convolution with standardised kernels and TensorFlow's SAME padding: the odd pixel at the far side."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(_pad_same(x, self.kernel_size[0], self.stride[0]), w, stride=self.stride)


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    down, across = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[-2:])
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


class _Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def conv(channels: int, out: int, kernel: int) -> _StandardConv:
            return _StandardConv(channels, out, kernel, bias=False)

        self.conv_proj = conv(_STEM, _STEM_OUT, 1)
        self.gn_proj = nn.GroupNorm(32, _STEM_OUT, eps=1e-4)
        self.conv1 = conv(_STEM, _STEM, 1)
        self.gn1 = nn.GroupNorm(32, _STEM, eps=1e-4)
        self.conv2 = conv(_STEM, _STEM, 3)
        self.gn2 = nn.GroupNorm(32, _STEM, eps=1e-4)
        self.conv3 = conv(_STEM, _STEM_OUT, 1)
        self.gn3 = nn.GroupNorm(32, _STEM_OUT, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.gn1(self.conv1(x)))
        h = F.relu(self.gn2(self.conv2(h)))
        return F.relu(self.gn_proj(self.conv_proj(x)) + self.gn3(self.conv3(h)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b n (h c) -> b h n c", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n c -> b n (h c)"))


class _Block(nn.Module):
    def __init__(self, config: MusiqConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.attention = _Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Musiq(nn.Module):
    """A picture of any size to its score."""

    def __init__(self, config: MusiqConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_root = _StandardConv(3, _STEM, 7, stride=2, bias=False)
        self.gn_root = nn.GroupNorm(32, _STEM, eps=1e-6)
        self.block1 = _Bottleneck()
        self.embedding = nn.Linear(_STEM_OUT * (PATCH_PX // 4) ** 2, config.width)
        self.position_embedding = nn.Parameter(torch.zeros(config.grid**2, config.width))
        self.scale_embedding = nn.Parameter(torch.zeros(len(config.longer_sides) + 1, config.width))
        self.cls = nn.Parameter(torch.zeros(config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, config.outputs)

    def _tokens(self, pictures: Tensor, scale: int) -> Tensor:
        """(B, 3, H, W) in -1 to 1 -> (B, patches, width) with the embeddings of place and scale."""
        padded = _pad_same(pictures, PATCH_PX, PATCH_PX)
        patches = rearrange(padded, "b c (h i) (w j) -> (b h w) c i j", i=PATCH_PX, j=PATCH_PX)
        x = F.relu(self.gn_root(self.conv_root(patches)))
        x = self.block1(F.max_pool2d(_pad_same(x, 3, 2), 3, stride=2))
        tokens = self.embedding(rearrange(x, "(b n) c h w -> b n (h w c)", b=len(pictures)))
        grid, (rows, columns) = self.config.grid, (n // PATCH_PX for n in padded.shape[-2:])
        row = torch.arange(rows, device=x.device) * grid // rows
        column = torch.arange(columns, device=x.device) * grid // columns
        place = (row[:, None] * grid + column).flatten()
        return tokens + self.position_embedding[place] + self.scale_embedding[scale]

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in 0 to 1 -> (B,) scores.

        The published code fills the scales up to fixed lengths and masks what it added; here nothing is.
        """
        pictures = 2 * pictures - 1
        height, width = pictures.shape[-2:]
        scaled = []
        for side in self.config.longer_sides:
            size = [round(n * (side / max(height, width))) for n in (height, width)]
            if min(size) < 1:
                raise ValueError(f"a picture of {width}x{height} is too narrow to be shrunk to {side} pixels")
            scaled.append(F.interpolate(pictures, size, mode="bicubic", align_corners=False))
        tokens = [self._tokens(view, scale) for scale, view in enumerate([*scaled, pictures])]
        x = torch.cat([self.cls.expand(len(pictures), 1, -1), *tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        out = self.head(self.norm(x[:, 0]))
        if self.config.outputs == 1:
            return out[:, 0]
        return out.softmax(dim=-1) @ torch.arange(1.0, out.shape[1] + 1, device=out.device)

    @torch.no_grad()
    def scores(self, frames: Tensor) -> list[float]:
        """Quality of each of uint8 (B, H, W, 3) RGB frames; higher is better."""
        device = self.head.weight.device
        return self(frames.to(device).permute(0, 3, 1, 2).float() / 255).tolist()

    def score(self, frame: Tensor) -> float:
        """Quality of one uint8 (H, W, 3) RGB frame."""
        return self.scores(frame[None])[0]


_ROOT = "opt/target/"
_GOOGLE_NAMES = {
    r"conv_root/kernel": "conv_root.weight",
    r"block1/unit1/(conv\w+)/kernel": r"block1.\1.weight",
    r"gn_root/(scale|bias)": r"gn_root.\1",
    r"block1/unit1/(gn\w+)/(scale|bias)": r"block1.\1.\2",
    r"(embedding|head)/(kernel|bias)": r"\1.\2",
    r"Transformer/posembed_input/pos_embedding": "position_embedding",
    r"Transformer/scaleembed_input/scale_embedding": "scale_embedding",
    r"Transformer/cls": "cls",
    r"Transformer/encoder_norm/(scale|bias)": r"norm.\1",
    r"Transformer/encoderblock_(\d+)/LayerNorm_0/(scale|bias)": r"blocks.\1.norm1.\2",
    r"Transformer/encoderblock_(\d+)/\w*Attention_1/(query|key|value|out)/(kernel|bias)": (
        r"blocks.\1.attention.\2.\3"
    ),
    r"Transformer/encoderblock_(\d+)/LayerNorm_2/(scale|bias)": r"blocks.\1.norm2.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_3/Dense_0/(kernel|bias)": r"blocks.\1.fc1.\2",
    r"Transformer/encoderblock_(\d+)/MlpBlock_3/Dense_1/(kernel|bias)": r"blocks.\1.fc2.\2",
}
"""Names in Google's files below `opt/target/` (Flax, before Linen) and ours."""


def from_google(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The state of a `Musiq` from the arrays of a published `.npz` file.

    Kernels are (height, width, in, out) there, attention's keep their heads apart, norms are (1, 1, 1, C).
    ValueError for a name that this network has no place for.
    """
    state: dict[str, Tensor] = {}
    for key, array in arrays.items():
        if not key.startswith(_ROOT):
            continue  # the optimiser's own
        name = key.removeprefix(_ROOT)
        pattern = next((p for p in _GOOGLE_NAMES if re.fullmatch(p, name)), None)
        if pattern is None:
            raise ValueError(f"{key} is not part of MUSIQ")
        ours = re.sub(pattern, _GOOGLE_NAMES[pattern], name)
        state[re.sub(r"(kernel|scale)$", "weight", ours)] = torch.from_numpy(_as_ours(ours, array))
    return state


def _as_ours(name: str, array: np.ndarray) -> np.ndarray:
    if name.startswith(("conv_root", "block1.conv")):
        array = array.transpose(3, 2, 0, 1)
    elif name.endswith("out.kernel"):  # (heads, head width, out)
        array = array.reshape(-1, array.shape[-1]).T
    elif name.endswith("kernel"):  # (in, out) or (in, heads, head width)
        array = array.reshape(len(array), -1).T
    elif name in ("position_embedding", "scale_embedding"):
        array = array[0]
    else:
        array = array.reshape(-1)
    return np.ascontiguousarray(array, dtype=np.float32)
