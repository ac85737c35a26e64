"""Chunks of a latent sequence: nothing lost, equal context, equal noise, smooth blending."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.restoration.chunking import (
    Chunk,
    ChunkBlender,
    ChunkCutter,
    ChunkPlan,
)
from pipeline.weights.frame_noise import frame_noise


def numbered(frames: int) -> torch.Tensor:
    """(frames, 1, 1, 1): each latent frame is its own number."""
    return torch.arange(frames, dtype=torch.float32)[:, None, None, None]


def run(sequence: torch.Tensor, plan: ChunkPlan, pieces: int, process=lambda chunk: chunk.latent):
    cutter, blender, chunks = ChunkCutter(plan), ChunkBlender(plan), []
    out = []
    for piece in sequence.split(pieces):
        chunks += cutter.push(piece)
    chunks += cutter.finish()
    for chunk in chunks:
        out.append(blender.add(Chunk(chunk.start, process(chunk))))
    tail = blender.finish()
    assert tail is not None
    return chunks, torch.cat([*out, tail])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(2, 7), st.data())
def test_any_length_comes_out_whole_and_in_order(frames: int, length: int, data: st.DataObject):
    plan = ChunkPlan(length, data.draw(st.integers(0, length - 1)))
    chunks, joined = run(numbered(frames), plan, data.draw(st.integers(1, 5)))
    assert torch.allclose(joined, numbered(frames))
    assert all(len(chunk.latent) == min(length, frames) for chunk in chunks)
    assert all(torch.equal(chunk.latent, numbered(frames)[chunk.start : chunk.end]) for chunk in chunks)


def test_blending_goes_linearly_from_one_chunk_to_the_next():
    chunks, joined = run(
        numbered(9), ChunkPlan(6, 3), 9, lambda chunk: torch.full_like(chunk.latent, float(chunk.start))
    )
    assert [chunk.start for chunk in chunks] == [0, 3]
    assert joined.flatten().tolist() == pytest.approx([0, 0, 0, 0.75, 1.5, 2.25, 3, 3, 3])


def test_noise_belongs_to_the_frame_not_to_the_chunk():
    first = frame_noise(7, "initial", 0, (6, 2, 4, 16))
    second = frame_noise(7, "initial", 4, (6, 2, 4, 16))
    assert torch.equal(first[4:], second[:2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, frame_noise(7, "condition", 0, (6, 2, 4, 16)))
    assert not torch.equal(first, frame_noise(8, "initial", 0, (6, 2, 4, 16)))
    assert abs(frame_noise(7, "initial", 0, (8, 32, 32, 16)).std().item() - 1) < 0.01


def test_overlap_must_be_shorter_than_the_chunk():
    with pytest.raises(ValueError, match="overlap of 4"):
        ChunkPlan(4, 4)
