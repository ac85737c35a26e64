"""LPIPS (Zhang et al. 2018), version 0.1 on VGG16: how different two pictures look, as a loss.

VGG16's features at five depths, each unit length across channels; their squared differences weighted by
learned heads, averaged over the picture and summed over depths. Equal to `lpips.LPIPS(net="vgg")`, whose
published files `model.checkpoints.build_lpips` loads.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

VGG16_WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five levels; a pooling halves the picture between two of them."""
_CONVOLUTIONS = (2, 2, 3, 3, 3)
# The published scaling of [-1, 1] pixels: ImageNet's means and deviations for those.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def vgg16_features(
    widths: tuple[int, ...], pooling: Callable[[], nn.Module]
) -> tuple[nn.Sequential, list[int]]:
    """VGG16's convolutions, named as torchvision's `features`, and the layers whose outputs are compared.

    Those layers are the last ReLU of each level.
    """
    layers: list[nn.Module] = []
    taps: list[int] = []
    previous = 3
    for level, (width, count) in enumerate(zip(widths, _CONVOLUTIONS, strict=True)):
        if level:
            layers.append(pooling())
        for _ in range(count):
            layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
            previous = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), taps


class Lpips(nn.Module):
    """The distance of two batches of pictures; frozen, gradients pass through to the first argument."""

    def __init__(self, widths: tuple[int, ...] = VGG16_WIDTHS) -> None:
        super().__init__()
        self.features, self._taps = vgg16_features(widths, lambda: nn.MaxPool2d(2))
        self.heads = nn.ParameterList([nn.Parameter(torch.ones(width)) for width in widths])
        self.requires_grad_(False)

    def forward(self, picture: Tensor, truth: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] each, sides of at least 16 pixels -> (N,) distances in fp32."""
        with torch.no_grad():
            true_features = self._unit_features(truth)
        distance = torch.zeros(len(picture), device=picture.device)
        for head, features, true in zip(self.heads, self._unit_features(picture), true_features, strict=True):
            weighted = (features - true).square() * head.float()[:, None, None]
            distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _unit_features(self, picture: Tensor) -> list[Tensor]:
        shift, scale = (picture.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = ((picture - shift) / scale).to(self.heads[0].dtype)
        features = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                # Inside the root: features that are all zero have a gradient (the reference's is NaN).
                length = (x.float().square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
                features.append(x.float() / length)
        return features


def video_lpips(network: Lpips, reconstruction: Tensor, video: Tensor) -> Tensor:
    """Mean distance over all frames of (B, 3, T, H, W) in [-1, 1]; gradients to the reconstruction."""
    frames = [rearrange(x, "b c t h w -> (b t) c h w") for x in (reconstruction, video)]
    return network(*frames).mean()
