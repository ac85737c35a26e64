"""The autoencoder's own reconstruction of a video: the ceiling of every restoration with it."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from model.vae.autoencoder import CausalVideoAutoencoder
from model.vae.causal_conv import StreamMemory
from pipeline.video import pixel_range

UNKNOWN_LENGTH = 2**62
"""Length for a decoder that does not know how many frames will come."""


def reconstruct(
    vae: CausalVideoAutoencoder, frames: Iterable[np.ndarray], slice_frames: int = 8
) -> Iterator[np.ndarray]:
    """Reconstruct uint8 (H, W, 3) frames with the autoencoder alone, from its mode, as uint8 (t, H, W, 3).

    This is the ceiling of every restoration that uses it. Memory does not grow with the length.
    """
    encoding, decoding = StreamMemory(), StreamMemory()
    parameter = next(vae.parameters())
    waiting: list[np.ndarray] = []

    @torch.inference_mode()
    def through() -> np.ndarray:
        pixels = pixel_range.to_network(np.stack(waiting), parameter.device).to(parameter.dtype)
        height, width = waiting[0].shape[:2]
        ((mean, log_variance),) = list(vae.encode_stream([pixels], slice_frames, encoding))
        latent = vae.to_latent(mean, log_variance, None)
        stream = vae.decode_stream([latent], UNKNOWN_LENGTH, height, width, slice_frames, decoding)
        (decoded,) = list(stream)
        return pixel_range.to_pixels(decoded[:, :, : len(waiting)])

    for frame in frames:
        waiting.append(frame)
        if len(waiting) == slice_frames + encoding.at_start:
            yield through()
            waiting.clear()
    if waiting:
        yield through()
