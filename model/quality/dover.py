"""DOVER: technical and aesthetic quality of a video by two networks (Wu et al., 2023).

Published files: `DOVER.pth` (`PUBLISHED`), `DOVER_plus_plus.pth` (the same shape), `DOVER-Mobile.pth`
(`PUBLISHED_MOBILE`). Their licence forbids commercial use (the repository's LICENSE since August 2024), so
nothing here downloads or holds them; this code is our own, written from the architecture's description.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quality import fragments
from model.quality.fast_vqa import SWIN_TINY
from model.quality.fragments import FragmentSize
from model.quality.video_swin import PATCH, ScoreHead, VideoSwin, VideoSwinConfig

_EPS = 1e-6
_FRAME_KERNELS = (1, 3, 1)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """ConvNeXt with some of its 7x7 convolutions inflated to three frames."""

    dims: tuple[int, ...]
    """Channels of each of the network's stages."""
    depths: tuple[int, ...]
    """Number of blocks in each of the network's stages."""
    version: int
    """ConvNeXt version: 1 has a learned scale for each block (`gamma`), 2 has global response
    normalisation."""
    classes: int
    """Outputs of the ImageNet head that the weights file carries along unused; 0 means that it has none."""


@dataclass(frozen=True)
class DoverConfig:
    """Both branches and what they look at."""

    technical: VideoSwinConfig | ConvNeXtConfig
    """Shape of the network that judges technical quality from fragments."""
    aesthetic: ConvNeXtConfig
    """Shape of the network that judges aesthetic quality from whole, shrunk frames."""
    head_hidden: int
    """Hidden channels of the two heads that turn features into scores."""
    size: FragmentSize
    """Number and size of the fragments that the technical branch sees."""
    technical_clips: int
    """Number of inputs of 32 frames, two frames apart, that the technical branch sees."""
    picture: tuple[int, int]
    """Height and width, in pixels, of the whole frames that the aesthetic branch sees."""


CLIP_FRAMES = 32
INTERVAL = 2
PUBLISHED = DoverConfig(
    technical=dataclasses.replace(SWIN_TINY, base_size=None),
    aesthetic=ConvNeXtConfig(dims=(96, 192, 384, 768), depths=(3, 3, 9, 3), version=1, classes=0),
    head_hidden=64,
    size=FragmentSize((7, 7), (32, 32), aligned=32),
    technical_clips=3,
    picture=(224, 224),
)
_FEMTO = ConvNeXtConfig(dims=(48, 96, 192, 384), depths=(2, 2, 6, 2), version=2, classes=1000)
PUBLISHED_MOBILE = dataclasses.replace(PUBLISHED, technical=_FEMTO, aesthetic=_FEMTO, head_hidden=32)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2) of (B, T, H, W, C).

    The published network takes the norm over frames and rows, each column alone.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        response = x.norm(dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * response / (response.mean(dim=-1, keepdim=True) + _EPS)) + self.beta


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, frame_kernel: int, version: int) -> None:
        super().__init__()
        padding = (frame_kernel // 2, 3, 3)
        self.dwconv = nn.Conv3d(dim, dim, (frame_kernel, 7, 7), padding=padding, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = _ResponseNorm(4 * dim) if version == 2 else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim)) if version == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same."""
        h = F.gelu(self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1))))
        h = self.pwconv2(h if self.grn is None else self.grn(h))
        return x + (h if self.gamma is None else h * self.gamma).movedim(-1, 1)


class ConvNeXt3d(nn.Module):
    """Normalised pixels to a feature that keeps its places."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        dims = config.dims
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv3d(3, dims[0], PATCH, stride=PATCH), _ChannelNorm(dims[0], eps=_EPS))]
        )
        for before, after in itertools.pairwise(dims):
            halve = nn.Conv3d(before, after, (1, 2, 2), stride=(1, 2, 2))
            self.downsample_layers.append(nn.Sequential(_ChannelNorm(before, eps=_EPS), halve))
        self.stages = nn.ModuleList(
            nn.Sequential(*[_ConvNeXtBlock(dim, _FRAME_KERNELS[i % 3], config.version) for i in range(depth)])
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = _ChannelNorm(dims[-1], eps=_EPS)
        self.head = nn.Linear(dims[-1], config.classes) if config.classes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, T/2, H/32, W/32)."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x)


def _backbone(config: VideoSwinConfig | ConvNeXtConfig) -> tuple[nn.Module, int]:
    """The network and its channels."""
    if isinstance(config, VideoSwinConfig):
        return VideoSwin(config), config.out_channels
    return ConvNeXt3d(config), config.dims[-1]


class Dover(nn.Module):
    """Both branches; each gives a map of scores whose mean is its raw score."""

    def __init__(self, config: DoverConfig) -> None:
        super().__init__()
        self.config = config
        self.technical_backbone, technical = _backbone(config.technical)
        self.aesthetic_backbone, aesthetic = _backbone(config.aesthetic)
        self.technical_head = ScoreHead(technical, config.head_hidden)
        self.aesthetic_head = ScoreHead(aesthetic, config.head_hidden)

    def technical(self, pixels: Tensor) -> Tensor:
        """Normalised fragments (clips, 3, T, H, W) -> scores (clips, 1, T', H', W')."""
        return self.technical_head(self.technical_backbone(pixels))

    def aesthetic(self, pixels: Tensor) -> Tensor:
        """Normalised whole frames (1, 3, T, H, W) -> scores (1, 1, T', H', W')."""
        return self.aesthetic_head(self.aesthetic_backbone(pixels))

    def frame_numbers(self, total: int) -> tuple[list[int], list[int]]:
        """Frames for the technical and for the aesthetic branch of a video of so many; short ones wrap.

        Below 32 frames the aesthetic branch sees the first frame only (as published).
        """
        technical = fragments.segment_frames(total, CLIP_FRAMES, self.config.technical_clips, INTERVAL)
        return technical, fragments.segment_frames(total, 1, CLIP_FRAMES, INTERVAL)

    def look(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """What each branch sees of a uint8 (H, W, 3) RGB frame: fragments and the whole, (3, 1, h, w)."""
        whole = fragments.resize_frames(frame.permute(2, 0, 1)[:, None], *self.config.picture)
        return fragments.centre_fragments(frame, self.config.size), whole

    @torch.no_grad()
    def score(self, technical: Tensor, aesthetic: Tensor) -> dict[str, float]:
        """`fuse` of what `look` gave of the frames that `frame_numbers` names: (3, N, h, w) each."""
        device = self.technical_head.fc_last.weight.device
        clips = fragments.normalise(technical, self.config.technical_clips)
        raw_technical = torch.stack([self.technical(clip[None].to(device)).mean() for clip in clips]).mean()
        raw_aesthetic = self.aesthetic(fragments.normalise(aesthetic, 1).to(device)).mean()
        return fuse(raw_technical.item(), raw_aesthetic.item())


def fuse(technical: float, aesthetic: float) -> dict[str, float]:
    """technical, aesthetic and overall quality from 0 to 1, of raw scores.

    The constants are those of DOVER.pth, and none are published for the other files. Tables that say "DOVER"
    show `overall`, or 100 times `technical`.
    """
    z_technical, z_aesthetic = (technical - 0.1107) / 0.07355, (aesthetic + 0.08285) / 0.03774
    values = torch.tensor([z_technical, z_aesthetic, 0.6104 * z_technical + 0.3896 * z_aesthetic])
    return dict(zip(("technical", "aesthetic", "overall"), torch.sigmoid(values).tolist(), strict=True))
