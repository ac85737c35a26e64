"""A start for narrow autoencoders: before its first step the network is a Haar wavelet codec.

Narrow networks learn slowly from random weights: what their residual branches need first is a linear way
from pixels to latent and back. This start gives it: colours as luma and two differences, one Haar
transform a level, the 16 coarsest coefficients as the latent, all residual branches at zero. It is our own
choice; the paper trains its 250.6M parameters from scratch.

Norms stand before both last convolutions. A norm over all channels (`norm_groups` 1) keeps how bright a
frame is only in relation to its other channels, so a pair of constant channels serves as the measure, and
a pair (x, -x) passes the activation unchanged: silu(x) - silu(-x) = x.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder, Decoder, Encoder
from model.vae.blocks import Downsampler, ResidualBlock, Upsampler
from model.vae.causal_conv import CausalConv3d

CONSTANT = 4.0
"""Value of the constant channels; pixels and their averages are within about 1.7."""
DETAIL_GAIN = 4.0
"""Ratio of the detail latents' scale to that of the averages: details are several times smaller."""
LOG_VARIANCE = -5.0
"""Of the posterior at the start."""
# Orthonormal: luma, red against blue, green against both.
_COLOURS = torch.nn.functional.normalize(
    torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]]), dim=1
)


@dataclass(frozen=True)
class _Coefficient:
    """One channel of a level: which channel of the finer level it comes from, low or high along each axis."""

    parent: int
    high: tuple[int, int, int]
    """0 average, 1 difference, along (y, x, t)"""
    frequency: tuple[int, int, int]
    colour: int

    @property
    def coarseness(self) -> float:
        """Sorting key; lower first: what carries most of a natural video's energy."""
        y, x, t = self.frequency
        return y + x + 1.5 * t + (3.0 if self.colour else 0.0)


def check_wavelet_start(config: AutoencoderConfig) -> None:
    """ValueError if the widths cannot hold the codec.

    `norm_groups` must be 1; the first level must have 8 channels and the last 2 more than twice the latent's,
    each other than its neighbour's, and those between as many as there are coefficients.
    """
    if config.norm_groups != 1:
        raise ValueError(f"norm_groups {config.norm_groups}: a start as wavelets needs 1")
    if config.widths[0] == config.widths[1] or config.widths[-2] == config.widths[-1]:
        raise ValueError("widths: a start as wavelets needs the first two to differ, and the last two")
    levels = _coefficients(config)
    ends = {0: 2 * 3 + 2, len(levels) - 1: 2 * config.latent_channels + 2}
    for level, (width, kept) in enumerate(zip(config.widths, levels, strict=True)):
        needed = ends.get(level, len(kept))
        if width < needed:
            raise ValueError(
                f"widths: level {level} has {width} channels, a start as wavelets needs {needed}"
            )


def start_as_wavelets(autoencoder: CausalVideoAutoencoder) -> None:
    """Overwrite random weights with the codec described above. ValueError as `check_wavelet_start`."""
    check_wavelet_start(autoencoder.config)
    levels = _coefficients(autoencoder.config)
    with torch.no_grad():
        for module in autoencoder.modules():
            if isinstance(module, ResidualBlock):
                _zero_branch(module)
        for half in (autoencoder.encoder, autoencoder.decoder):
            out = half.mid_block.attentions[0].get_submodule("to_out.0")
            out.get_parameter("weight").zero_()
            out.get_parameter("bias").zero_()
        _start_encoder(autoencoder.encoder, levels)
        _start_decoder(autoencoder.decoder, levels)


def _coefficients(config: AutoencoderConfig) -> list[list[_Coefficient]]:
    """For each level, finest first, the coefficients that the latent's come from."""
    halvings = len(config.widths) - 1
    temporal = [level >= halvings - config.time_halvings for level in range(halvings)]
    levels = [[_Coefficient(colour, (0, 0, 0), (0, 0, 0), colour) for colour in range(3)]]
    for halves_time in temporal:
        children = []
        for parent, coefficient in enumerate(levels[-1]):
            for high in itertools.product((0, 1), (0, 1), (0, 1) if halves_time else (0,)):
                doubled = [
                    2 * coefficient.frequency[0],
                    2 * coefficient.frequency[1],
                    (1 + halves_time) * coefficient.frequency[2],
                ]
                y, x, t = (f + h for f, h in zip(doubled, high, strict=True))
                children.append(_Coefficient(parent, high, (y, x, t), coefficient.colour))
        # Finer ones come from these alone, so the coarsest of the last level are among their children.
        levels.append(sorted(children, key=lambda c: c.coarseness)[: config.latent_channels])
    for level in range(len(levels) - 1, 0, -1):  # drop what no coarser one needs
        needed = sorted({coefficient.parent for coefficient in levels[level]})
        place = {old: new for new, old in enumerate(needed)}
        levels[level] = [_Coefficient(place[c.parent], c.high, c.frequency, c.colour) for c in levels[level]]
        levels[level - 1] = [levels[level - 1][old] for old in needed]
    return levels


