"""A latent video of any length in overlapping chunks: cut, denoised one by one, blended into one sequence.

The transformer sees `length` latent frames at a time. Neighbouring chunks share `overlap` of them, get the
same noise there (it depends on the seed and the number of the latent frame, never on the chunk), and are
blended linearly in latent space. Memory never grows with the length of the video.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """How a latent sequence is cut: both in latent frames."""

    length: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.length:
            raise ValueError(
                f"an overlap of {self.overlap} latent frames needs chunks longer than {self.length}"
            )


@dataclass(frozen=True)
class Chunk:
    """Latent frames (t, H', W', C) from number `start` of the whole sequence on."""

    start: int
    latent: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.latent)


class ChunkCutter:
    """Cuts a sequence that arrives piece by piece into chunks.

    Every chunk of a long sequence has the full length: the last one reaches back instead of being
    short, so that the network sees as much context there as elsewhere.
    """

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan = plan
        self.end = 0  # latent frames that have arrived
        self.covered = 0  # of those, in some chunk
        self._held: Tensor | None = None  # the newest `length` at most

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, ready for safetensors."""
        held = {} if self._held is None else {"held": self._held}
        return {"end": torch.tensor(self.end), "covered": torch.tensor(self.covered), **held}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken."""
        self.end, self.covered, self._held = int(state["end"]), int(state["covered"]), state.get("held")

    def push(self, piece: Tensor) -> list[Chunk]:
        """The chunks that are completed by (t, H', W', C) further latent frames."""
        chunks = []
        for frame in piece.split(1):
            self.end += 1
            held = frame if self._held is None else torch.cat([self._held, frame])
            self._held = held[-self.plan.length :]
            due = self.covered - self.plan.overlap if self.covered else 0
            due += self.plan.length
            if self.end == due:
                chunks.append(self._newest())
        return chunks

    def finish(self) -> list[Chunk]:
        """The last chunk, if there are frames that no chunk holds yet."""
        return [self._newest()] if self.end > self.covered else []

    def _newest(self) -> Chunk:
        assert self._held is not None
        self.covered = self.end
        return Chunk(self.end - len(self._held), self._held)


class ChunkBlender:
    """Joins processed chunks, fading linearly from the earlier to the later one in each overlap."""

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan = plan
        self.done = 0  # latent frames that have been given out
        self._tail: Tensor | None = None  # frames from `done` on, of the chunk before

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, ready for safetensors."""
        tail = {} if self._tail is None else {"tail": self._tail}
        return {"done": torch.tensor(self.done), **tail}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken."""
        self.done, self._tail = int(state["done"]), state.get("tail")

    def add(self, chunk: Chunk) -> Tensor:
        """Finished latent frames (t, H', W', C), t may be 0, in order, without gap or repetition."""
        latent = chunk.latent[self.done - chunk.start :]
        if self._tail is not None:
            shared = len(self._tail)
            weight = torch.arange(1, shared + 1, device=latent.device, dtype=latent.dtype) / (shared + 1)
            blended = torch.lerp(self._tail, latent[:shared], weight[:, None, None, None])
            latent = torch.cat([blended, latent[shared:]])
        ready = max(0, len(latent) - self.plan.overlap)
        self._tail = latent[ready:].clone()
        self.done += ready
        return latent[:ready]

    def finish(self) -> Tensor | None:
        """The frames of the last chunk that waited for a next one."""
        return self._tail
