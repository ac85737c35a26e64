"""The discriminator: patches, any length, no statistics over the batch, and it learns."""

import math

import pytest
import torch

from model.vae import loss_terms
from model.vae.discriminator import PAPER_CONFIG, DiscriminatorConfig, VideoDiscriminator

SMALL = DiscriminatorConfig(width=8, layers=3, norm_groups=4)


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 17])
def test_judges_patches_of_clips_and_images(frames):
    logits = VideoDiscriminator(SMALL)(torch.randn(2, 3, frames, 32, 48))
    assert logits.shape[:2] == (2, 1)
    assert logits.shape[2] == math.ceil(frames / 4)  # the first layer keeps time
    assert logits.shape[3:] == (4, 6)


def test_a_clip_is_judged_alike_in_any_batch():
    torch.manual_seed(0)
    discriminator, videos = VideoDiscriminator(SMALL), torch.randn(3, 3, 5, 32, 32)
    together = discriminator(videos)
    assert torch.allclose(together[1:2], discriminator(videos[1:2]), atol=1e-5)
    assert not list(discriminator.buffers())


def test_learns_to_tell_sharp_from_blurred():
    torch.manual_seed(0)
    discriminator = VideoDiscriminator(SMALL)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for _ in range(25):
        real = torch.randn(2, 3, 2, 16, 16)
        fake = torch.nn.functional.avg_pool3d(real, (1, 3, 3), stride=1, padding=(0, 1, 1))
        loss = loss_terms.discriminator_hinge(discriminator(real), discriminator(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5  # 1 at the start


def test_shapes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="norm_groups"):
        DiscriminatorConfig(width=10, layers=3, norm_groups=4)
    assert PAPER_CONFIG.layers == 4
