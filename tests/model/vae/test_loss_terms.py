"""Losses by known values, gradients and what they push towards."""

import math

import pytest
import torch
from torch import nn

from model.vae import loss_terms


def test_kl_is_a_sum_over_the_latent_for_each_clip():
    mean = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 3, 2, 2, 2)
    log_variance = torch.tensor([0.0, math.log(4.0)]).view(2, 1, 1, 1, 1).expand(2, 3, 2, 2, 2)
    a_pixel = 0.5 * (4.0 + 4.0 - 1.0 - math.log(4.0))
    assert torch.allclose(loss_terms.kl_divergence(mean, log_variance), torch.tensor([0.0, 24 * a_pixel]))


def test_l1_is_a_mean_over_values():
    a, b = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    b[0, 0, 0, 0, 0] = -6.0
    assert loss_terms.l1(a, b).item() == pytest.approx(0.25)


def test_hinges_stop_at_the_margin():
    confident, wrong = torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -3.0])
    assert loss_terms.discriminator_hinge(confident, wrong).item() == 0
    assert loss_terms.discriminator_hinge(wrong, confident).item() == pytest.approx(0.5 * (3.0 + 4.0))
    assert loss_terms.generator_hinge(confident).item() == -3.0


def test_adaptive_weight_makes_both_gradients_equally_long():
    torch.manual_seed(0)
    decoder, judge, target = nn.Linear(4, 3), nn.Linear(3, 1), torch.randn(8, 3)
    output = decoder(torch.randn(8, 4))
    reconstruction, generator = (
        loss_terms.l1(output, target),
        0.01 * loss_terms.generator_hinge(judge(output)),
    )
    norms = loss_terms.gradient_norms(reconstruction, generator, decoder.weight)
    weight = loss_terms.adaptive_weight(norms)
    assert not weight.requires_grad
    weighted = torch.autograd.grad(weight * generator, decoder.weight, retain_graph=True)[0]
    # 1e-4 in the denominator keeps it finite, and is 3 % of this small gradient.
    assert weighted.norm().item() == pytest.approx(norms[0].item(), rel=0.05)
    (reconstruction + weight * generator).backward()  # the graph is still there
    assert decoder.weight.grad is not None


def test_adaptive_weight_is_clamped():
    assert loss_terms.adaptive_weight(torch.tensor([1e6, 0.0])).item() == loss_terms.MAX_ADAPTIVE_WEIGHT
