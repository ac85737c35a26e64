"""The objective of the autoencoder's training, and one step of its two DeepSpeed engines.

The autoencoder minimises L1 + LPIPS + KL and a discriminator's hinge loss, whose weight gives its gradient at
the decoder's last layer the same norm as that of the other terms (Esser et al. 2021, equation 7). Every term
is a mean over the crops of all workers, however they are spread over workers and lengths.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.perceptual.lpips import Lpips, video_lpips
from model.vae import loss_terms
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from model.vae.discriminator import DiscriminatorConfig
from pipeline.training.state import ranks


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator, when it starts and how much it counts."""

    discriminator: DiscriminatorConfig
    """Shape of the discriminator."""
    weight: float
    """Factor on the adaptive weight of the adversarial loss; 1 gives the discriminator's gradient the same
    norm as the reconstruction's."""
    learning_rate: float
    """Learning rate of the discriminator, which has its own warm-up of `optimiser.warmup_steps`."""
    start_step: int
    """Step of the whole run, counted over all stages, at which the discriminator begins to train."""
    warmup_steps: int
    """Number of steps for which the discriminator trains before its loss counts; an untrained discriminator
    makes training diverge."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay rates of the first and second moments in the discriminator's AdamW (Esser et al. 2021); it is
    clipped like the autoencoder and has no weight decay."""

    def trains(self, step: int) -> bool:
        """Whether the discriminator is trained in this step of the run."""
        return step >= self.start_step

    def counts(self, step: int) -> bool:
        """Whether its loss is part of the autoencoder's in this step of the run."""
        return step >= self.start_step + self.warmup_steps


# -- the autoencoder's pass -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LengthGroup:
    """The crops of one length among a rank's batch."""

    video: Tensor
    """(B, 3, T, H, W) fp32 in [-1, 1]"""
    noise: Tensor
    """(B, 16, T', H', W') fp32, for the posterior's sample"""
    share: float
    """The number of crops in `video` divided by that of the rank's batch."""


