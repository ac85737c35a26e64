"""Convolutions that look only into the past, and the memory that lets a video pass through in slices.

Every activation is (B, C, T, H, W), stored channels last, so that folding time into the batch (norms and
attention work per frame) is a view and not a copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# With gradients, torch often takes its slow 3D convolution on CPUs: at 16 channels 4 GFLOP/s a core, where
# the 2D convolution over stacked frames has 30 (AVX2, batch 1); a training step at widths 12 to 80 takes
# 1.45 times as long with it. From 128 channels on neither is ahead, and stacking costs memory.
FEW_CHANNELS = 100


@dataclass
class StreamMemory:
    """What one stream has to remember between two slices: the last inputs of each convolution.

    It belongs to the caller, never to the module, so one network can serve many streams and a killed job can
    resume from `state_dict()`.
    """

    cache: dict[str, Tensor] = field(default_factory=dict)
    """By convolution name: its last input frames, (B, C, `cached_frames`, H, W)."""
    frames: int = 0
    """Frames (encoder) or latent frames (decoder) that have passed, all slices so far."""
    band_pixels: int | None = None
    """Work on bands of rows of about this many pixels, and on a frame at a time where a level allows it
    (None: on whole frames and slices). Not saved, like the next: the result is the same."""
    cache_on_host: bool = False
    """Keep the cache in the host's memory, and bring each entry to the device for its own convolution."""

    @property
    def at_start(self) -> bool:
        """True until the first slice has passed."""
        return self.frames == 0

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, ready for safetensors: the cache by convolution name, and `frames`.

        They are the stream's own, so write or copy them before the stream goes on.
        """
        return {**self.cache, "frames": torch.tensor(self.frames)}

    def keep(self, name: str, frames: Tensor) -> None:
        """Remember a copy of `frames`: a view would keep the whole slice alive."""
        stored = self.empty_cache(frames.shape, frames)
        stored.copy_(frames)
        self.cache[name] = stored

    def empty_cache(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Room for a convolution's frames of `like`'s type where the cache is kept."""
        device = torch.device("cpu") if self.cache_on_host else like.device
        pinned = device.type == "cpu" and like.device.type == "cuda"  # transfers need no copy in between
        return torch.empty(
            tuple(shape),
            dtype=like.dtype,
            device=device,
            pin_memory=pinned,
            memory_format=torch.channels_last_3d,
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "StreamMemory":
        """The memory that `state_dict()` described; go on with frame number `.frames` of the source."""
        cache = {name: frames for name, frames in state.items() if name != "frames"}
        return cls(cache=cache, frames=int(state["frames"]))


def channels_last(x: Tensor) -> Tensor:
    """`x` (B, C, T, H, W) in channels-last storage, without a copy where it is so already."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate (B, C, T, H, W) tensors into a channels-last result, whatever the strides of the parts.

    `torch.cat` itself falls back to channels first if a part is a slice or expanded.
    """
    stored_last = [part.movedim(1, -1) for part in parts]
    return torch.cat(stored_last, dim={1: 4, 2: 1}[dim]).movedim(-1, 1)


def fold_time(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W), a view for channels-last storage."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def unfold_time(x: Tensor, batch: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W), the inverse of `fold_time`."""
    return rearrange(x, "(b t) c h w -> b c t h w", b=batch)


class CausalConv3d(nn.Conv3d):
    """3D convolution whose padding in time is two copies of the first frame, before it.

    In space it is an ordinary zero-padded convolution; `padding` is (0, h, w). In a stream, the last
    inputs of the slice before take the place of the copies: the last (kernel - stride) frames.
    """

    name: str
    """The key of this convolution in a StreamMemory's cache; the autoencoder sets it."""

    def forward(self, x: Tensor, memory: StreamMemory | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'); without `memory`, T is a whole clip."""
        if self.kernel_size[0] == 1:
            return self.convolve(x)
        cached = None if memory is None else memory.cache.get(self.name)
        if cached is None and x.shape[2] == 1:
            if memory is not None:
                memory.keep(self.name, x.expand(-1, -1, self.cached_frames, -1, -1))
            return self.convolve_one_frame(x)
        x = concatenate([self.before(x) if cached is None else cached.to(x.device), x], dim=2)
        if memory is not None:
            memory.keep(self.name, x[:, :, -self.cached_frames :])
        return self.convolve(x)

    @property
    def zeros(self) -> tuple[int, int]:
        """Rows and columns of zeros on each side."""
        return int(self.padding[1]), int(self.padding[2])

    @property
    def cached_frames(self) -> int:
        """How many input frames the next slice needs again."""
        return self.kernel_size[0] - self.stride[0]

    def before(self, x: Tensor) -> Tensor:
        """The frames before a clip's first one: copies of it."""
        return x[:, :, :1].expand(-1, -1, self.kernel_size[0] - 1, -1, -1)

    def convolve(self, x: Tensor, padded_rows: int | None = None) -> Tensor:
        """The convolution without padding in time: `x` begins with the frames from before.

        `padded_rows` replaces the module's own number of zero rows above and below.
        """
        padding = self.zeros if padded_rows is None else (padded_rows, self.zeros[1])
        taps, stride = self.kernel_size[0], self.stride[0]
        if taps == 1:
            return self._per_frame(x, self.weight[:, :, 0], padding)
        on_cpu = x.device.type == "cpu"
        if (
            on_cpu
            and x.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and not torch.is_grad_enabled()
        ):
            # F.conv3d uses oneDNN only sometimes; otherwise it unfolds 27 copies of the input.
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, (0, *padding), self.stride, self.dilation, self.groups
            )
        if on_cpu and min(self.in_channels, self.out_channels) < FEW_CHANNELS:
            end = x.shape[2] - taps + 1
            stacked = concatenate([x[:, :, tap : end + tap : stride] for tap in range(taps)], dim=1)
            kernel = rearrange(self.weight, "o i t h w -> o (t i) h w")
            return self._per_frame(stacked, kernel, padding)
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, *padding))

    def convolve_one_frame(self, x: Tensor) -> Tensor:
        """A clip of one frame: convolved with copies of itself, so the taps can be added up first."""
        return self._per_frame(x, self.weight.sum(dim=2), self.zeros)

    def _per_frame(self, x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
        """2D convolution of each frame by itself."""
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(fold_time(x), kernel, self.bias, self.stride[1:], padding)
        return unfold_time(y, x.shape[0])


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm over each frame by itself, so that statistics never cross time (facts: eps 1e-6)."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        return unfold_time(super().forward(fold_time(x)), x.shape[0])
