"""The parts together learn: a tiny transformer overfits eight samples of real clips, and sampling from it
gives those samples back."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import flow
from model.dit.swin_mmdit import TINY, SwinMMDiT
from model.text_encoders import TINY_ENCODERS, TextEncoders, join
from model.vae.autoencoder import CausalVideoAutoencoder
from pipeline.video import decoding
from tests.helpers.clips import MEDIA
from tests.helpers.tiny_models import WAVELET_VAE, started_as_wavelets

VIDEOS = ("cup.mp4", "box.mp4", "sintel.mp4", "pan_stream.mp4")
IMAGES = ("cat.jpg", "coffee.jpg", "rocket.jpg", "flower.jpg")
SIDE, FRAMES = 64, 5
STEPS, COPIES = 500, 3
"""Copies of the eight samples in one pack, each with its own time and noise."""


def clips_of(names: tuple[str, ...], frames: int) -> Tensor:
    """(clips, 3, frames, SIDE, SIDE) in [-1, 1]: the middle square of each clip's first frames, shrunk."""
    clips = []
    for name in names:
        decoded = list(decoding.decode_frames(str(MEDIA / name), max_frames=frames))
        pictures = torch.stack([torch.from_numpy(frame.copy()) for frame in decoded]).permute(3, 0, 1, 2)
        height, width = pictures.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pictures[:, :, top : top + side, left : left + side].float() / 127.5 - 1
        clips.append(F.interpolate(square, (SIDE, SIDE), mode="area"))
    return torch.stack(clips)


def degraded(clips: Tensor) -> Tensor:
    """An eighth of the size and back, with noise."""
    size = (clips.shape[2], SIDE // 8, SIDE // 8)
    small = F.interpolate(clips, size, mode="area")
    small = small + 0.1 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, clips.shape[2:], mode="trilinear")


def wavelet_vae(batches: tuple[Tensor, Tensor]) -> CausalVideoAutoencoder:
    """A narrow autoencoder as it starts out, already a codec; its latents of these clips have unit spread."""
    vae = started_as_wavelets(WAVELET_VAE)
    with torch.no_grad():
        spread = torch.cat([vae.encode(batch)[0].flatten() for batch in batches]).std().item()
    scaled = CausalVideoAutoencoder(dataclasses.replace(WAVELET_VAE, latent_scale=1 / spread))
    scaled.load_state_dict(vae.state_dict())
    return scaled.eval().requires_grad_(False)


def packed_latents(vae: CausalVideoAutoencoder, batches: tuple[Tensor, Tensor]) -> Tensor:
    """(latent pixels, 16) of all clips, one after the other."""
    latents = [vae.to_latent(*vae.encode(batch), noise=None).permute(0, 2, 3, 4, 1) for batch in batches]
    return torch.cat([latent.reshape(-1, 16) for latent in latents])


@torch.no_grad()
def mean_psnr(vae: CausalVideoAutoencoder, packed: Tensor, batches: tuple[Tensor, Tensor]) -> float:
    """Of the decoded latents against the clips, mean over the clips, dB."""
    found = []
    for batch in batches:
        count, _, frames, height, width = batch.shape
        shape = vae.config.latent_shape(frames, height, width)
        rows = count * shape[0] * shape[1] * shape[2]
        latents, packed = packed[:rows], packed[rows:]
        decoded = vae.decode(latents.reshape(count, *shape, 16).permute(0, 4, 1, 2, 3), frames, height, width)
        errors = ((decoded - batch) / 2).square().flatten(1).mean(1)
        found.append(-10 * errors.log10())
    return torch.cat(found).mean().item()


class Learner:
    """A transformer and the eight samples that it shall learn by heart."""

    def __init__(self, hq: Tensor, lq: Tensor, shapes: list, captions: list[str]) -> None:
        torch.manual_seed(0)
        self.hq, self.lq, self.shapes = hq, lq, shapes
        encoders = TextEncoders(TINY_ENCODERS, "cpu")
        null, *embeddings = encoders.encode(["", *captions])
        joined = [join(embedding, null, False, False, False) for embedding in embeddings]
        self.texts, self.pooled = [tokens for tokens, _ in joined], torch.stack([p for _, p in joined])
        self.model = SwinMMDiT(TINY)

    def velocity(self, video: Tensor, time: Tensor, copies: int) -> Tensor:
        lengths = [len(tokens) for tokens in self.texts] * copies
        texts = torch.cat(self.texts * copies)
        return self.model(video, texts, self.shapes * copies, lengths, time, self.pooled.repeat(copies, 1))

    def loss(self, generator: torch.Generator) -> Tensor:
        hq, lq = self.hq.repeat(COPIES, 1), self.lq.repeat(COPIES, 1)
        draws = flow.draw_training(lq, self.shapes * COPIES, generator)
        times = flow.spread(draws.time, [t * h * w for t, h, w in self.shapes * COPIES])
        video = flow.network_input(flow.interpolate(hq, draws.noise, times), draws.condition)
        velocity = self.velocity(video, draws.time, COPIES)
        return (velocity - flow.velocity(hq, draws.noise)).square().mean()

    @torch.no_grad()
    def mean_loss(self) -> float:
        """On fixed times and noises that training does not draw."""
        generator = torch.Generator().manual_seed(999)
        return sum(self.loss(generator).item() for _ in range(8)) / 8

    def train(self) -> None:
        adam = torch.optim.AdamW(self.model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, STEPS, pct_start=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            adam.zero_grad()
            self.loss(generator).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            adam.step()
            schedule.step()

    @torch.no_grad()
    def sampled(self, steps: int) -> Tensor:
        """(latent pixels, 16) from noise, as restore samples: the condition noised, no guidance."""
        generator = torch.Generator().manual_seed(2)
        noise, lq_noise = (torch.randn(self.hq.shape, generator=generator) for _ in range(2))
        levels = [flow.condition_time(flow.INFERENCE_CONDITION_LEVEL, shape, False) for shape in self.shapes]
        rows = [t * h * w for t, h, w in self.shapes]
        condition = flow.interpolate(self.lq, lq_noise, flow.spread(torch.tensor(levels), rows))

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.velocity(flow.network_input(x, condition), time.expand(len(self.shapes)), 1)

        return flow.sample(velocity, noise, flow.sampling_times(steps))


@pytest.mark.slow
def test_a_tiny_model_learns_eight_samples_by_heart_and_gives_them_back():
    torch.set_num_threads(1)
    clips = clips_of(VIDEOS, FRAMES), clips_of(IMAGES, 1)
    vae = wavelet_vae(clips)
    with torch.no_grad():
        hq, lq = (packed_latents(vae, batches) for batches in (clips, tuple(map(degraded, clips))))
    ceiling, floor = (mean_psnr(vae, latents, clips) for latents in (hq, lq))
    assert floor < ceiling - 2, "the degraded clips are as good as the clips: nothing to learn"
    shapes = [
        vae.config.latent_shape(frames, SIDE, SIDE) for frames in (FRAMES,) * len(VIDEOS) + (1,) * len(IMAGES)
    ]
    learner = Learner(hq, lq, shapes, [name.split(".")[0] for name in (*VIDEOS, *IMAGES)])
    before = learner.mean_loss()
    learner.train()
    after, reached = learner.mean_loss(), mean_psnr(vae, learner.sampled(steps=20), clips)
    print(f"loss {before:.3f} -> {after:.3f}; PSNR {floor:.2f} (LQ), {reached:.2f}, {ceiling:.2f} (VAE)")
    assert after < before / 10
    assert reached >= ceiling - 1
