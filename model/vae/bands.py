"""Layers computed on bands of rows: exact, hence without seams, for frames that would not fit otherwise.

Tiling with blended overlaps would change the picture: norms and attention would see less of the frame, and
streams of tiles together remember more than a stream of frames. Here every layer still works on the whole
frame, but a layer's temporaries (normalised input, the frames before, the convolution's workspace) exist for
one band of full-width rows at a time. A band includes the one row above and below that a 3x3 kernel needs,
and norms use the statistics of the whole frame. The result equals the unbanded one up to float rounding. What
remains is a layer's input and output, for one or two frames at the large levels (see `Encoder`, `Decoder`),
and the stream's memory of two frames per convolution, which may be kept on the host.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model.vae.causal_conv import CausalConv3d, FrameGroupNorm, StreamMemory, concatenate

Rows = Callable[[int, int], Tensor]
"""Gives rows [first, last) of a convolution's input, all its frames: (B, C, T, last - first, W)."""


def norm_silu_conv(
    norm: FrameGroupNorm,
    conv: CausalConv3d,
    x: Tensor,
    memory: StreamMemory | None,
    add_to: Tensor | None = None,
) -> Tensor:
    """conv(silu(norm(x))), plus `add_to`, which is overwritten where no gradients are asked for."""
    if memory is not None and memory.band_pixels is not None:
        return convolve_in_bands(
            conv, _norm_silu_rows(norm, x, memory.band_pixels), x.shape[3:], memory, add_to
        )
    # Without gradients the activation overwrites the norm's own output.
    h = conv(F.silu(norm(x), inplace=not torch.is_grad_enabled()), memory)
    if add_to is None:
        return h
    return add_to + h if torch.is_grad_enabled() else add_to.add_(h)


def convolve_in_bands(
    conv: CausalConv3d, rows: Rows, size: Sequence[int], memory: StreamMemory, add_to: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution in space over input `rows` of (height, width) `size`, one band at a time.

    Rows outside the frame are zeros: one on each side, or for stride 2 one at the bottom.
    """
    assert memory.band_pixels is not None and conv.kernel_size[1] == 3
    height, width = size
    stride, above = conv.stride[1], conv.zeros[0]
    step = max(1, memory.band_pixels // (width * stride))
    cache = _CacheInBands(conv, memory, height)
    result = add_to
    for top in range(0, height // stride, step):
        bottom = min(top + step, height // stride)
        first, last = top * stride - above, (bottom - 1) * stride + 3 - above
        band = rows(max(first, 0), min(last, height))
        next_first = bottom * stride - above if bottom < height // stride else height
        band = cache.put_before(band, max(first, 0), next_first)
        if first < 0 or last > height:
            band = F.pad(band, (0, 0, max(-first, 0), max(last - height, 0)))
        y = conv.convolve(band, padded_rows=0)
        if result is None:
            shape = (*y.shape[:3], height // stride, y.shape[4])
            result = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
        target = result[..., top:bottom, :]
        target.copy_(y) if add_to is None else target.add_(y)
    cache.finish()
    assert result is not None
    return result


class _CacheInBands:
    """Reads the stream's memory of one convolution and writes the next, band by band.

    Bands overlap by the kernel's reach, so they are kept apart: a row is read before it is overwritten.
    """

    def __init__(self, conv: CausalConv3d, memory: StreamMemory, height: int) -> None:
        self.conv, self.memory, self.height = conv, memory, height
        self.frames = memory.cache.get(conv.name)
        self.at_start = self.frames is None

    def put_before(self, band: Tensor, first: int, next_first: int) -> Tensor:
        """Put the frames before it in front of `band`, whose rows start at `first`.

        The next band still needs the old memory from row `next_first` on.
        """
        if self.conv.kernel_size[0] == 1:
            return band
        last = first + band.shape[3]
        if self.frames is None:
            shape = (*band.shape[:2], self.conv.cached_frames, self.height, band.shape[4])
            self.frames = self.memory.empty_cache(shape, band)
        old = self.conv.before(band) if self.at_start else self.frames[..., first:last, :].to(band.device)
        extended = concatenate([old, band], dim=2)
        kept = extended[:, :, -self.conv.cached_frames :, : next_first - first]
        self.frames[..., first:next_first, :] = kept
        return extended

    def finish(self) -> None:
        """Hand the new memory over to the stream."""
        if self.frames is not None:
            self.memory.cache[self.conv.name] = self.frames


def _norm_silu_rows(norm: FrameGroupNorm, x: Tensor, band_pixels: int) -> Rows:
    """Rows of silu(norm(x)), normalised with the statistics of whole frames."""
    mean, variance = frame_statistics(x, norm.num_groups, band_pixels)
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(x.shape[1] // norm.num_groups, dim=1)
    mean = mean.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)
    scale = scale * norm.weight[:, None]
    shift = norm.bias[:, None] - mean * scale
    scale, shift = scale[..., None, None], shift[..., None, None]

    def rows(first: int, last: int) -> Tensor:
        normalised = torch.addcmul(shift, x[..., first:last, :], scale).to(x.dtype)
        return F.silu(normalised, inplace=True)

    return rows


def frame_statistics(x: Tensor, groups: int, band_pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (B, groups, T) in fp32 at least, of the whole frames of (B, C, T, H, W).

    Bands are merged pairwise (Chan, Golub and LeVeque 1979): sums of squares would cancel where the
    mean is large.
    """
    height, width = x.shape[3:]
    step = max(1, band_pixels // width)
    count, mean, squares = 0, torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for top in range(0, height, step):
        band = rearrange(x[..., top : top + step, :], "b (g c) t h w -> b g t (h w) c", g=groups)
        band = band.to(torch.promote_types(band.dtype, torch.float32))
        band_variance, band_mean = torch.var_mean(band, dim=(3, 4), correction=0)
        band_count = band.shape[3] * band.shape[4]
        total = count + band_count
        difference = band_mean - mean
        mean = mean + difference * (band_count / total)
        squares = squares + band_variance * band_count + difference.square() * (count * band_count / total)
        count = total
    return mean, squares / count
