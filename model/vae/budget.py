"""How long a slice and how large a band of rows fit into a given memory.

The estimate counts tensors by the layers' shapes, which a pass on the meta device yields, and covers what a
stream needs in addition to the weights.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder, Decoder, Encoder
from model.vae.blocks import Upsampler
from model.vae.causal_conv import CausalConv3d, StreamMemory

CHOICES: tuple[tuple[int, int | None], ...] = (
    (16, None),
    (8, None),
    (4, None),
    (4, 2048**2),
    (4, 1024**2),
    (4, 512**2),
    (4, 256**2),
)
"""(frames per slice, pixels per band), fastest first: short slices read the frames before them again, bands a
row at each border."""


@dataclass(frozen=True)
class StreamPlan:
    """Arguments of `encode_stream` and `decode_stream`, with their expected memory."""

    slice_frames: int
    band_pixels: int | None
    cache_on_host: bool
    expected_gib: float
    """on the device, besides the weights"""
    host_gib: float
    """in the host's memory, for `cache_on_host`"""

    @property
    def arguments(self) -> dict[str, Any]:
        """What to give to `encode_stream` and `decode_stream`."""
        return {
            "slice_frames": self.slice_frames,
            "band_pixels": self.band_pixels,
            "cache_on_host": self.cache_on_host,
        }


@dataclass(frozen=True)
class _Convolution:
    """One convolution's tensors in values, for one slice or, in bands, for the frames it takes at a time."""

    given: int
    with_past: int
    result: int
    pixels: int
    """of one frame of its input"""
    doubles: bool
    """its input is made from one at half the resolution"""


def plan_stream(
    config: AutoencoderConfig,
    height: int,
    width: int,
    budget_gib: float,
    bytes_per_value: int = 4,
    host: bool = False,
) -> StreamPlan:
    """The fastest choice whose estimate, for the larger of encode and decode, is within the budget.

    host: whether the host has separate memory, as with a GPU; the convolutions' memory goes there if no
    choice fits without. Raises ValueError, with the memory needed, if even the smallest choice does not fit.
    """
    gib = bytes_per_value / 2**30
    smallest = float("inf")
    for cache_on_host in (False, True) if host else (False,):
        for slice_frames, band_pixels in CHOICES:
            values = stream_values(config, height, width, slice_frames, band_pixels, cache_on_host)
            smallest = min(smallest, values * gib)
            if values * gib <= budget_gib:
                cached = max(_cached_values(config, height, width)) if cache_on_host else 0
                return StreamPlan(slice_frames, band_pixels, cache_on_host, values * gib, cached * gib)
    raise ValueError(
        f"budget of {budget_gib:g} GiB: a stream of {width}x{height} pixels needs at least "
        f"{smallest:.2f} GiB besides the weights"
    )


def stream_values(
    config: AutoencoderConfig,
    height: int,
    width: int,
    slice_frames: int,
    band_pixels: int | None,
    cache_on_host: bool = False,
) -> int:
    """Largest number of values alive at once on the device in a stream of one video, encode or decode.

    It includes the stream's memory unless that is kept on the host.
    """
    cached = (0, 0) if cache_on_host else _cached_values(config, height, width)
    working = _both_working(config, height, width, slice_frames, band_pixels, cache_on_host)
    return max(cached[0] + working[0], cached[1] + working[1])


def working_values(
    config: AutoencoderConfig,
    height: int,
    width: int,
    slice_frames: int,
    band_pixels: int | None,
    cache_on_host: bool = False,
) -> int:
    """`stream_values` without the stream's memory: for those who count that of several streams themselves."""
    return max(_both_working(config, height, width, slice_frames, band_pixels, cache_on_host))


def cache_values(config: AutoencoderConfig, height: int, width: int) -> int:
    """Values that the memories of one video's two streams, encode and decode, keep between slices."""
    return sum(_cached_values(config, height, width))


@lru_cache(4)
def _on_meta(config: AutoencoderConfig) -> CausalVideoAutoencoder:
    with torch.device("meta"):
        return CausalVideoAutoencoder(config)