def latent_noise(config: AutoencoderConfig, video: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape of the video's latent."""
    batch, _, frames, height, width = video.shape
    shape = (batch, config.latent_channels, *config.latent_shape(frames, height, width))
    return torch.randn(shape, generator=generator).to(video)


class AutoencoderPass(nn.Module):
    """Encode, sample the posterior with the given noise, decode: the reconstruction and both moments."""

    def __init__(self, vae: CausalVideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.vae.encode(video)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return {"video": self.vae.decode_unscaled(z), "mean": mean, "log_variance": log_variance}


def reconstruction_terms(
    output: Mapping[str, Tensor], video: Tensor, perceptual: Lpips | None
) -> dict[str, Tensor]:
    """Means over the crops of one length. The KL is a sum over a crop's latent, divided by its pixels."""
    mean, log_variance = output["mean"].float(), output["log_variance"].float()
    terms = {
        "l1": loss_terms.l1(output["video"], video),
        "kl": loss_terms.kl_divergence(mean, log_variance).sum() / video.numel(),
        "latent_variance": (mean.square() + log_variance.exp()).mean().detach(),  # about zero
    }
    if perceptual is not None:
        terms["perceptual"] = video_lpips(perceptual, output["video"], video)
    return terms


def over_groups(groups: Sequence[LengthGroup], terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each term's mean over all crops of this rank."""
    return {
        name: torch.stack([group.share * own[name] for group, own in zip(groups, terms, strict=True)]).sum()
        for name in terms[0]
    }


# -- both engines ---------------------------------------------------------------------------------------


class Objective:
    """One step moves both engines once: the autoencoder's, then the discriminator's.

    In the autoencoder's step nothing goes through an engine's forward: it could not be differentiated
    twice, and the discriminator's own would take gradients that are not its (ZeRO-2 stops there, ZeRO-1
    goes on with wrong ones). So both networks are called as plain modules, the discriminator's frozen.
    """

    def __init__(
        self,
        autoencoder: Any,
        perceptual: Lpips | None,
        discriminator: Any | None,
        kl_weight: float,
        perceptual_weight: float,
        adversarial: AdversarialConfig | None,
    ) -> None:
        assert (discriminator is None) == (adversarial is None)
        self.autoencoder, self.perceptual, self.discriminator = autoencoder, perceptual, discriminator
        self.kl_weight, self.perceptual_weight, self.adversarial = kl_weight, perceptual_weight, adversarial
        self.dtype = next(autoencoder.module.parameters()).dtype

    def step(self, number: int, groups: Sequence[LengthGroup]) -> dict[str, float]:
        """Step `number` of the run (from 0) on this rank's crops; the terms' means over all ranks.

        Where a term is not finite, the engine's gradients are not either, so that its `StepGuard` skips.
        """
        adversarial = self.adversarial
        outputs = [
            self.autoencoder.module(group.video.to(self.dtype), group.noise.to(self.dtype))
            for group in groups
        ]
        terms = self._autoencoder_step(number, groups, outputs)
        if adversarial is not None:
            if adversarial.trains(number):
                fakes = [output["video"].detach() for output in outputs]
                terms |= self._discriminator_step(groups, fakes)
            terms["gan"] = float(adversarial.counts(number))
        return terms

    def _autoencoder_step(
        self, number: int, groups: Sequence[LengthGroup], outputs: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, float]:
        each = [
            reconstruction_terms(output, group.video, self.perceptual)
            for group, output in zip(groups, outputs, strict=True)
        ]
        terms = over_groups(groups, each)
        reconstruction = terms["l1"]
        if self.perceptual is not None:
            reconstruction = reconstruction + self.perceptual_weight * terms["perceptual"]
        loss = terms["loss"] = reconstruction + self.kl_weight * terms["kl"]
        if self.adversarial is not None and self.adversarial.counts(number):
            terms["generator"] = self._generator_loss(groups, outputs)
            layer = self.autoencoder.module.vae.decoder.last_layer
            norms = loss_terms.gradient_norms(reconstruction, terms["generator"], layer)
            norms = ranks.all_reduced(norms) / ranks.world_size()
            terms["adaptive_weight"] = self.adversarial.weight * loss_terms.adaptive_weight(norms)
            loss = loss + terms["adaptive_weight"] * terms["generator"]
        return self._finish(self.autoencoder, loss, terms)

    def _generator_loss(
        self, groups: Sequence[LengthGroup], outputs: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        assert self.discriminator is not None
        judge = self.discriminator.module.requires_grad_(False)
        each = [
            {"generator": loss_terms.generator_hinge(judge(output["video"]).float())} for output in outputs
        ]
        judge.requires_grad_(True)  # the graph just built keeps it frozen
        return over_groups(groups, each)["generator"]

    def _discriminator_step(self, groups: Sequence[LengthGroup], fakes: Sequence[Tensor]) -> dict[str, float]:
        assert self.discriminator is not None and self.adversarial is not None
        each = []
        for group, fake in zip(groups, fakes, strict=True):
            both = torch.cat([group.video.to(fake.dtype), fake])
            real_logits, fake_logits = self.discriminator.module(both).float().chunk(2)
            each.append(
                {
                    "discriminator": loss_terms.discriminator_hinge(real_logits, fake_logits),
                    "generator": loss_terms.generator_hinge(fake_logits).detach(),
                }
            )
        terms = over_groups(groups, each)
        return self._finish(self.discriminator, terms["discriminator"], terms)

    def _finish(self, engine: Any, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        """One backward and one optimiser step; the terms over all ranks."""
        own = torch.stack([term.detach().float() for term in terms.values()])
        means = dict(zip(terms, (ranks.all_reduced(own) / ranks.world_size()).tolist(), strict=True))
        # An infinite term can have finite gradients (of L1: signs).
        finite = all(map(math.isfinite, means.values()))
        engine.backward(loss if finite else loss * math.nan)
        engine.step()
        return means