def _zero_branch(block: ResidualBlock) -> None:
    """The block is its input, or where widths differ its first channels and a mixture of all."""
    block.conv2.weight.zero_()
    block.conv2.get_parameter("bias").zero_()
    if block.conv_shortcut is not None:
        weight = block.conv_shortcut.weight
        same = min(weight.shape[:2])
        weight.mul_(0.5)[:same] = 0
        weight[range(same), range(same)] = 1
        block.conv_shortcut.get_parameter("bias").zero_()


def _clear(conv: CausalConv3d, channels: int) -> Tensor:
    """The weight, its first output channels set to zero."""
    conv.weight[:channels] = 0
    conv.get_parameter("bias")[:channels] = 0
    return conv.weight


def _signs(coefficient: _Coefficient, halves_time: bool) -> list[tuple[int, int, int, int]]:
    """(y, x, t, sign) of a coefficient's pixels within its block."""
    times = (0, 1) if halves_time else (0,)
    return [
        (y, x, t, (-1) ** sum(a * b for a, b in zip((y, x, t), coefficient.high, strict=True)))
        for y, x, t in itertools.product((0, 1), (0, 1), times)
    ]


def _gains(levels: list[list[_Coefficient]]) -> Tensor:
    """Latent value of a coefficient of value 1."""
    return torch.tensor([DETAIL_GAIN if any(coefficient.frequency) else 1.0 for coefficient in levels[-1]])


def _start_encoder(encoder: Encoder, levels: list[list[_Coefficient]]) -> None:
    colours = [coefficient.colour for coefficient in levels[0]]
    _clear(encoder.conv_in, len(colours))[: len(colours), :, -1, 1, 1] = _COLOURS[colours]
    downs = [module for module in encoder.modules() if isinstance(module, Downsampler)]
    for down, kept in zip(downs, levels[1:], strict=True):
        halves_time = down.conv.kernel_size[0] == 3
        weight = _clear(down.conv, len(kept))
        for i, coefficient in enumerate(kept):
            for y, x, t, sign in _signs(coefficient, halves_time):
                # Of three taps the first is the block before; frames 2n-1 and 2n make latent frame n.
                weight[i, coefficient.parent, t + 1 if halves_time else 0, y, x] = sign / (
                    8 if halves_time else 4
                )
    count = len(levels[-1])
    shortcut = encoder.down_blocks[-1].get_submodule("resnets.0.conv_shortcut")
    width = shortcut.get_parameter("weight").shape[1]
    measure = _pairs_and_constants(shortcut, torch.eye(count, width))
    out = encoder.conv_out
    weight = _clear(out, 2 * count)
    for i, gain in enumerate(_gains(levels).tolist()):
        weight[i, i, -1, 1, 1] = gain * measure
        weight[i, count + i, -1, 1, 1] = -gain * measure
    out.get_parameter("bias")[count:] = LOG_VARIANCE


def _start_decoder(decoder: Decoder, levels: list[list[_Coefficient]]) -> None:
    count = len(levels[-1])
    _clear(decoder.conv_in, count)[range(count), range(count), -1, 1, 1] = 1 / _gains(levels)
    ups = [module for module in decoder.modules() if isinstance(module, Upsampler)]
    for up, coarse, fine in zip(ups, levels[:0:-1], levels[-2::-1], strict=True):
        width = up.conv.in_channels
        copies = up.upscale_conv.weight.view(2, 2, 2 if up.temporal else 1, width, width)  # y x t out in
        copies[:, :, :, : len(fine)] = 0
        copies[..., : len(coarse)] = 0
        for i, coefficient in enumerate(coarse):
            for y, x, t, sign in _signs(coefficient, up.temporal):
                copies[y, x, t, coefficient.parent, i] = sign
        _clear(up.conv, len(fine))[range(len(fine)), range(len(fine)), -1, 1, 1] = 1
    shortcut = decoder.up_blocks[-1].get_submodule("resnets.0.conv_shortcut")
    to_rgb = torch.zeros(3, shortcut.get_parameter("weight").shape[1])
    to_rgb[:, : len(levels[0])] = _COLOURS[[coefficient.colour for coefficient in levels[0]]].T
    measure = _pairs_and_constants(shortcut, to_rgb)
    weight = _clear(decoder.conv_out, 3)
    for i in range(3):
        weight[i, i, -1, 1, 1] = measure
        weight[i, 3 + i, -1, 1, 1] = -measure


def _pairs_and_constants(shortcut: torch.nn.Module, values: Tensor) -> float:
    """Make a 1x1x1 convolution give `values` (n, in) of its input, their negatives, and two constants.

    Returns what a norm over all channels divides by where the constants outweigh the rest.
    """
    weight, bias = shortcut.get_parameter("weight"), shortcut.get_parameter("bias")
    count = len(values)
    weight.mul_(0.1)[: 2 * count + 2] = 0
    weight[:count, :, 0, 0, 0] = values
    weight[count : 2 * count, :, 0, 0, 0] = -values
    bias[2 * count], bias[2 * count + 1] = CONSTANT, -CONSTANT
    return CONSTANT * (2 / weight.shape[0]) ** 0.5
