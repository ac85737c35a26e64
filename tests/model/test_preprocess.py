"""Resize, crop, pad and colour fix."""

from pathlib import Path

import pytest
import torch

from model import checkpoints, colour_fix, preprocess
from model.checkpoints.parity import cases

CASE = Path(__file__).parents[1] / "data/parity/preproc_a.safetensors"


def test_recorded_numbers():
    results = list(cases.check(checkpoints.read_header(CASE), checkpoints.read_tensors(CASE), "preproc_a"))
    assert len(results) > 100 and all(result.passed for result in results)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1)])
def test_padding_only_repeats_edges(size):
    frames = torch.rand(2, 3, *size)
    padded = preprocess.pad_to_multiple(frames)
    assert padded.shape[-2] % 16 == 0 and padded.shape[-1] % 16 == 0 and padded.shape[-1] - size[1] < 16
    assert torch.equal(padded[..., : size[0], : size[1]], frames)
    assert torch.equal(padded[..., -1, -1], frames[..., -1, -1])


def test_frames_are_padded_by_the_last_one():
    frames = torch.rand(6, 3, 4, 4)
    padded = preprocess.pad_frames(frames)
    assert len(padded) == 9 and torch.equal(padded[:6], frames)
    assert all(torch.equal(frame, frames[-1]) for frame in padded[6:])
    assert torch.equal(preprocess.pad_frames(frames[:1]), frames[:1])


def test_frames_too_small_to_crop_are_refused():
    with pytest.raises(ValueError, match="20x9"):
        preprocess.crop_to_multiple(torch.zeros(1, 3, 9, 20))


def test_wavelet_fix_removes_a_colour_cast_and_keeps_detail():
    torch.manual_seed(0)
    style = torch.rand(1, 3, 64, 64) * 0.2
    detail = torch.randn(1, 3, 64, 64) * 0.05
    cast = torch.tensor([0.3, -0.2, 0.1]).reshape(1, 3, 1, 1)
    fixed = colour_fix.wavelet_colour_fix(style + detail + cast, style)
    assert (fixed.mean((-2, -1)) - style.mean((-2, -1))).abs().max() < 0.01
    kept = torch.corrcoef(torch.stack([(fixed - style).flatten(), detail.flatten()]))[0, 1]
    assert kept > 0.95


def test_adain_fix_takes_mean_and_deviation_per_frame_and_channel():
    torch.manual_seed(0)
    content, style = torch.rand(2, 3, 16, 16) * 0.5 + 0.4, torch.rand(2, 3, 16, 16) * 2 - 1
    fixed = colour_fix.adain_colour_fix(content, style)
    assert torch.allclose(fixed.mean((-2, -1)), style.mean((-2, -1)), atol=1e-5)
    assert torch.allclose(fixed.std((-2, -1)), style.std((-2, -1)), atol=1e-5)
    flat = colour_fix.adain_colour_fix(torch.full((1, 3, 8, 8), 0.5), style[:1, :, :8, :8])
    assert flat.isfinite().all()
