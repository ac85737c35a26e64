"""Video codecs: frame counts and sizes are kept and the rate comes close to what was asked for."""

from typing import get_args

import cv2
import numpy as np
import pytest
import skimage.data

from degradations import codecs
from degradations.codecs import Encoder, recompress

ENCODERS: tuple[Encoder, ...] = get_args(Encoder)


def noisy_pan(num_frames: int, height: int, width: int, noise: float = 12.0) -> list[np.ndarray]:
    """A pan of 3 pixels a frame over a photograph, with fresh noise in each frame."""
    photo = skimage.data.astronaut()
    scale = max((height + 8) / 512, (width + 3 * num_frames) / 512, 1.0)
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    rng = np.random.default_rng(0)
    frames = []
    for index in range(num_frames):
        window = photo[4 : 4 + height, 3 * index : 3 * index + width]
        added = np.rint(rng.normal(0, noise, window.shape)).astype(np.int16)
        frames.append(cv2.add(window, added, dtype=cv2.CV_8U))
    return frames


@pytest.mark.parametrize("encoder", ENCODERS)
def test_as_many_frames_as_went_in_for_lengths_1_to_40(encoder: Encoder):
    frames = noisy_pan(40, 35, 51)
    for count in range(1, 41):
        done = recompress(frames[:count], encoder, 0.4, 24.0)
        assert len(done.frames) == count
        assert {frame.shape for frame in done.frames} == {(35, 51, 3)}
    error = np.abs(np.stack(done.frames).astype(int) - np.stack(frames)).mean(axis=(1, 2, 3))
    shifted = np.abs(done.frames[10].astype(int) - frames[20]).mean()
    assert error.max() < shifted  # each frame is itself, not a neighbour


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (17, 130)])
@pytest.mark.parametrize("fps", [1.0, 12.5, 23.976, 240.0])
def test_odd_sizes_and_odd_rates(encoder: Encoder, size: tuple[int, int], fps: float):
    frames = noisy_pan(3, *size)
    done = recompress(frames, encoder, 0.5, fps)
    assert [frame.shape for frame in done.frames] == [(*size, 3)] * 3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_same_bytes_again(encoder: Encoder):
    frames = noisy_pan(6, 48, 64)
    first, second = (recompress(frames, encoder, 0.3, 24.0) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, second.frames, strict=True))
    assert first.bits_per_pixel == second.bits_per_pixel


def assert_rate(encoder: Encoder, frames: list[np.ndarray], wanted: float) -> None:
    spent = recompress(frames, encoder, wanted, 24.0).bits_per_pixel
    factor = 2.0 if encoder in ("libx265", "libvpx-vp9") else 1.5
    assert wanted / factor <= spent <= wanted * factor, f"asked for {wanted} bits a pixel, spent {spent:.3f}"


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("wanted", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("noise", [8.0, 15.0])
def test_rate_at_256(encoder: Encoder, wanted: float, noise: float):
    assert_rate(encoder, noisy_pan(21, 256, 256, noise), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("wanted", [0.3, 1.0])
@pytest.mark.parametrize("noise", [8.0, 15.0])
def test_rate_at_720p(encoder: Encoder, wanted: float, noise: float):
    assert_rate(encoder, noisy_pan(21, 720, 1280, noise), wanted)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_short_clips_spend_more_when_asked_for_more(encoder: Encoder):
    for count in (1, 5):
        frames = noisy_pan(count, 128, 128)
        low, high = (recompress(frames, encoder, rate, 24.0).bits_per_pixel for rate in (0.1, 2.0))
        assert high > 1.5 * low


def test_a_lower_rate_looks_worse():
    frames = noisy_pan(9, 128, 128, noise=4.0)  # strong noise that is lost costs as much as noise coded badly
    errors = []
    for rate in (0.1, 0.4, 1.6):
        done = np.stack(recompress(frames, "libx264", rate, 24.0).frames)
        errors.append(np.mean((done.astype(float) - np.stack(frames)) ** 2))
    assert errors[0] > errors[1] > errors[2] > 0


def test_frames_of_other_sizes_are_brought_to_the_first():
    frames = noisy_pan(4, 64, 80)
    mixed = [cv2.resize(frame, (80 + 2 * index, 64 - 2 * index)) for index, frame in enumerate(frames)]
    assert [frame.shape for frame in recompress(mixed, "libx264", 1.0, 24.0).frames] == [(64, 80, 3)] * 4


def test_a_missing_codec_is_named(monkeypatch):
    monkeypatch.setitem(codecs._DECODERS, "libnothing", "nothing")
    with pytest.raises(ValueError, match="no 'libnothing'; give it probability 0"):
        recompress(noisy_pan(1, 16, 16), "libnothing", 1.0, 24.0)  # type: ignore[arg-type]
