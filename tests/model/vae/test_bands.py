"""Layers on bands of rows: the same numbers as on whole frames, whatever the band."""

import dataclasses
from typing import Any

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


def check_bands(autoencoder: CausalVideoAutoencoder, frames: int, slice_frames: int, **bands: Any) -> None:
    video = random_video(2, frames, 44, 40)
    whole = autoencoder.encode(video)[0]
    banded = [mean for mean, _ in autoencoder.encode_stream([video], slice_frames, **bands)]
    assert (torch.cat(banded, dim=2) - whole).abs().max() <= 1e-10
    decoded = autoencoder.decode(autoencoder.to_latent(whole, whole, None), frames, 44, 40)
    latent = autoencoder.to_latent(whole, whole, None)
    in_bands = list(autoencoder.decode_stream([latent], frames, 44, 40, slice_frames, **bands))
    assert (torch.cat(in_bands, dim=2) - decoded).abs().max() <= 1e-10


@pytest.mark.parametrize("frames", [1, 3, 13])
@pytest.mark.parametrize("band_pixels", [1, 100, 333, 10**6])
def test_bands_change_nothing(autoencoder, frames, band_pixels):
    check_bands(autoencoder, frames, 4, band_pixels=band_pixels)


@pytest.mark.parametrize("slice_frames", [4, 8, 16])
def test_bands_change_nothing_whatever_the_slice(autoencoder, slice_frames):
    check_bands(autoencoder, 18, slice_frames, band_pixels=200, cache_on_host=True)


@pytest.mark.parametrize("time_halvings", [0, 1, 3])
def test_bands_change_nothing_whatever_the_frame_rates(time_halvings):
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG, time_halvings=time_halvings)
    check_bands(CausalVideoAutoencoder(config).double().eval(), 11, 8, band_pixels=150)


def test_bands_in_half_precision_are_as_near_as_whole_frames():
    torch.manual_seed(0)
    single = CausalVideoAutoencoder(CONFIG).eval()
    video = random_video(1, 9, 40, 48).float()
    latent = single.to_latent(single.encode(video)[0], video, None)
    exact = single.decode(latent, 9, 40, 48)
    half = single.to(torch.bfloat16)
    errors = []
    for band_pixels in (None, 300):
        pieces = half.decode_stream([latent.bfloat16()], 9, 40, 48, 4, band_pixels=band_pixels)
        decoded = torch.cat(list(pieces), dim=2)
        assert decoded.dtype == torch.bfloat16
        errors.append((decoded.float() - exact).square().mean().sqrt())
    assert errors[0] < 0.05 * exact.std()
    assert errors[1] <= 1.1 * errors[0]


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
