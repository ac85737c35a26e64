"""DISTS (Ding et al. 2020, "Image Quality Assessment: Unifying Structure and Texture Similarity").

The picture and VGG16's features at five depths, with poolings that blur instead of taking maxima; of each
channel the means (texture) and the covariance (structure) are compared over the whole picture,
weighted by learned numbers. Equal to `DISTS_pytorch`'s network, whose file `weights.pt` (alpha, beta) and
torchvision's VGG16 `model.checkpoints.build_dists` loads. The picture is not resized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.perceptual.lpips import VGG16_WIDTHS, vgg16_features

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STABLE = 1e-6


class BlurPool(nn.Module):
    """Half the size: the root of the squares' mean under a 3x3 Hann window."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
        line = x.new_tensor([0.25, 0.5, 0.25])
        kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class Dists(nn.Module):
    """The distance of two batches of pictures: 0 if they are equal; frozen."""

    def __init__(self, widths: tuple[int, ...] = VGG16_WIDTHS) -> None:
        super().__init__()
        self.features, self._taps = vgg16_features(widths, BlurPool)
        channels = 3 + sum(widths)
        self.alpha, self.beta = (nn.Parameter(torch.ones(channels)) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, picture: Tensor, truth: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] each, sides of at least 16 pixels -> (N,) distances in fp32."""
        total = self.alpha.sum() + self.beta.sum()
        similarity, first = torch.zeros(len(picture), device=picture.device), 0
        for x, y in zip(self._levels(picture), self._levels(truth), strict=True):
            last = first + x.shape[1]
            alpha, beta = self.alpha[first:last] / total, self.beta[first:last] / total
            first = last
            mean_x, mean_y = x.mean(dim=(2, 3)), y.mean(dim=(2, 3))
            texture = (2 * mean_x * mean_y + _STABLE) / (mean_x.square() + mean_y.square() + _STABLE)
            variance_x, variance_y = x.var(dim=(2, 3), correction=0), y.var(dim=(2, 3), correction=0)
            covariance = (x * y).mean(dim=(2, 3)) - mean_x * mean_y
            structure = (2 * covariance + _STABLE) / (variance_x + variance_y + _STABLE)
            similarity = similarity + (alpha * texture + beta * structure).sum(dim=1)
        return 1 - similarity

    def _levels(self, picture: Tensor) -> list[Tensor]:
        """The picture itself and its features at each depth."""
        mean, std = (picture.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        levels, x = [picture], (picture - mean) / std
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                levels.append(x)
        return levels
