"""FLOPs of a forward pass, counted from the shapes: multiplications and additions of matrix products.

What a sample costs does not depend on what it is packed with, so all counts are per sample and add up. They
are those of `torch.utils.flop_counter` (a multiply-add is two); element-wise work is not counted. A training
step takes three times the forward pass: each product has two in the backward pass.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from model.dit import nadit_layers, swin_mmdit
from model.dit.nadit import NaDiTConfig
from model.dit.packing import LayerWindows, patch_grids
from model.dit.swin_mmdit import SwinMMDiTConfig
from model.dit.windows import Grid

Config = SwinMMDiTConfig | NaDiTConfig

TRAINING_OVER_FORWARD = 3
"""Forward and backward over forward: 0.01% too much, since no gradient of the inputs is needed. Recomputed
activations do not count as work."""


@dataclass(frozen=True)
class ForwardFlops:
    """A forward pass of one sample by part, exact."""

    video_linear: int
    """Projections and MLPs of the video tokens, with the layers that patches enter and leave by."""
    text_linear: int
    """The same of the text tokens."""
    conditioning: int
    """Of time and pooled text, and each layer's modulation: per sample, whatever its size."""
    video_attention: tuple[int, ...]
    """Per layer: the windows' own queries over the window and the text."""
    text_attention: tuple[int, ...]
    """Per layer: the text's queries, once per window, over the window and the text."""

    @property
    def linear(self) -> int:
        """Of all products with weights."""
        return self.video_linear + self.text_linear + self.conditioning

    @property
    def attention(self) -> int:
        """Of all attention, video and text."""
        return sum(self.video_attention) + sum(self.text_attention)

    @property
    def total(self) -> int:
        """Of the whole forward pass."""
        return self.linear + self.attention


@lru_cache(maxsize=2**16)
def forward_flops(config: Config, shape: Grid, text_length: int) -> ForwardFlops:
    """Of one sample: shape (T, H, W) in latent pixels, H and W even; text_length in tokens.

    Cached; the windows are counted once per shape. ValueError if a side is not a multiple of the patch.
    """
    grid = patch_grids([shape], config.patch)[0]
    tokens, layers = math.prod(grid), range(config.num_layers)
    per_token = [linear_per_token(config, layer) for layer in layers]
    patch_channels = math.prod(config.patch) * (config.in_channels + config.out_channels)
    inner = config.num_heads * config.head_dim
    attention = [window_attention(inner, window_sizes(w, grid), text_length) for w in config.layer_windows()]
    text_attention = [text for _, text in attention]
    if isinstance(config, SwinMMDiTConfig):
        text_attention[-1] = 0  # nothing reads the last layer's text
    return ForwardFlops(
        video_linear=tokens * (2 * patch_channels * config.width + sum(video for video, _ in per_token)),
        text_linear=text_length * (2 * config.text_dim * config.width + sum(text for _, text in per_token)),
        conditioning=_conditioning(config),
        video_attention=tuple(video for video, _ in attention),
        text_attention=tuple(text_attention),
    )


def linear_per_token(config: Config, layer: int) -> tuple[int, int]:
    """Projections and MLP of a layer, for one video token and for one text token."""
    width, inner = config.width, config.num_heads * config.head_dim
    last = layer == config.num_layers - 1
    if isinstance(config, SwinMMDiTConfig):
        whole = 2 * width * (3 * width + width + 2 * config.mlp_ratio * width)
        return whole, 2 * width * 3 * width if last else whole  # the last layer's text: keys and values
    attention = 2 * width * (3 * inner + inner)
    if config.swiglu:
        mlp = 2 * width * 3 * nadit_layers.swiglu_width(width, config.mlp_ratio)
    else:
        mlp = 2 * width * 2 * config.mlp_ratio * width
    text_ends = last and config.text_ends_at_last_attention
    return attention + mlp, attention if text_ends else attention + mlp


@lru_cache(maxsize=2**16)
def window_sizes(layer: LayerWindows, grid: Grid) -> tuple[tuple[int, int], ...]:
    """(tokens in a window, windows of that size), the smallest first."""
    windows = layer.rule(grid, layer.window, layer.shifted)
    return tuple(sorted(Counter(math.prod(s.stop - s.start for s in window) for window in windows).items()))


def window_attention(
    inner_width: int, sizes: tuple[tuple[int, int], ...], text_length: int
) -> tuple[int, int]:
    """Scores and weighted sums of one layer: (the windows' queries, the text's queries).

    inner_width: heads times head width; sizes: (tokens, windows of that size).
    """
    keys = [(tokens, count, tokens + text_length) for tokens, count in sizes]
    video = 4 * inner_width * sum(count * tokens * seen for tokens, count, seen in keys)
    text = 4 * inner_width * text_length * sum(count * seen for _, count, seen in keys)
    return video, text


def _conditioning(config: Config) -> int:
    width = config.width
    if isinstance(config, NaDiTConfig):
        return 2 * width * (nadit_layers.SINUSOID_WIDTH + width + 6 * width)
    embedding = swin_mmdit.SINUSOID_WIDTH + config.pooled_dim + 2 * width
    # Six vectors a stream and layer; the last layer's text has two, and so has the head.
    vectors = (2 * config.num_layers - 1) * 6 + 2 + 2
    return 2 * width * (embedding + vectors * width)
