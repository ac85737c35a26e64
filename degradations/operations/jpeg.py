"""JPEG, frame by frame."""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np

from degradations.checks import check_probability, check_range, check_step
from degradations.draws import ClipDraws
from degradations.operations.protocol import Example


@dataclass(frozen=True)
class Jpeg:
    """JPEG compression (libjpeg-turbo through OpenCV, 4:2:0) at a quality from 1 to 100, and decoding."""

    quality: tuple[int, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        """The frame after encoding and decoding."""
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.quality[index]])
        assert done
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        assert decoded is not None
        return decoded

    def summary(self) -> str:
        """The first frame's quality."""
        return f"JPEG {self.quality[0]}"


@dataclass(frozen=True)
class JpegConfig:
    """JPEG compression of each frame."""

    operations: ClassVar = (Jpeg,)

    quality: tuple[int, int]
    """Lowest and highest JPEG quality to draw, each from 1 to 100."""
    probability: float = 1.0
    """Probability that a clip is compressed by this operation."""
    quality_step: float = 3.0
    """Largest change of the JPEG quality from one frame to the next, when values walk over time."""

    def __post_init__(self) -> None:
        check_probability("jpeg.probability", self.probability)
        check_range("jpeg.quality", self.quality, low=1, high=100)
        check_step("jpeg.quality_step", self.quality_step)

    def draw(self, clip: ClipDraws) -> list[Jpeg]:
        """One JPEG, or none."""
        if not clip.happens(self.probability):
            return []
        return [Jpeg(tuple(round(quality) for quality in clip.number(self.quality, self.quality_step)))]

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """Three qualities."""
        return [Example("JPEG", [(f"quality {quality}", [Jpeg((quality,))]) for quality in (95, 60, 30)])]
