"""The discriminator of the autoencoder's training: a PatchGAN in space and time.

Isola et al. 2017 in three dimensions, with GroupNorm in place of BatchNorm, whose statistics are too noisy
with 5 clips per GPU. Every output judges one patch of the video.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The shape of a discriminator."""

    width: int
    """Channels of the first layer; each further layer doubles them, up to 8 times as many."""
    layers: int
    """Number of layers that halve height and width; all but the first also halve time."""
    norm_groups: int
    """Number of groups in every GroupNorm; it must divide the width."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers {self.layers} must be at least 1")
        if self.width % self.norm_groups:
            raise ValueError(f"width {self.width} is not a multiple of norm_groups {self.norm_groups}")


PAPER_CONFIG = DiscriminatorConfig(width=64, layers=4, norm_groups=32)
"""As in the training code of WFVAE and CV-VAE; the SeedVR paper does not say."""


class VideoDiscriminator(nn.Module):
    """Logits of "real" for patches of a video."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [3] + [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i in range(config.layers + 1):
            space = 2 if i < config.layers else 1
            time = 2 if 0 < i < config.layers else 1
            side = 4 if space == 2 else 3  # halves exactly; 3 in time, where one frame must stay one
            stride = (time, space, space)
            conv = nn.Conv3d(widths[i], widths[i + 1], (3, side, side), stride, padding=1, bias=i == 0)
            self.convolutions.append(conv)
            self.norms.append(nn.Identity() if i == 0 else nn.GroupNorm(config.norm_groups, widths[i + 1]))
        self.head = nn.Conv3d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, 1, T', H', W') logits; any T >= 1."""
        x = video
        for conv, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)
