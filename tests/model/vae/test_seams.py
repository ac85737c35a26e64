"""Frames of 1080p in bands: the picture of the whole frame, and no step where a band begins."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from model.vae import AutoencoderConfig, CausalVideoAutoencoder
from pipeline.weights import weights_folder

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "demo" / "weights" / "vae"
"""The project's trained weights; random ones take their place where they are not there."""
RANDOM = AutoencoderConfig(
    widths=(8, 8, 16, 16),
    latent_channels=16,
    norm_groups=4,
    encoder_layers=1,
    decoder_layers=1,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)
HEIGHT, WIDTH = 1080, 480
"""The middle quarter of 1080p: bands go over the whole width, so all columns meet the same borders."""
BAND_PIXELS = 512**2 // 4
"""136 rows at the highest resolution, as of the whole width: 7 borders, and others at each level below."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def autoencoder() -> CausalVideoAutoencoder:
    if SHIPPED.exists():
        return weights_folder.load_vae(f"file://{SHIPPED}")
    torch.manual_seed(3)
    return CausalVideoAutoencoder(RANDOM).eval()


@pytest.fixture(scope="module")
def stills() -> Tensor:
    """The middle of two real pictures at 1080p: (2, 3, 1, HEIGHT, WIDTH) in [-1, 1]."""
    frames = []
    for name in ("autumn_hills.jpg", "china.jpg"):
        with Image.open(ROOT / "demo" / "media" / name) as picture:
            resized = picture.convert("RGB").resize((1920, HEIGHT), Image.Resampling.LANCZOS)
        middle = pil_to_tensor(resized)[:, None, :, 720 : 720 + WIDTH]
        frames.append(middle.float() / 127.5 - 1)
    return torch.stack(frames)


def through(autoencoder: CausalVideoAutoencoder, video: Tensor, band_pixels: int | None) -> Tensor:
    frames, height, width = video.shape[2:]
    encoded = autoencoder.encode_stream([video], 4, band_pixels=band_pixels)
    latent = torch.cat([autoencoder.to_latent(mean, v, noise=None) for mean, v in encoded], dim=2)
    decoded = autoencoder.decode_stream([latent], frames, height, width, 4, band_pixels=band_pixels)
    return torch.cat(list(decoded), dim=2)


def psnr(a: Tensor, b: Tensor) -> float:
    """dB of two videos of range 2."""
    return 10 * torch.log10(4 / (a - b).double().square().mean()).item()


def steps(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture and each row but the first: how much more the video changes on entering the row than
    the reference does, and the reference's own change there; each (B, H - 1)."""
    added, own = ((v[..., 1:, :] - v[..., :-1, :]) for v in (video - reference, reference))
    return added.abs().mean((1, 2, 4)), own.abs().mean((1, 2, 4))


def seams(video: Tensor, reference: Tensor) -> list[int]:
    """The rows that a video enters with an added step above half of the picture's own gradient, and twice
    as large as those of the rows around: what an eye sees as a line."""
    added, own = steps(video, reference)
    around = F.pad(added, (12, 12), mode="reflect").unfold(1, 25, 1).median(dim=2).values
    return (((added > 0.5 * own) & (added > 2 * around)).any(dim=0).nonzero().flatten() + 1).tolist()


@pytest.mark.slow
def test_1080p_in_bands_is_the_whole_frames_picture(autoencoder, stills):
    whole = through(autoencoder, stills, None)
    banded = through(autoencoder, stills, BAND_PIXELS)
    assert banded.shape == stills.shape
    # 45 dB would do for tiles. Bands differ by rounding only: 117 dB with random weights, 71 with the shipped
    # ones, whose norms see constants many times larger than the picture.
    assert psnr(banded, whole) >= 65
    added, own = steps(banded, whole)
    assert (added <= 0.01 * own.clamp(min=1e-3)).all()
    assert seams(banded, whole) == []


def test_the_seam_finder_finds_a_planted_step_and_only_that(autoencoder, stills):
    """As tiles leave them: a part of the frame a little brighter, over its width or over some of it."""
    whole = through(autoencoder, stills[:1, ..., :1024, :256], None)
    own = (whole[..., 512, :] - whole[..., 511, :]).abs().mean()
    below, corner = whole.clone(), whole.clone()
    below[..., 512:, :] += own
    corner[..., 512:, :96] += 3 * own
    assert seams(below, whole) == seams(corner, whole) == [512]
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(5))
    assert seams(whole + 0.1 * own * noise, whole) == []
