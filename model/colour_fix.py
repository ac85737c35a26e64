"""Colours of the restored frames, taken from the input.

Tensor functions on (T, 3, H, W) frames: the wavelet fix is StableSR's, as in the released scripts, or AdaIN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WAVELET_LEVELS = 5


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
