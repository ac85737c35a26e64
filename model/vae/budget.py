"""How long a slice and how large a band of rows fit into a given memory.

The estimate counts tensors from the layers' shapes, which a pass on the meta device gives; it is for
what a stream needs besides the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from model.vae.blocks import Upsampler
from model.vae.causal_conv import CausalConv3d, StreamMemory

CHOICES: tuple[tuple[int, int | None], ...] = (
    (16, None),
    (8, None),
    (4, None),
    (4, 1024**2),
    (4, 512**2),
    (4, 256**2),
    (4, 128**2),
)
"""(frames a slice, pixels a band), fastest first: bands reread a row at each border, short slices the
frames before them."""


@dataclass(frozen=True)
class StreamPlan:
    """Arguments of `encode_stream` and `decode_stream`, and what they are expected to take."""

    slice_frames: int
    band_pixels: int | None
    expected_gib: float


@dataclass(frozen=True)
class _Convolution:
    """One convolution's tensors in values, for one slice."""

    given: int
    with_past: int
    result: int
    pixels: int
    """of one frame of its input"""
    doubles: bool
    """its input is made from one at half the resolution"""


def plan_stream(
    config: AutoencoderConfig, height: int, width: int, budget_gib: float, bytes_per_value: int = 4
) -> StreamPlan:
    """The fastest choice whose estimate, for the larger of encode and decode, is within the budget.

    ValueError if the smallest does not fit either; it names what that one needs.
    """
    plan = None
    for slice_frames, band_pixels in CHOICES:
        values = stream_values(config, height, width, slice_frames, band_pixels)
        plan = StreamPlan(slice_frames, band_pixels, values * bytes_per_value / 2**30)
        if plan.expected_gib <= budget_gib:
            return plan
    assert plan is not None
    raise ValueError(
        f"budget of {budget_gib:g} GiB: a stream of {width}x{height} pixels needs at least "
        f"{plan.expected_gib:.2f} GiB besides the weights"
    )


def stream_values(
    config: AutoencoderConfig, height: int, width: int, slice_frames: int, band_pixels: int | None
) -> int:
    """Most values alive at once in a stream of one video, encode or decode, its memory included."""
    with torch.device("meta"), torch.no_grad():
        autoencoder = CausalVideoAutoencoder(config)
        _, rows, columns = config.latent_shape(1, height, width)
        space, time = config.space_factor, config.time_factor
        video = torch.empty(1, 3, 1 + slice_frames, rows * space, columns * space)
        latent = torch.empty(1, config.latent_channels, 1 + slice_frames // time, rows, columns)
        return max(
            _most_values(autoencoder.encoder, video, band_pixels),
            _most_values(autoencoder.decoder, latent, band_pixels),
        )


def _most_values(network: nn.Module, x: Tensor, band_pixels: int | None) -> int:
    convolutions, memory = _observe(network, x)
    kept = sum(tail.numel() for tail in memory.tails.values())
    return kept + x.numel() + max(_values(convolution, band_pixels) for convolution in convolutions)


def _values(conv: _Convolution, band_pixels: int | None) -> int:
    """Values alive while one convolution runs: residual, its input and output, and its temporaries."""
    if band_pixels is None or band_pixels >= conv.pixels:
        return 2 * conv.given + conv.with_past + conv.result
    whole = (0 if conv.doubles else conv.given) + 2 * conv.result
    # In a band, the input is held before and after its activation or doubling.
    in_band = 2 * conv.given + conv.with_past + conv.result
    return whole + in_band * band_pixels // conv.pixels


def _observe(network: nn.Module, x: Tensor) -> tuple[list[_Convolution], StreamMemory]:
    """The shapes of a first slice, the longest, through every convolution."""
    seen: list[_Convolution] = []
    doubling = {module.conv for module in network.modules() if isinstance(module, Upsampler)}

    def look(conv: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(conv, CausalConv3d)
        given = inputs[0]
        values_per_frame = given.numel() // given.shape[2]
        seen.append(
            _Convolution(
                given=given.numel(),
                with_past=values_per_frame * (given.shape[2] + conv.kernel_size[0] - 1),
                result=result.numel(),
                pixels=given.shape[3] * given.shape[4],
                doubles=conv in doubling,
            )
        )

    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, CausalConv3d)]
    memory = StreamMemory()
    network(x, memory)
    for hook in hooks:
        hook.remove()
    return seen, memory
