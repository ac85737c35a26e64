"""The causal video autoencoder: (4n+1, 8h, 8w) pixels <-> (n+1, h, w) latent pixels of 16 channels.

SeedVR paper section 3.2; structure and parameter names of the released checkpoint. The first latent
frame sees the first frame only, so an image is a video of one frame.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vae.bands import convolve_in_bands, norm_silu_conv
from model.vae.blocks import DownBlock, Downsampler, MiddleBlock, UpBlock, Upsampler
from model.vae.causal_conv import CausalConv3d, FrameGroupNorm, StreamMemory, channels_last, concatenate


@dataclass(frozen=True)
class AutoencoderConfig:
    """The complete shape of an autoencoder, without defaults, so that each checkpoint states all of it."""

    widths: tuple[int, ...]
    """Channels of each level, full resolution first; every level after the first halves height and width."""
    latent_channels: int
    """Channels of the latent."""
    norm_groups: int
    """Number of groups in every GroupNorm; it must divide every width."""
    encoder_layers: int
    """Residual blocks in each level of the encoder."""
    decoder_layers: int
    """Residual blocks in each level of the decoder."""
    time_halvings: int
    """How many of the levels that halve height and width also halve time, counted from the lowest
    resolution."""
    latent_scale: float
    """Factor that brings latents to unit spread: the transformer sees (z - latent_shift) * latent_scale."""
    latent_shift: float
    """Offset taken from the latent z before it is scaled: the transformer sees (z - latent_shift) *
    latent_scale."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_halvings < len(self.widths):
            raise ValueError(f"time_halvings {self.time_halvings} must be in 0..{len(self.widths) - 1}")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"width {width} is not a multiple of norm_groups {self.norm_groups}")

    @property
    def space_factor(self) -> int:
        """Pixels per latent pixel along each side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2**self.time_halvings

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of a video of any (T, H, W) in frames and pixels; parts count as wholes."""
        time, space = self.time_factor, self.space_factor
        return -(-(frames - 1) // time) + 1, -(-height // space), -(-width // space)


FULL_CONFIG = AutoencoderConfig(
    widths=(128, 256, 512, 512),
    latent_channels=16,
    norm_groups=32,
    encoder_layers=2,
    decoder_layers=3,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)
"""The paper's 250.6M parameters: the released checkpoint."""


class Encoder(nn.Module):
    """Video to the posterior's moments."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = CausalConv3d(3, widths[0], 3, padding=(0, 1, 1))
        first_temporal = len(widths) - 1 - config.time_halvings
        self.large_levels = first_temporal + 1
        """Levels at the video's own frame rate, up to the first that halves time."""
        self.halves_time = config.time_halvings > 0
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            down = None if last else Downsampler(width, temporal=level >= first_temporal)
            previous = widths[max(level - 1, 0)]
            self.down_blocks.append(DownBlock(previous, width, config.encoder_layers, groups, down))
        self.mid_block = MiddleBlock(widths[-1], groups)
        self.conv_norm_out = FrameGroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3, padding=(0, 1, 1))

    def forward(self, video: Tensor, memory: StreamMemory | None = None) -> Tensor:
        """(B, 3, 4n+1, 8h, 8w) -> (B, 2*16, n+1, h, w); 4n frames -> n in a stream that has begun."""
        video = channels_last(video)
        if memory is not None and memory.band_pixels is not None:
            x = concatenate([self._large(p, memory) for p in self._pieces(video, memory)], dim=2)
        else:
            x = self._large(video, memory)
        for block in self.down_blocks[self.large_levels :]:
            x = block(x, memory)
        x = self.mid_block(x, memory)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, memory)

    def _large(self, video: Tensor, memory: StreamMemory | None) -> Tensor:
        if memory is not None and memory.band_pixels is not None:
            x = convolve_in_bands(self.conv_in, lambda a, b: video[..., a:b, :], video.shape[3:], memory)
        else:
            x = self.conv_in(video, memory)
        for block in self.down_blocks[: self.large_levels]:
            x = block(x, memory)
        return x

    def _pieces(self, video: Tensor, memory: StreamMemory) -> tuple[Tensor, ...]:
        """As few frames at a time as the large levels take: a stream's first by itself, then two or one."""
        step, frames = 2 if self.halves_time else 1, video.shape[2]
        first = [1] if self.conv_in.name not in memory.cache else []
        return video.split([*first, *[step] * ((frames - len(first)) // step)], dim=2)


class Decoder(nn.Module):
    """Unscaled latent to video."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.norm_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3, padding=(0, 1, 1))
        self.mid_block = MiddleBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            up = None if last else Upsampler(width, temporal=level < config.time_halvings)
            previous = widths[max(level - 1, 0)]
            self.up_blocks.append(UpBlock(previous, width, config.decoder_layers, groups, up))
        self.conv_norm_out = FrameGroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, 3, padding=(0, 1, 1))

    def forward(self, z: Tensor, memory: StreamMemory | None = None) -> Tensor:
        """(B, 16, n+1, h, w) -> (B, 3, 4n+1, 8h, 8w); n -> 4n frames in a stream that has begun."""
        x = self.mid_block(self.conv_in(channels_last(z), memory), memory)
        if memory is not None and memory.band_pixels is not None:
            return concatenate(list(self._frame_by_frame(x, 0, memory)), dim=2)
        for block in self.up_blocks:
            x = block(x, memory)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, memory)

    def _frame_by_frame(self, x: Tensor, level: int, memory: StreamMemory) -> Iterator[Tensor]:
        """The video of a level's input, each frame going through all levels above before the next one."""
        for frame in x.split(1, dim=2):
            if level < len(self.up_blocks):
                yield from self._frame_by_frame(self.up_blocks[level](frame, memory), level + 1, memory)
            else:
                yield norm_silu_conv(self.conv_norm_out, self.conv_out, frame, memory)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the adaptive discriminator weight measures gradients at."""
        return self.conv_out.weight


class CausalVideoAutoencoder(nn.Module):
    """Encode and decode video of any length and size, whole or as a stream.

    Pixels are (B, 3, T, H, W) in [-1, 1]. `encode` gives the posterior's moments; `to_latent` and
    `decode` are the only two places where latent scale and shift are applied.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv3d):
                module.name = name

    # -- whole clips ----------------------------------------------------------------------------------

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each (B, 16, T', H', W'), of a video of any length and size.

        Up to the next 4n+1 frames the last one is repeated; up to multiples of 8 pixels the edge is.
        """
        return self._moments(self.encoder(self._pad(video, first=True)))

    def to_latent(self, mean: Tensor, log_variance: Tensor, noise: Tensor | None) -> Tensor:
        """The DiT's latent: one sample of the posterior, or its mode for `noise` None, shifted and scaled."""
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return (z - self.config.latent_shift) * self.config.latent_scale

    def from_latent(self, latent: Tensor) -> Tensor:
        """The decoder's input: undoes scale and shift of `to_latent`."""
        return latent / self.config.latent_scale + self.config.latent_shift

    def decode(self, latent: Tensor, num_frames: int, height: int, width: int) -> Tensor:
        """(B, 16, T', H', W') scaled latent -> (B, 3, num_frames, height, width), trimmed to that size."""
        expected = self.config.latent_shape(num_frames, height, width)
        if tuple(latent.shape[2:]) != expected:
            raise ValueError(
                f"latent of {tuple(latent.shape[2:])} (T', H', W') cannot give {num_frames} frames of "
                f"{height}x{width}, which needs {expected}"
            )
        return self.decode_unscaled(self.from_latent(latent))[:, :, :num_frames, :height, :width]

    def decode_unscaled(self, z: Tensor) -> Tensor:
        """(B, 16, n+1, h, w) posterior sample or mean -> (B, 3, 4n+1, 8h, 8w), nothing trimmed."""
        return self.decoder(z)

    # -- streams --------------------------------------------------------------------------------------

    def encode_stream(
        self,
        frames: Iterable[Tensor],
        slice_frames: int,
        memory: StreamMemory | None = None,
        band_pixels: int | None = None,
        cache_on_host: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Moments slice by slice, equal to `encode` of the whole; memory does not grow with length.

        `frames` are pieces (B, 3, any t, H, W) of one video; they are cut again into slices of
        1 + slice_frames and then slice_frames (a multiple of 4) frames, of which the last may be shorter.
        To resume, give a `memory` saved between two results and the frames from `memory.frames` on.
        `band_pixels` bounds what a layer works on at once (no gradients; see `model.vae.bands`), and
        `cache_on_host` keeps the memory off the device: `model.vae.budget` chooses both.
        """
        self._check_slice(slice_frames)
        memory = StreamMemory() if memory is None else memory
        memory.band_pixels, memory.cache_on_host = band_pixels, cache_on_host
        for piece in _cut(frames, slice_frames, first=memory.at_start):
            padded = self._pad(piece, first=memory.at_start)
            moments = self._moments(self.encoder(padded, memory))
            memory.frames += piece.shape[2]
            yield moments

    def decode_stream(  # noqa: PLR0913 - a stream states its whole shape
        self,
        latents: Iterable[Tensor],
        num_frames: int,
        height: int,
        width: int,
        slice_frames: int,
        memory: StreamMemory | None = None,
        band_pixels: int | None = None,
        cache_on_host: bool = False,
    ) -> Iterator[Tensor]:
        """Video slice by slice, equal to `decode` of the whole; memory does not grow with length.

        `latents` are pieces (B, 16, any t, H', W') of one scaled latent. To resume, give a `memory` saved
        between two results and the latent frames from `memory.frames` on; `num_frames` is always that
        of the whole video. `band_pixels` and `cache_on_host` are as in `encode_stream`.
        """
        self._check_slice(slice_frames)
        memory = StreamMemory() if memory is None else memory
        memory.band_pixels, memory.cache_on_host = band_pixels, cache_on_host
        factor = self.config.time_factor
        for piece in _cut(latents, slice_frames // factor, first=memory.at_start):
            done = 0 if memory.at_start else (memory.frames - 1) * factor + 1
            video = self.decoder(self.from_latent(piece), memory)
            memory.frames += piece.shape[2]
            yield video[:, :, : num_frames - done, :height, :width]

    # -- details --------------------------------------------------------------------------------------

    def _pad(self, video: Tensor, first: bool) -> Tensor:
        """Whole latent pixels: 4n+1 frames (4n if not the `first` slice), sides multiples of 8."""
        frames, height, width = video.shape[2:]
        factor, space = self.config.time_factor, self.config.space_factor
        pad = (-width % space, -height % space, ((1 if first else 0) - frames) % factor)
        if not any(pad):
            return video
        return F.pad(video, (0, pad[0], 0, pad[1], 0, pad[2]), mode="replicate")

    def _moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encoded.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _check_slice(self, slice_frames: int) -> None:
        factor = self.config.time_factor
        if slice_frames < 1 or slice_frames % factor:
            raise ValueError(f"slice_frames {slice_frames} must be a positive multiple of {factor}")


def posterior_noise(shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise for `to_latent`: drawn on the CPU, so that a seed means the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _cut(pieces: Iterable[Tensor], length: int, first: bool) -> Iterator[Tensor]:
    """Re-cut pieces along time: first 1 + length, then length each; the last may be shorter."""
    waiting: list[Tensor] = []
    wanted = length + 1 if first else length
    for piece in pieces:
        waiting.append(piece)
        while (have := sum(p.shape[2] for p in waiting)) >= wanted:
            joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            waiting = [joined[:, :, wanted:]] if have > wanted else []
            yield joined[:, :, :wanted]
            wanted = length
    if waiting:
        yield torch.cat(waiting, dim=2)
