"""The fine-tuning stage for restoring in one step: the estimate from pure noise, judged as pixels.

At time 1000 a network's velocity v gives the whole restored latent at once, noise - v. A model that was only
trained on all times makes a blurred or noisy picture of it; here a share of the samples is trained at
exactly that point, with the condition free of noise as SeedVR2 samples it, the others as before, so that
many steps still work. The paper has no such stage: it is ours, after one-step models such as SeedVR2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flow import MAX_TIME
from model.vae.autoencoder import CausalVideoAutoencoder
from pipeline.store import schema
from pipeline.store.urls import Url, check_urls
from pipeline.training.samples.batch import Batch
from pipeline.weights import weights_folder


@dataclass(frozen=True)
class OneStepConfig:
    """A share of a stage's samples is trained to be right in one step."""

    share: float = 0.5
    """of the samples; the others keep the usual times and noises"""
    vae: Url | None = None
    """URL of the autoencoder that made the latents: adds the mean absolute error of the decoded estimate
    (null: the latent's squared error alone)"""
    pixel_weight: float = 1.0
    """of that error, on pixels from -1 to 1; it goes with vae"""

    def __post_init__(self) -> None:
        check_urls(self, "one_step.")
        if not 0 < self.share <= 1:
            raise ValueError(f"one_step.share: {self.share} is not within 0 to 1 (0: leave one_step out)")


class PixelLoss:
    """Mean absolute error between the decoded one-step estimate and the decoded truth."""

    def __init__(self, config: OneStepConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert config.vae is not None
        self._vae = weights_folder.load_vae(config.vae).to(device, dtype).eval().requires_grad_(False)
        self._weight = config.pixel_weight

    def __call__(self, batch: Batch, velocity: Tensor) -> Tensor:
        """(B,) in fp32, weighted; 0 for samples at any time but 1000. velocity: (rows, 16)."""
        parts = zip(
            (batch.noise - velocity.float()).split(batch.rows),
            batch.data.split(batch.rows),
            batch.video_shapes,
            batch.timestep.tolist(),
            strict=True,
        )
        losses = [
            self._error(estimate, truth, shape) if time == MAX_TIME else estimate.new_zeros(())
            for estimate, truth, shape, time in parts
        ]
        return self._weight * torch.stack(losses)

    def _error(self, estimate: Tensor, truth: Tensor, shape: tuple[int, int, int]) -> Tensor:
        with torch.no_grad():
            wanted = decoded(self._vae, truth, shape)
        return F.l1_loss(decoded(self._vae, estimate, shape).float(), wanted.float())


def decoded(vae: CausalVideoAutoencoder, rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(rows, 16) of one sample of latent (T, H, W) -> its pixels, (1, 3, frames, height, width)."""
    frames, height, width = shape
    latent = rows.unflatten(0, shape).permute(3, 0, 1, 2)[None]
    dtype = next(vae.parameters()).dtype
    pixels = ((frames - 1) * schema.TEMPORAL_FACTOR + 1, height * schema.SPATIAL_FACTOR)
    return vae.decode(latent.to(dtype), *pixels, width * schema.SPATIAL_FACTOR)
