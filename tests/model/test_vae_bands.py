"""Layers on bands of rows: the same numbers as on whole frames, whatever the band."""

import pytest
import torch

from model.vae import AutoencoderConfig, CausalVideoAutoencoder, StreamMemory
from model.vae.bands import frame_statistics

CONFIG = AutoencoderConfig(
    widths=(8, 8, 32, 32),
    latent_channels=4,
    norm_groups=4,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def autoencoder() -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(CONFIG).double().eval()  # so that float rounding hides nothing


def random_video(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("frames", [1, 3, 13])
@pytest.mark.parametrize("band_pixels", [1, 100, 333, 10**6])
def test_bands_change_nothing(autoencoder, frames, band_pixels):
    video = random_video(2, frames, 44, 40)
    whole = torch.cat([mean for mean, _ in autoencoder.encode_stream([video], 4)], dim=2)
    banded = torch.cat(
        [mean for mean, _ in autoencoder.encode_stream([video], 4, band_pixels=band_pixels)], dim=2
    )
    assert (banded - whole).abs().max() <= 1e-10
    decoded = torch.cat(list(autoencoder.decode_stream([whole], frames, 44, 40, 4)), dim=2)
    in_bands = list(autoencoder.decode_stream([whole], frames, 44, 40, 4, band_pixels=band_pixels))
    assert (torch.cat(in_bands, dim=2) - decoded).abs().max() <= 1e-10


def test_bands_may_change_between_slices(autoencoder):
    video = random_video(1, 9, 32, 32)
    whole = autoencoder.encode(video)[0]
    memory = StreamMemory()
    means = [next(autoencoder.encode_stream([video], 4, memory, band_pixels=200))[0]]
    means += [mean for mean, _ in autoencoder.encode_stream([video[:, :, 5:]], 4, memory, band_pixels=77)]
    assert (torch.cat(means, dim=2) - whole).abs().max() <= 1e-10


def test_statistics_hold_where_the_mean_is_large():
    x = 1000 + torch.randn(1, 8, 2, 50, 40, generator=torch.Generator().manual_seed(4))
    mean, variance = frame_statistics(x, groups=2, band_pixels=170)
    grouped = x.double().view(1, 2, 4, 2, 50, 40)
    assert torch.allclose(mean.double(), grouped.mean((2, 4, 5)), rtol=1e-6)
    assert torch.allclose(variance.double(), grouped.var((2, 4, 5), correction=0), rtol=1e-3)
