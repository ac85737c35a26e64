"""Resizing by a drawn factor."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import cv2
import numpy as np

from degradations.checks import Range, check_distribution, check_probability, check_range, check_step
from degradations.draws import MIN_SIDE_PX, ClipDraws
from degradations.operations.protocol import Example

Interpolation = Literal["area", "bilinear", "bicubic"]

_INTERPOLATIONS = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True)
class Resize:
    """`cv2.resize` to a size, with INTER_AREA, INTER_LINEAR or INTER_CUBIC."""

    interpolation: tuple[Interpolation, ...]
    height_px: tuple[int, ...]
    width_px: tuple[int, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        """The frame at its size."""
        height, width = self.height_px[index], self.width_px[index]
        if frame.shape[:2] == (height, width):
            return frame
        return cv2.resize(frame, (width, height), interpolation=_INTERPOLATIONS[self.interpolation[index]])

    def summary(self) -> str:
        """The first frame's size and interpolation."""
        return f"{self.width_px[0]}x{self.height_px[0]} {self.interpolation[0]}"


def resize_all(interpolation: tuple[Interpolation, ...], size: tuple[int, int]) -> Resize:
    """Every frame to one size (H, W)."""
    count = len(interpolation)
    return Resize(interpolation, (size[0],) * count, (size[1],) * count)


def even_interpolations() -> dict[str, float]:
    """Each as probable."""
    return {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}


@dataclass(frozen=True)
class ResizeConfig:
    """Resizing by a randomly drawn factor."""

    operations: ClassVar = (Resize,)

    factor: Range
    """Smallest and largest resize factor: enlarging draws from [1, largest], shrinking from [smallest, 1]."""
    up: float
    """Probability that a clip is enlarged."""
    down: float
    """Probability that a clip is shrunk; what `up` and `down` leave of 1 is the probability that it keeps its
    size."""
    step: float
    """Largest change of the resize factor from one frame to the next, when values walk over time."""
    even: bool = True
    """Whether both sides are rounded down to even numbers of pixels."""
    of_quarter: bool = False
    """Whether the factor applies to the size at the end of the recipe (HQ divided by `end.shrink`, as in
    Real-ESRGAN) rather than to the frame's present size."""
    interpolations: dict[str, float] = field(default_factory=even_interpolations)
    """Probability of each interpolation (area, bilinear, bicubic); the values sum to 1."""

    def __post_init__(self) -> None:
        check_range("resize.factor", self.factor, low=1e-3, high=16)
        check_step("resize.step", self.step)
        check_probability("resize.up", self.up)
        check_probability("resize.down", self.down)
        check_probability("resize.up + resize.down", self.up + self.down)
        check_distribution("resize.interpolations", self.interpolations, tuple(even_interpolations()))

    def draw(self, clip: ClipDraws) -> list[Resize]:
        """One resize.

        Frames of different sizes (after an earlier walk) are resized by the first one's size, as in MMagic.
        """
        low, high = self.factor
        keep = max(0.0, 1.0 - self.up - self.down)
        direction = clip.choice({"up": self.up, "down": self.down, "keep": keep})
        bounds = (min(low, 1.0), max(high, 1.0))
        starts: dict[str, Range] = {"up": (1.0, bounds[1]), "down": (bounds[0], 1.0), "keep": (1.0, 1.0)}
        factors = clip.by_kind(direction, lambda way: clip.number(bounds, self.step, starts[way]))
        height, width = clip.final_size if self.of_quarter else clip.sizes[0]
        resize = Resize(
            interpolation=clip.choice(self.interpolations),  # type: ignore[arg-type]
            height_px=tuple(self._side(height, factor) for factor in factors),
            width_px=tuple(self._side(width, factor) for factor in factors),
        )
        clip.sizes = list(zip(resize.height_px, resize.width_px, strict=True))
        return [resize]

    def _side(self, length: int, factor: float) -> int:
        scaled = int(length * factor)
        return max(MIN_SIDE_PX, scaled - scaled % 2 if self.even else scaled)

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """Each interpolation down to three sizes and back."""
        height, width = clip.shape[1:3]
        back = resize_all(("bicubic",), (height, width))

        def down(interpolation: Interpolation, factor: float) -> Resize:
            return resize_all((interpolation,), (int(height * factor), int(width * factor)))

        interpolations: tuple[Interpolation, ...] = ("area", "bilinear", "bicubic")
        return [
            Example(
                f"Resize, {name}",
                [(f"to {factor} and back", [down(name, factor), back]) for factor in (0.7, 0.4, 0.15)],
            )
            for name in interpolations
        ]
