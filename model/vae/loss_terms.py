"""Losses of the autoencoder's training; all take videos (B, 3, T, H, W) in [-1, 1] or posterior moments.

Reductions are named, since "KL 1e-6" is a sum in some codes and a mean in others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ADAPTIVE_WEIGHT = 1e4
"""Esser et al. 2021 and the open video codes clamp here."""


def l1(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Mean absolute difference over every value."""
    return (reconstruction - video).abs().mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) divergence of each posterior from the standard normal, summed over its latent (nats)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)


# -- adversarial ----------------------------------------------------------------------------------------


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean over patches of both hinges: real above 1, fake below -1 cost nothing. Feed it detached fakes."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """Mean over patches: the generator wants its logits high."""
    return -fake_logits.mean()


def gradient_norms(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """(2,) norms of both losses' gradients at the decoder's last weight; the graph stays for `backward`.

    Over several workers, average them with an all-reduce before `adaptive_weight`: each worker has its own
    batch, and the weight must be one number. Not through a DeepSpeed engine's forward, which cannot be
    differentiated twice.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
        for loss in (reconstruction_loss, generator_loss)
    ]
    return torch.stack([gradient.float().norm() for gradient in gradients]).detach()


def adaptive_weight(norms: Tensor) -> Tensor:
    """Weight of the generator loss that gives both gradients the same norm at the last layer.

    Esser et al. 2021, equation 7; takes the result of `gradient_norms`.
    """
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)
