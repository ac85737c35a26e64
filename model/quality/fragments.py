"""From a video to what FAST-VQA and DOVER look at: which frames, which patches of them, normalised.

Fragments (Wu et al., "FAST-VQA", 2022, section 3.1) are patches of raw pixels, one from each cell of a grid,
spliced into one small picture; the same place for a group of aligned frames. The published code draws places
and frames from global random states; here offsets are given or drawn from a given generator.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class FragmentSize:
    """How many patches of how many pixels, (rows, columns) and (height, width)."""

    grid: tuple[int, int]
    """Number of patches in a mosaic, as (rows, columns)."""
    patch: tuple[int, int]
    """Height and width of each patch, in pixels."""
    aligned: int
    """Number of successive frames whose patches are cut at the same positions."""


def fit(video: Tensor, size: FragmentSize) -> Tensor:
    """The video, enlarged (bilinear) where a side is shorter than the mosaic's. (C, T, H, W), 0 to 255.

    As published: bytes are cut, not rounded, and the enlarging factor keeps the aspect.
    """
    height, width = video.shape[-2:]
    ratio = min(height / (size.grid[0] * size.patch[0]), width / (size.grid[1] * size.patch[1]))
    if ratio >= 1:
        return video
    unit = video.float().transpose(0, 1) / 255
    larger = F.interpolate(unit, scale_factor=1 / ratio, mode="bilinear", align_corners=False)
    return (larger * 255).to(video.dtype).transpose(0, 1)


def spatial_fragments(video: Tensor, size: FragmentSize, offsets: tuple[Tensor, Tensor]) -> Tensor:
    """(C, T, H, W) of 0 to 255 -> (C, T, rows * height, columns * width) float32.

    The grid is that of the video as given, also where `fit` enlarged it (as published). ValueError for a
    video smaller than one patch, or a length that is not a multiple of `aligned`.
    """
    frames, height, width = video.shape[1:]
    (patch_h, patch_w), aligned = size.patch, 1 if frames == 1 else size.aligned
    if height < patch_h or width < patch_w:
        raise ValueError(f"a picture of {width}x{height} is smaller than a patch of {patch_w}x{patch_h}")
    if frames % aligned:
        raise ValueError(f"{frames} frames are no multiple of {aligned} aligned ones")
    pixels = fit(video, size)
    rows = [min(height // size.grid[0] * i, height - patch_h) for i in range(size.grid[0])]
    columns = [min(width // size.grid[1] * i, width - patch_w) for i in range(size.grid[1])]
    mosaic = torch.empty(video.shape[0], frames, size.grid[0] * patch_h, size.grid[1] * patch_w)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for group in range(frames // aligned):
                times = slice(group * aligned, (group + 1) * aligned)
                top = row + int(offsets[0][i, j, group])
                left = column + int(offsets[1][i, j, group])
                mosaic[:, times, i * patch_h : (i + 1) * patch_h, j * patch_w : (j + 1) * patch_w] = pixels[
                    :, times, top : top + patch_h, left : left + patch_w
                ]
    return mosaic


def centre_fragments(frame: Tensor, size: FragmentSize) -> Tensor:
    """Fragments (3, 1, h, w) from the middle of the cells of a uint8 (H, W, 3) frame: no randomness."""
    places = [
        torch.full((*size.grid, 1), max(0, n // cells - patch) // 2)
        for n, cells, patch in zip(frame.shape[:2], size.grid, size.patch, strict=True)
    ]
    return spatial_fragments(frame.permute(2, 0, 1)[:, None], size, (places[0], places[1]))


def segment_frames(
    total: int, frames: int, segments: int, interval: int, offsets: Tensor | None = None
) -> list[int]:
    """`frames` frames, `interval` apart, from each of `segments` equal parts of a video, wrapping at its end.

    offsets: (segments,) first frame within each part; None: so that the frames lie in its middle. This is
    the sampling that FAST-VQA and DOVER were trained and evaluated with, there with offsets drawn below
    total // segments - frames * interval.
    """
    part = total // segments
    if offsets is None:
        offsets = torch.full((segments,), max(0, part - frames * interval) // 2)
    starts = [part * i + int(offset) for i, offset in enumerate(offsets)]
    return [(start + k * interval) % total for start in starts for k in range(frames)]


def window_frames(total: int, frames: int, interval: int, clips: int) -> list[int]:
    """Frame numbers of `clips` windows of `frames` frames, evenly spread, wrapping at the end.

    The published single-video script samples this way, without randomness; the published evaluation samples
    like `segment_frames`.
    """
    span = frames * interval
    step = (total - span + 1) / clips
    starts = [int(step * i + step / 2) if total >= span else 0 for i in range(clips)]
    return [(start + k * interval) % total for start in starts for k in range(frames)]


def resize_frames(video: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """uint8 (C, T, H, W) -> uint8 (C, T, height, width), bilinear, the aspect ignored.

    Without antialiasing, as the tensors that DOVER was trained on: torchvision began to do it later.
    """
    import torchvision.transforms.functional as TF  # takes a second to import, with torchvision.ops

    frames = TF.resize(video.transpose(0, 1), [height, width], antialias=antialias)
    return frames.transpose(0, 1)


def normalise(video: Tensor, clips: int) -> Tensor:
    """(3, clips * T, H, W) RGB of 0 to 255 -> (clips, 3, T, H, W), normalised as for ImageNet."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return rearrange((video.float() - mean) / std, "c (n t) h w -> n c t h w", n=clips)
