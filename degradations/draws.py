"""Drawing the values of one clip, frame by frame, in the time mode of its recipe."""

import random
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from degradations.checks import Range

TimeMode = Literal["walk", "constant", "independent"]
K = TypeVar("K")

MIN_SIDE_PX = 4
"""Smallest side after a resize; with Real-ESRGAN's factors a frame of 16x16 would end at 1x1."""


class ClipDraws:
    """The random numbers of one clip, and the clip as it is at this point of the chain.

    Python's own generator: a clip is some 300 single numbers, which cost it a tenth of numpy's time.
    """

    def __init__(self, time: str, shape: tuple[int, int, int], fps: float, seed: int, shrink: int) -> None:
        self.time, self.num_frames, self.fps = time, shape[0], fps
        self.random = random.Random(seed)
        height, width = shape[1:]
        self.sizes = [(height, width)] * self.num_frames
        """(H, W) of each frame so far; whatever changes it says so here"""
        self.final_size = (max(MIN_SIDE_PX, height // shrink), max(MIN_SIDE_PX, width // shrink))
        """(H, W) of LQ before it is brought back to the size of HQ"""

    def number(self, bounds: Range, step: float, start: Range | None = None) -> tuple[float, ...]:
        """A value of each frame, within `bounds`; the first (and any independent one) within `start`.

        Rounded to 5 decimals, so that a row's JSON stays small.
        """
        low, high = bounds
        start = start or bounds
        value = self.random.uniform(*start)
        values = [value]
        for _ in range(self.num_frames - 1):
            if self.time == "independent":
                value = self.random.uniform(*start)
            elif self.time == "walk":
                value = min(max(value + self.random.uniform(-step, step), low), high)
            values.append(value)
        return tuple(min(max(round(value, 5), low), high) for value in values)

    def choice(self, probabilities: Mapping[K, float]) -> tuple[K, ...]:
        """A kind for each frame; the same for all unless frames are independent."""
        count = self.num_frames if self.time == "independent" else 1
        return tuple(self.drawn(probabilities) for _ in range(count)) * (self.num_frames // count)

    def drawn(self, probabilities: Mapping[K, float]) -> K:
        """Draw one of the kinds, whatever the order in which they are listed: a file may sort them."""
        kinds = sorted(probabilities, key=str)
        return self.random.choices(kinds, [probabilities[kind] for kind in kinds])[0]

    def by_kind(self, kinds: tuple[K, ...], number: Callable[[K], tuple[float, ...]]) -> tuple[float, ...]:
        """Values whose range depends on the frame's kind: one series per kind, read at its own frames."""
        series = {kind: number(kind) for kind in dict.fromkeys(kinds)}
        return tuple(series[kind][index] for index, kind in enumerate(kinds))

    def happens(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def seed(self) -> int:
        """The seed of an operation's own noise."""
        return self.random.getrandbits(53)  # whole in any JSON reader
