"""What an operation is, what draws one, and how the gallery shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from degradations.draws import ClipDraws


@runtime_checkable
class FrameOperation(Protocol):
    """A frozen dataclass of drawn values that works frame by frame; a tuple holds one value per frame."""

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        """Frame number `index`, (H, W, 3) uint8 RGB, degraded."""
        ...

    def summary(self) -> str:
        """The first frame's values in a few words, for captions."""
        ...


@runtime_checkable
class ClipOperation(Protocol):
    """A frozen dataclass of drawn values that works on the whole clip."""

    def apply_clip(self, frames: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Any]]:
        """As many frames, (H, W, 3) uint8 RGB, and what was measured on the way, as JSON."""
        ...

    def summary(self) -> str:
        """The values in a few words, for captions."""
        ...


Operation = FrameOperation | ClipOperation


@dataclass(frozen=True)
class Example:
    """A row of the gallery: an operation at three strengths, each a caption and a chain of operations."""

    title: str
    chains: Sequence[tuple[str, Sequence[Operation]]]


class OperationConfig(Protocol):
    """What a recipe may draw of one kind of operation: a field of `config.OrderConfig`."""

    operations: ClassVar[tuple[type, ...]]
    """What `draw` may give; their class names are their names in JSON."""

    def draw(self, clip: ClipDraws) -> list[Any]:
        """The operations that happen to the clip here; where they change its size, `clip.sizes` is set."""
        ...

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """The gallery's rows, on a clip (T, H, W, 3)."""
        ...
