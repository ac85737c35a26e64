"""From pixels to what the autoencoder takes, and back: resize, crop, pad, colour fix.

Tensor functions on (T, 3, H, W) frames. The released scripts resize by area, crop to multiples of 16, and
take the low frequencies of the result from the input (wavelet colour fix, from StableSR). `restore` pads by
edge replication where they crop, and cuts its output back, so that no pixel of the input is lost.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE_MULTIPLE = 16
"""Autoencoder 8 times patch 2."""
FRAME_MULTIPLE = 4
"""The autoencoder takes 4n + 1 frames."""
WAVELET_LEVELS = 5


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


# --- colour fix ---


def wavelet_colour_fix(content: Tensor, style: Tensor) -> Tensor:
    """The high frequencies of `content` over the low frequencies of `style`; both (T, 3, H, W), same size.

    content: the network's output; style: its resized input; in [-1, 1] (the sum may leave it).
    """
    # The blur is linear, so one of the difference does; a frame at a time stays in the CPU's caches.
    pairs = zip(content, style, strict=True)
    return torch.stack([frame + _low_frequencies(reference - frame) for frame, reference in pairs])


def _low_frequencies(frame: Tensor) -> Tensor:
    """Five a-trous blurs of (3, H, W).

    Each is binomial over 3 x 3 taps, which are 1, 2, 4, 8 and 16 pixels apart; edges are replicated.
    """
    for level in range(WAVELET_LEVELS):
        apart = 2**level
        for axis, sides in ((-2, (0, 0, apart, apart)), (-1, (apart, apart, 0, 0))):
            size = frame.shape[axis]
            padded = F.pad(frame, sides, mode="replicate")
            frame = padded.narrow(axis, apart, size) * 0.5
            for start in (0, 2 * apart):
                frame.add_(padded.narrow(axis, start, size), alpha=0.25)
    return frame


def adain_colour_fix(content: Tensor, style: Tensor) -> Tensor:
    """`content` with each frame's and channel's mean and deviation of `style`; both (T, 3, H, W)."""
    content_std, content_mean = torch.std_mean(content, dim=(-2, -1), keepdim=True)
    style_std, style_mean = torch.std_mean(style, dim=(-2, -1), keepdim=True)
    return (content - content_mean) / content_std.clamp(min=1e-5) * style_std + style_mean