@lru_cache(32)
def _cached_values(config: AutoencoderConfig, height: int, width: int) -> tuple[int, int]:
    """Values that an encode and a decode stream remember."""
    autoencoder, memories = _on_meta(config), (StreamMemory(), StreamMemory())
    with torch.device("meta"), torch.no_grad():
        for network, x, memory in zip(
            (autoencoder.encoder, autoencoder.decoder),
            _inputs(config, height, width, 0),
            memories,
            strict=True,
        ):
            network(x, memory)
    encoding, decoding = (sum(frames.numel() for frames in memory.cache.values()) for memory in memories)
    return encoding, decoding


def _inputs(config: AutoencoderConfig, height: int, width: int, slice_frames: int) -> tuple[Tensor, Tensor]:
    """The first slice, the longest, of a video and of its latent."""
    _, rows, columns = config.latent_shape(1, height, width)
    space, time = config.space_factor, config.time_factor
    video = torch.empty(1, 3, 1 + slice_frames, rows * space, columns * space)
    return video, torch.empty(1, config.latent_channels, 1 + slice_frames // time, rows, columns)


@lru_cache(256)
def _both_working(
    config: AutoencoderConfig,
    height: int,
    width: int,
    slice_frames: int,
    band_pixels: int | None,
    cache_on_host: bool,
) -> tuple[int, int]:
    """`_working_values` of encode and decode."""
    autoencoder = _on_meta(config)
    with torch.device("meta"), torch.no_grad():
        video, latent = _inputs(config, height, width, slice_frames)
        return (
            _working_values(autoencoder.encoder, video, band_pixels, cache_on_host),
            _working_values(autoencoder.decoder, latent, band_pixels, cache_on_host),
        )


def _working_values(
    network: Encoder | Decoder, x: Tensor, band_pixels: int | None, cache_on_host: bool
) -> int:
    """Without the stream's memory: the largest layer, and what waits for later ones."""
    convolutions = _observe(network, x, {} if band_pixels is None else _frames_at_a_time(network))
    waiting = x.numel()
    if band_pixels is not None:  # a level's result waits while its frames go through the levels after it
        waiting += sum(convolution.result for convolution in convolutions if convolution.doubles)
    return waiting + max(_values(conv, band_pixels, cache_on_host) for conv in convolutions)


def _values(conv: _Convolution, band_pixels: int | None, cache_on_host: bool) -> int:
    """Values alive while one convolution runs: residual, its input and output, and its temporaries."""
    visiting = conv.with_past - conv.given if cache_on_host else 0
    # The input is held before and after its activation or doubling.
    work = 2 * conv.given + visiting + conv.with_past + conv.result
    if band_pixels is None:
        return work
    whole = (0 if conv.doubles else conv.given) + 2 * conv.result
    return whole + work * min(band_pixels, conv.pixels) // conv.pixels


def _frames_at_a_time(network: Encoder | Decoder) -> dict[nn.Module, int]:
    """In bands: the most input frames of each convolution of the large levels (the others take a slice)."""
    if isinstance(network, Encoder):
        large = nn.ModuleList([network.conv_in, *network.down_blocks[: network.large_levels]])
        return {module: 2 if network.halves_time else 1 for module in large.modules()}
    frames = {module: 1 for module in (*network.up_blocks.modules(), network.conv_out)}
    temporal = (m for m in network.modules() if isinstance(m, Upsampler) and m.temporal)
    return frames | {upsampler.conv: 2 for upsampler in temporal}


def _observe(network: nn.Module, x: Tensor, frames_at_a_time: dict[nn.Module, int]) -> list[_Convolution]:
    """The shapes of a first slice through every convolution."""
    seen: list[_Convolution] = []
    doubling = {module.conv for module in network.modules() if isinstance(module, Upsampler)}

    def look(conv: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(conv, CausalConv3d)
        given = inputs[0]
        frames = min(given.shape[2], frames_at_a_time.get(conv, given.shape[2]))
        result_frames = -(-frames // conv.stride[0])
        per_frame = given.numel() // given.shape[2]
        seen.append(
            _Convolution(
                given=per_frame * frames,
                with_past=per_frame * (frames + conv.kernel_size[0] - 1),
                result=result.numel() // result.shape[2] * result_frames,
                pixels=given.shape[3] * given.shape[4],
                doubles=conv in doubling,
            )
        )

    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, CausalConv3d)]
    network(x, StreamMemory())
    for hook in hooks:
        hook.remove()
    return seen
