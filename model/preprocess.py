"""From pixels to what the autoencoder takes, and back: resize, crop, pad.

Tensor functions on (T, 3, H, W) frames. The released scripts resize by area and crop to multiples of 16.
`restore` pads by edge replication where they crop, and cuts its output back, so that no pixel of the input is
lost.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE_MULTIPLE = 16
"""Autoencoder 8 times patch 2."""
FRAME_MULTIPLE = 4
"""The autoencoder takes 4n + 1 frames."""


def resized_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(height, width) with the target's area and the source's aspect ratio, each side rounded."""
    scale = math.sqrt(target_height * target_width / (height * width))
    return round(height * scale), round(width * scale)


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, up or down; clamped to [0, 1]. frames: (T, 3, H, W) in [0, 1]."""
    if frames.shape[-2:] == (height, width):
        return frames.clamp(0.0, 1.0)
    resized = F.interpolate(frames, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0.0, 1.0)


def crop_to_multiple(frames: Tensor, multiple: int = SIDE_MULTIPLE) -> Tensor:
    """Centre crop of (T, 3, H, W) to the largest sides that are multiples (the released scripts' choice)."""
    height, width = frames.shape[-2:]
    new_height, new_width = height - height % multiple, width - width % multiple
    if not new_height or not new_width:
        raise ValueError(f"frames of {width}x{height} are smaller than {multiple} pixels; pad them instead")
    top, left = round((height - new_height) / 2.0), round((width - new_width) / 2.0)
    return frames[..., top : top + new_height, left : left + new_width]


def pad_to_multiple(frames: Tensor, multiple: int = SIDE_MULTIPLE) -> Tensor:
    """Replicates the bottom and right edges of (T, 3, H, W) up to the next multiples."""
    height, width = frames.shape[-2:]
    return F.pad(frames, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def padded_frame_count(frames: int, multiple: int = FRAME_MULTIPLE) -> int:
    """The next multiple * n + 1, with n >= 1 for anything longer than an image."""
    return 1 + multiple * math.ceil((frames - 1) / multiple)


def pad_frames(frames: Tensor, multiple: int = FRAME_MULTIPLE) -> Tensor:
    """Repeats the last of (T, 3, H, W) until there are multiple * n + 1; an image stays one frame."""
    missing = padded_frame_count(len(frames), multiple) - len(frames)
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def to_network(frames: Tensor) -> Tensor:
    """(T, 3, H, W) in [0, 1] -> (3, T, H, W) in [-1, 1]."""
    return (frames * 2.0 - 1.0).transpose(0, 1)


def official_preprocess(frames: Tensor, target_height: int, target_width: int) -> Tensor:
    """What the released scripts feed the autoencoder: (T, 3, H, W) in [0, 1] -> (3, T, H', W') in [-1, 1]."""
    height, width = frames.shape[-2:]
    size = resized_size(height, width, target_height, target_width)
    return to_network(crop_to_multiple(resize(frames, *size)))
