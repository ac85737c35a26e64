"""FAST-VQA: the quality of a video from fragments of its raw pixels (Wu et al., 2022; weights and code MIT).

Published files (VQAssessment/FAST-VQA-and-FasterVQA, release v2.0.0): `FAST_VQA_B_1_4.pth` for `PUBLISHED`,
`FAST_VQA_3D_1_1.pth` for `PUBLISHED_FASTER`, `FAST_VQA_M_1_4.pth` for `PUBLISHED_M`. Higher is better; raw
scores are small and may be negative.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.quality import fragments
from model.quality.fragments import FragmentSize
from model.quality.video_swin import ScoreHead, VideoSwin, VideoSwinConfig

SWIN_TINY = VideoSwinConfig(
    embed_dim=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    window_size=(8, 7, 7),
    fragment_bias=(True, True, True, False),
    base_size=(32, 224, 224),
)
_SWIN_MINI = dataclasses.replace(SWIN_TINY, window_size=(4, 4, 4), fragment_bias=(False,) * 4)


@dataclass(frozen=True)
class FastVQAConfig:
    """The network's shape and its way of looking at a video."""

    backbone: VideoSwinConfig
    """Shape of the Video Swin backbone."""
    head_hidden: int
    """Hidden channels of the head that turns features into a score."""
    size: FragmentSize
    """Number and size of the fragments that are cut from each frame."""
    segments: int
    """Number of equal parts of the video from which frames are taken."""
    segment_frames: int
    """Number of frames taken from each part of the video."""
    interval: int
    """Distance between the frames taken from one part, in frames."""
    clips: int
    """Number of network inputs that the sampled frames make; their scores are averaged."""
    mean: float
    """Mean of the published model's raw scores, by which `rescale` centres a score."""
    std: float
    """Standard deviation of the published model's raw scores, by which `rescale` divides."""


PUBLISHED = FastVQAConfig(
    backbone=SWIN_TINY,
    head_hidden=64,
    size=FragmentSize((7, 7), (32, 32), aligned=32),
    segments=4,
    segment_frames=32,
    interval=2,
    clips=4,
    mean=-0.110198185,
    std=0.04178565,
)
"""FAST-VQA-B, for FAST_VQA_B_1_4.pth."""
PUBLISHED_FASTER = dataclasses.replace(
    PUBLISHED,
    size=FragmentSize((7, 7), (32, 32), aligned=8),
    segments=8,
    segment_frames=4,
    clips=1,
    mean=0.14759505,
    std=0.03613452,
)
"""FasterVQA, for FAST_VQA_3D_1_1.pth: a quarter of the cost."""
PUBLISHED_M = dataclasses.replace(
    PUBLISHED,
    backbone=_SWIN_MINI,
    size=FragmentSize((4, 4), (32, 32), aligned=8),
    segment_frames=16,
    mean=0.023889644,
    std=0.030781006,
)
"""FAST-VQA-M, for FAST_VQA_M_1_4.pth."""


class FastVQA(nn.Module):
    """Fragments to a map of scores."""

    def __init__(self, config: FastVQAConfig) -> None:
        super().__init__()
        self.config = config
        self.fragments_backbone = VideoSwin(config.backbone)
        self.vqa_head = ScoreHead(config.backbone.out_channels, config.head_hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised fragments (clips, 3, T, H, W) -> scores (clips, 1, T', H', W'), to be averaged."""
        return self.vqa_head(self.fragments_backbone(pixels))

    def look(self, frame: Tensor) -> Tensor:
        """Fragments (3, 1, h, w) of a uint8 (H, W, 3) RGB frame.

        They are cut from the middle of the cells, so that a clip has a single score. Raises ValueError if the
        frame is smaller than one patch.
        """
        return fragments.centre_fragments(frame, self.config.size)

    @torch.no_grad()
    def score(self, mosaic: Tensor) -> float:
        """Quality from 0 to 1 of the fragments (3, N, h, w) of the frames that `frame_numbers` names."""
        device = self.vqa_head.fc_last.weight.device
        raw = [self(clip[None].to(device)).mean() for clip in fragments.normalise(mosaic, self.config.clips)]
        return rescale(torch.stack(raw).mean().item(), self.config)

    def frame_numbers(self, total: int) -> list[int]:
        """Numbers of the frames, of `total`, that `score` takes, in order; short videos wrap round."""
        config = self.config
        return fragments.segment_frames(total, config.segment_frames, config.segments, config.interval)


def rescale(raw: float, config: FastVQAConfig) -> float:
    """The published scale from 0 to 1: the logistic of the standardised raw score."""
    return torch.sigmoid(torch.tensor((raw - config.mean) / config.std)).item()
