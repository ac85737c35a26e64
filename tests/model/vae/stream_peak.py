"""Peak memory of streams at 256x256, in bytes, a line each: DIRECTION BAND_PIXELS FRAMES...

DIRECTION: encode or decode. BAND_PIXELS: 0 for no bands.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.memory import reset_peak, status_bytes
from model.vae import AutoencoderConfig, CausalVideoAutoencoder

CONFIG = AutoencoderConfig(
    widths=(16, 32, 64, 64),
    latent_channels=16,
    norm_groups=8,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)
SIZE, SLICE_FRAMES = 256, 4


def stream(
    vae: CausalVideoAutoencoder, direction: str, frames: int, size: int, band_pixels: int | None
) -> Iterator[Tensor]:
    if direction == "encode":
        video = (torch.rand(1, 3, 1, size, size) for _ in range(frames))
        return vae.encode_stream(video, slice_frames=SLICE_FRAMES, band_pixels=band_pixels)
    latents = (torch.randn(1, 16, 1, size // 8, size // 8) for _ in range(frames // 4 + 1))
    return vae.decode_stream(latents, frames, size, size, slice_frames=SLICE_FRAMES, band_pixels=band_pixels)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    direction, band_pixels = sys.argv[1], int(sys.argv[2]) or None
    vae = CausalVideoAutoencoder(CONFIG)
    list(stream(vae, direction, 5, 64, band_pixels))
    for frames in map(int, sys.argv[3:]):
        start = reset_peak()
        for _ in stream(vae, direction, frames, SIZE, band_pixels):
            pass
        print(status_bytes("VmHWM") - start)
