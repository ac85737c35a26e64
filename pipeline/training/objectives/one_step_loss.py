"""Fine-tuning for restoration in one step: the estimate from pure noise, compared in pixels.

At time 1000 the network's velocity v gives the whole restored latent at once: noise - v. A model trained on
all times alone makes a blurred or noisy picture of it. Here a share of the samples is trained at exactly that
point, with a noise-free condition as SeedVR2 samples it, and the others as before, so that many steps still
work. The paper has no such stage; it is ours, modelled on one-step models such as SeedVR2.
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
    """Trains a share of a stage's samples to be right in one step."""

    share: float = 0.5
    """Share of a stage's samples, above 0 and up to 1, that are trained at the point from which one step
    restores; the others keep the usual times and noise."""
    vae: Url | None = None
    """URL of the autoencoder that made the latents, which adds the mean absolute error of the decoded
    estimate to the loss; null trains on the latent's squared error alone."""
    pixel_weight: float = 1.0
    """Weight of the decoded estimate's mean absolute error, on pixels from -1 to 1; it has no effect without
    `vae`."""

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
