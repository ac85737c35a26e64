"""The autoencoder: released names and numbers, any size, streaming, causality, sampling."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder, StreamMemory, posterior_noise

PARITY = Path(__file__).parents[2] / "data" / "parity"
TINY = AutoencoderConfig(
    widths=(8, 8, 16, 16),
    latent_channels=16,
    norm_groups=4,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.5,
)


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny() -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(TINY).eval()


def video_of(frames: int, height: int = 24, width: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_full_size_has_the_released_names_shapes_and_parameter_counts():
    with torch.device("meta"):
        full = CausalVideoAutoencoder(FULL_CONFIG)
    recorded = json.loads((PARITY / "keys_vae.json").read_text())
    assert {name: list(t.shape) for name, t in full.state_dict().items()} == {
        name: shape for name, (shape, _) in recorded["keys"].items()
    }
    assert sum(p.numel() for p in full.encoder.parameters()) == 100_046_496
    assert sum(p.numel() for p in full.decoder.parameters()) == 150_601_731


def check_size(autoencoder: CausalVideoAutoencoder, frames: int, height: int, width: int) -> None:
    video = video_of(frames, height, width)
    mean, log_variance = autoencoder.encode(video)
    assert mean.shape == log_variance.shape == (1, 16, *TINY.latent_shape(frames, height, width))
    latent = autoencoder.to_latent(mean, log_variance, noise=None)
    assert autoencoder.decode(latent, frames, height, width).shape == video.shape
    streamed = autoencoder.decode_stream([latent], frames, height, width, 8)
    assert sum(piece.shape[2] for piece in streamed) == frames


@pytest.mark.parametrize("frames", range(1, 11))
def test_any_length_comes_back_as_it_was(tiny, frames):
    check_size(tiny, frames, 37, 53)


@pytest.mark.parametrize("frames", range(11, 41))
def test_longer_ones_too(tiny, frames):
    check_size(tiny, frames, 9, 17)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1080, 16), (719, 1279), (1, 8), (2, 1000)])
def test_any_size_comes_back_as_it_was(tiny, height, width):
    check_size(tiny, 2, height, width)


def test_padding_repeats_the_edge(tiny):
    video = video_of(6, 13, 15)
    by_hand = video[:, :, [0, 1, 2, 3, 4, 5, 5, 5, 5]]
    by_hand = torch.cat([by_hand, by_hand[..., -1:, :].expand(-1, -1, -1, 3, -1)], dim=-2)
    by_hand = torch.cat([by_hand, by_hand[..., -1:]], dim=-1)
    assert largest_difference(tiny.encode(video)[0], tiny.encode(by_hand)[0]) == 0


def test_decode_refuses_a_latent_of_another_size(tiny):
    with pytest.raises(ValueError, match="needs"):
        tiny.decode(torch.zeros(1, 16, 2, 3, 4), num_frames=6, height=24, width=32)


def streamed_moments(autoencoder: CausalVideoAutoencoder, video: Tensor, slice_frames: int, piece: int):
    moments = list(autoencoder.encode_stream(video.split(piece, dim=2), slice_frames))
    return tuple(torch.cat(parts, dim=2) for parts in zip(*moments, strict=True))


def check_streaming(autoencoder: CausalVideoAutoencoder, frames: int, slice_frames: int) -> None:
    video = video_of(frames, 20, 24)
    mean, log_variance = autoencoder.encode(video)
    means, log_variances = streamed_moments(autoencoder, video, slice_frames, piece=3)
    assert largest_difference(means, mean) <= 1e-5
    assert largest_difference(log_variances, log_variance) <= 1e-5
    latent = autoencoder.to_latent(mean, log_variance, noise=None)
    slices = list(autoencoder.decode_stream(latent.split(1, dim=2), frames, 20, 24, slice_frames))
    whole = autoencoder.decode(latent, frames, 20, 24)
    assert largest_difference(torch.cat(slices, dim=2), whole) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 7, 17, 33])
@pytest.mark.parametrize("slice_frames", [4, 8, 16])
def test_streaming_equals_one_pass(tiny, frames, slice_frames):
    check_streaming(tiny, frames, slice_frames)


@pytest.mark.slow
@pytest.mark.parametrize("slice_frames", [4, 8, 16])
def test_streaming_a_long_clip_equals_one_pass(tiny, slice_frames):
    check_streaming(tiny, 129, slice_frames)


def test_streaming_wide_channels_equals_one_pass():
    torch.manual_seed(0)
    wide = dataclasses.replace(TINY, widths=(32, 32), norm_groups=8, time_halvings=1)
    check_streaming(CausalVideoAutoencoder(wide), 9, 4)


def test_streams_resume_from_saved_memory(tiny):
    video = video_of(13)
    whole = streamed_moments(tiny, video, 4, piece=13)[0]
    memory = StreamMemory()
    begun = [next(tiny.encode_stream([video], 4, memory))[0]]
    resumed = StreamMemory.from_state_dict(memory.state_dict())
    begun += [mean for mean, _ in tiny.encode_stream([video[:, :, resumed.frames :]], 4, resumed)]
    assert largest_difference(torch.cat(begun, dim=2), whole) == 0

    decoded = torch.cat(list(tiny.decode_stream([whole], 13, 24, 32, 4)), dim=2)
    memory = StreamMemory()
    begun = [next(tiny.decode_stream([whole], 13, 24, 32, 4, memory))]
    resumed = StreamMemory.from_state_dict(memory.state_dict())
    begun += list(tiny.decode_stream([whole[:, :, resumed.frames :]], 13, 24, 32, 4, resumed))
    assert largest_difference(torch.cat(begun, dim=2), decoded) == 0


def test_a_stream_may_begin_with_a_single_frame(tiny):
    video = video_of(9)
    memory = StreamMemory()
    begun = [next(tiny.encode_stream([video[:, :, :1]], 4, memory))[0]]
    begun += [mean for mean, _ in tiny.encode_stream([video[:, :, 1:]], 4, memory)]
    assert largest_difference(torch.cat(begun, dim=2), tiny.encode(video)[0]) <= 1e-5


def test_memory_of_a_stream_does_not_grow(tiny):
    memory, sizes = StreamMemory(), []
    for _ in tiny.encode_stream([video_of(21)], 4, memory):
        sizes.append(sum(frames.untyped_storage().nbytes() for frames in memory.cache.values()))
    assert len(sizes) == 5
    assert len(set(sizes)) == 1


def test_slices_are_whole_latent_frames(tiny):
    with pytest.raises(ValueError, match="multiple of 4"):
        next(tiny.encode_stream([video_of(9)], 6))


def test_the_past_does_not_see_the_future(tiny):
    video = video_of(13)
    mean = tiny.encode(video)[0]
    assert largest_difference(tiny.encode(video[:, :, :5])[0], mean[:, :, :2]) <= 1e-6
    assert largest_difference(tiny.encode(video[:, :, :1])[0], mean[:, :, :1]) <= 1e-5
    changed = torch.cat([video[:, :, :9], -video[:, :, 9:]], dim=2)
    assert largest_difference(tiny.encode(changed)[0][:, :, 3:], mean[:, :, 3:]) > 1e-2
    decoded = tiny.decoder(mean)
    assert largest_difference(tiny.decoder(mean[:, :, :2]), decoded[:, :, :5]) <= 1e-6


def test_both_convolution_routes_and_their_gradients_agree(tiny):
    from model.vae import causal_conv

    video = video_of(5, 16, 16)
    results = []
    for few in (0, causal_conv.FEW_CHANNELS):
        with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
            patch.setattr(causal_conv, "FEW_CHANNELS", few)
            mean = tiny.encode(video)[0]
            loss = tiny.decoder(mean).square().mean()
            results.append((mean.detach(), torch.autograd.grad(loss, tiny.encoder.conv_in.weight)[0]))
    assert largest_difference(results[0][0], results[1][0]) <= 2e-5
    assert largest_difference(results[0][1], results[1][1]) <= 1e-5 + 1e-4 * results[0][1].abs().max().item()


def test_latents_are_seeded_samples_scaled_once(tiny):
    mean, log_variance = torch.full((1, 16, 2, 3, 4), 2.0), torch.full((1, 16, 2, 3, 4), -2.0)
    noise = posterior_noise(tuple(mean.shape), seed=7)
    sample = tiny.to_latent(mean, log_variance, noise)
    assert torch.equal(sample, tiny.to_latent(mean, log_variance, posterior_noise(tuple(mean.shape), seed=7)))
    assert largest_difference(sample, (2.0 + noise * torch.exp(torch.tensor(-1.0)) - 0.5) * 0.9152) <= 1e-6
    assert not torch.equal(noise, posterior_noise(tuple(mean.shape), seed=8))
    mode = tiny.to_latent(mean, log_variance, noise=None)
    assert largest_difference(tiny.from_latent(mode), mean) <= 1e-6


def test_upsampling_starts_as_a_nearest_copy():
    from model.vae.blocks import Upsampler

    upsampler = Upsampler(4, temporal=True)
    with torch.no_grad():  # a convolution that passes the newest frame through
        upsampler.conv.weight.zero_()[:, :, 2, 1, 1] = torch.eye(4)
        upsampler.conv.get_parameter("bias").zero_()
    x = torch.randn(1, 4, 2, 3, 3)
    expected = x.repeat_interleave(2, 2)[:, :, 1:].repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert largest_difference(upsampler(x, None), expected) <= 1e-6
