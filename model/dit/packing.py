"""Packed sequences: samples of any length laid end to end, without padding (NaViT).

Rows of a packed tensor are the samples one after another; inside a sample T, then H, then W (W fastest).
The layers keep the patch tokens in *window order* instead: inside each sample, window after window. One
gather between two layers whose windows differ is all that windowing costs. The tables for it depend on
the shapes only: they are computed once per set of shapes, cached, and shared by all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from einops import rearrange
from torch import Tensor

from model.dit.windows import Grid, WindowRule, WindowSize

CACHED_PLANS = 8
"""Number of sets of shapes whose tables are cached: some 40 MB each for a pack of 150,000 tokens."""


@dataclass(frozen=True)
class LayerWindows:
    """Windows of one layer: size in patch tokens (or counts, as the rule reads it), regular or shifted."""

    rule: WindowRule
    window: WindowSize
    shifted: bool


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """The windows of one layer over one set of packed samples. N patch tokens in all."""

    to_windows: Tensor
    """(N,) long: row in packed order of each row in window order."""
    to_packed: Tensor
    """(N,) long: its inverse."""
    positions: Tensor
    """(N, 3) long: t, h, w of each row (window order) inside its window."""
    extents: Tensor
    """(N, 3) long: T, H, W of the window that each row (window order) lies in."""
    window_lengths: tuple[int, ...]
    """Tokens per window, window order: sample by sample, equal sizes adjacent."""
    windows_per_sample: tuple[int, ...]
    tokens_per_sample: tuple[int, ...]
    text_lengths: tuple[int, ...]
    """Text tokens per sample."""


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Layouts of all layers and how to go from one to the next."""

    layouts: tuple[WindowLayout, ...]
    """One per layer; layers with the same windows share one object."""
    reorder: tuple[Tensor | None, ...]
    """Per layer, (N,) long: gathers the rows from the previous layer's order (the first: from packed order);
    None where the order stays."""
    restore: Tensor
    """(N,) long: gathers the last layer's rows back into packed order."""
    sample_of_token: Tensor
    """(N,) long: sample of each patch token (in either order)."""
    sample_of_text: Tensor
    """(text tokens,) long: sample of each text token."""


def packing_plan(
    layers: tuple[LayerWindows, ...], grids: Sequence[Grid], text_lengths: Sequence[int], device: torch.device
) -> PackingPlan:
    """The cached plan of a model's layers for these samples.

    grids: patch-token grid (T, H, W) per sample; text_lengths: text tokens per sample (0 is allowed).
    """
    shapes = tuple((int(t), int(h), int(w)) for t, h, w in grids)
    return _packing_plan(layers, shapes, tuple(int(n) for n in text_lengths), torch.device(device))


@lru_cache(maxsize=CACHED_PLANS)
def _packing_plan(
    layers: tuple[LayerWindows, ...],
    grids: tuple[Grid, ...],
    text_lengths: tuple[int, ...],
    device: torch.device,
) -> PackingPlan:
    assert len(grids) == len(text_lengths), "one text length per video"
    # Cached tensors outlive the call; made under inference_mode, they could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        distinct = {layer: _window_layout(layer, grids, text_lengths, device) for layer in set(layers)}
        layouts = tuple(distinct[layer] for layer in layers)
        steps = {
            (a, b): None if a is b else a.to_packed[b.to_windows] for a, b in set(pairwise(layouts))
        }  # as few as there are kinds of neighbours, however many layers
        reorder = (layouts[0].to_windows, *(steps[pair] for pair in pairwise(layouts)))
        samples = torch.arange(len(grids))
        tokens = torch.tensor([t * h * w for t, h, w in grids])
        return PackingPlan(
            layouts=layouts,
            reorder=reorder,
            restore=layouts[-1].to_packed,
            sample_of_token=samples.repeat_interleave(tokens).to(device),
            sample_of_text=samples.repeat_interleave(torch.tensor(text_lengths)).to(device),
        )


def _window_layout(
    layer: LayerWindows, grids: tuple[Grid, ...], text_lengths: tuple[int, ...], device: torch.device
) -> WindowLayout:
    rows, positions, extents = [], [], []
    lengths: list[int] = []
    windows_per_sample: list[int] = []
    start = 0
    for grid in grids:
        tokens = start + torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid)
        start += tokens.numel()
        blocks = [tokens[window] for window in layer.rule(grid, layer.window, layer.shifted)]
        # Equal shapes side by side: the CPU back end runs a stretch of equal lengths as one batch.
        blocks.sort(key=lambda block: (block.numel(), tuple(block.shape)))
        windows_per_sample.append(len(blocks))
        lengths += [block.numel() for block in blocks]
        for block in blocks:
            axes = [torch.arange(n) for n in block.shape]
            rows.append(block.flatten())
            positions.append(torch.cartesian_prod(*axes))
            extents.append(torch.tensor(block.shape).expand(block.numel(), 3))
    to_windows = torch.cat(rows)
    return WindowLayout(
        to_windows=to_windows.to(device),
        to_packed=torch.argsort(to_windows).to(device),
        positions=torch.cat(positions).to(device),
        extents=torch.cat(extents).to(device),
        window_lengths=tuple(lengths),
        windows_per_sample=tuple(windows_per_sample),
        tokens_per_sample=tuple(t * h * w for t, h, w in grids),
        text_lengths=text_lengths,
    )


def equal_runs(*lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Stretches of equal entries: [(count, length, ...)], e.g. ([3, 3, 5],) -> [(2, 3), (1, 5)]."""
    return [(len(list(run)), *key) for key, run in groupby(zip(*lengths, strict=True))]


def patch_grids(shapes: Sequence[Grid], patch: tuple[int, int, int]) -> list[Grid]:
    """Patch-token grids of videos in latent pixels. ValueError if a side is not a multiple of the patch."""
    for shape in shapes:
        if any(n < 1 or n % p for n, p in zip(shape, patch, strict=True)):
            raise ValueError(
                f"latent video of shape (T, H, W) = {tuple(shape)} is not divisible into patches of {patch}: "
                "pad the video (its pixel sides to multiples of 16) before encoding it"
            )
    return [(t // patch[0], h // patch[1], w // patch[2]) for t, h, w in shapes]


def patchify(video: Tensor, shapes: Sequence[Grid], patch: tuple[int, int, int]) -> Tensor:
    """(latent pixels, C) -> (patch tokens, pt * ph * pw * C), both packed; channel fastest inside a patch."""
    pt, ph, pw = patch
    samples = video.split([t * h * w for t, h, w in shapes])
    tokens = [
        rearrange(
            sample.unflatten(0, tuple(shape)),
            "(t pt) (h ph) (w pw) c -> (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw,
        )
        for sample, shape in zip(samples, shapes, strict=True)
    ]  # fmt: skip
    return torch.cat(tokens)


def unpatchify(tokens: Tensor, grids: Sequence[Grid], patch: tuple[int, int, int]) -> Tensor:
    """(patch tokens, pt * ph * pw * C) -> (latent pixels, C), both packed: the inverse of `patchify`."""
    pt, ph, pw = patch
    samples = tokens.split([t * h * w for t, h, w in grids])
    videos = [
        rearrange(sample, "(t h w) (pt ph pw c) -> (t pt h ph w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
        for sample, (t, h, w) in zip(samples, grids, strict=True)
    ]
    return torch.cat(videos)
