"""Losses of the autoencoder's training; all take videos (B, 3, T, H, W) in [-1, 1] or posterior moments."""

from torch import Tensor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) divergence of each posterior from the standard normal, summed over its latent (nats)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
