"""Ways to make batches of samples of all sizes, by the time that training takes (part of training.py).

The mix of configs/training_mix.yaml at a quarter of its sides, with windows, budget and text shrunk alike and
a width at which a token's matrix products and its attention stand to each other as in the paper's model: a
miniature of the same proportions. One worker, forward and backward, the same samples in each way:

packed    our packs: laid end to end, equal counted work, no padding
padded    sorted by tokens, neighbours padded with zeros to the largest T, H and W among them, as many as then
          fit the same token budget; padded_by_shape: the same, sorted by (T, H, W) instead
bucketed  samples of equal size only, as many as fit the budget, the rest of a size as a smaller batch
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from benchmarks.data import timed
from model import flops
from model.dit.swin_mmdit import SD3_MEDIUM, SwinMMDiT
from pipeline.store import schema
from pipeline.training.samples import latent_reader, pack_balance, sample_order

Shape = tuple[int, int, int]
Pack = list[Shape]
"""Latent (T, H, W) of each sample of a batch, as the network gets them."""
MIX = "configs/training_mix.yaml"
SHRUNK = 4
WORKERS = 8
MODEL = dataclasses.replace(
    SD3_MEDIUM, num_layers=4, num_heads=3, head_dim=32, text_dim=64, pooled_dim=32, windows=((5, 16, 16),)
)


def mix() -> tuple[dict[str, Any], pa.Table]:
    """The config and an index of its samples, shrunk: sides in pixels of the miniature."""
    with open(MIX) as file:
        config = yaml.safe_load(file)
    draw = np.random.default_rng(config["seed"])
    rows = []
    for number in range(config["samples"]):
        if draw.random() < config["images"]:
            low, high = np.log(config["image_megapixels"])
            pixels, aspect = 1e6 * np.exp(draw.uniform(low, high)), draw.choice(config["image_aspects"])
            frames, size = 1, (np.sqrt(pixels / aspect), np.sqrt(pixels * aspect))
        else:
            frames, size = int(draw.choice(config["video_frames"])), draw.choice(config["video_sizes"])
        height, width = (int(s // config["side_multiple"] * config["side_multiple"]) // SHRUNK for s in size)
        rows.append(
            schema.empty_row(
                schema.INDEX_SCHEMA,
                sample_id=f"{number:06d}",
                file=f"{number:06d}",
                row_group=0,
                row=0,
                num_frames=frames,
                height=height,
                width=width,
                video_tokens=schema.video_tokens(frames, height, width),
                text_tokens=config["text_tokens"] // SHRUNK**2,
            )
        )
    return config, latent_reader.sample_table(pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA))


def tokens_of(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2] // schema.PATCH**2


def packed(index: pa.Table, budget: int, packs: int) -> list[Pack]:
    """One epoch in our packs, `packs` of them a step; the last step takes what is left."""
    stream = sample_order.SampleStream(index, 0, MODEL)
    shapes = shapes_of(stream.rows)
    made: list[Pack] = []
    position = 0
    while position < len(stream):
        step = sample_order.pack_step(stream, position, packs, budget)
        inside = [[one for one in pack if one < len(stream)] for pack in step.packs]
        numbers = [stream.numbers(0, len(stream))[pack] for pack in inside if pack]
        made += [[shapes[number] for number in pack] for pack in numbers]
        position = step.next_position
    return made


def shapes_of(index: pa.Table) -> list[Shape]:
    sizes = zip(*(index[key].to_pylist() for key in ("num_frames", "height", "width")), strict=True)
    return [schema.latent_shape(*size) for size in sizes]


def padded(shapes: list[Shape], budget: int) -> list[Pack]:
    """shapes: in the order in which neighbours share a batch."""
    made: list[Pack] = []
    waiting: list[Shape] = []
    for shape in shapes:
        largest = _largest([*waiting, shape])
        if waiting and tokens_of(largest) * (len(waiting) + 1) > budget:
            made.append([_largest(waiting)] * len(waiting))
            waiting = []
        waiting.append(shape)
    return [*made, [_largest(waiting)] * len(waiting)]


def _largest(shapes: list[Shape]) -> Shape:
    t, h, w = (max(sides) for sides in zip(*shapes, strict=True))
    return t, h, w


def bucketed(shapes: list[Shape], budget: int) -> list[Pack]:
    made: list[Pack] = []
    for shape, group in itertools.groupby(sorted(shapes)):
        count, fit = len(list(group)), budget // tokens_of(shape)
        made += [[shape] * min(fit, count - done) for done in range(0, count, fit)]
    return made


def seconds_of(model: SwinMMDiT, pack: Pack, text_tokens: int) -> float:
    """One forward and backward pass of a batch of noise."""
    rows, count = sum(t * h * w for t, h, w in pack), len(pack)
    video = torch.randn(rows, MODEL.in_channels)
    text, pooled = torch.randn(count * text_tokens, MODEL.text_dim), torch.randn(count, MODEL.pooled_dim)
    time = torch.full((count,), 500.0)

    def step() -> None:
        model(video, text, pack, [text_tokens] * count, time, pooled).square().mean().backward()
        model.zero_grad()

    return timed(step)


def by_slowest(seconds: list[float], workers: int) -> float:
    """Time of all batches when so many workers take one each and wait for the slowest."""
    return sum(max(seconds[i : i + workers]) for i in range(0, len(seconds), workers))


def counted(pack: Pack, text_tokens: int) -> int:
    return sum(flops.forward_flops(MODEL, shape, text_tokens).total for shape in pack)


def run(short: bool, rounds: int = 3) -> dict[str, Any]:
    """All ways, taking turns; the least seconds of each batch."""
    config, index = mix()
    budget, text_tokens = config["tokens_per_pack"] // SHRUNK**2, config["text_tokens"] // SHRUNK**2
    if short:
        index, rounds = index.slice(0, 24), 1
    shapes = shapes_of(index)
    ways: dict[str, Callable[[], list[Pack]]] = {
        "packed": lambda: packed(index, budget, WORKERS if len(index) > 200 else 1),
        "padded": lambda: padded(sorted(shapes, key=tokens_of), budget),
        "padded_by_shape": lambda: padded(sorted(shapes), budget),
        "bucketed": lambda: bucketed(shapes, budget),
    }
    torch.manual_seed(0)
    model = SwinMMDiT(MODEL)
    packs = {name: make() for name, make in ways.items()}
    seconds_of(model, packs["packed"][0], text_tokens)
    best = {name: [float("inf")] * len(made) for name, made in packs.items()}
    for _ in range(rounds):
        for name, made in packs.items():
            for number, pack in enumerate(made):
                best[name][number] = min(best[name][number], seconds_of(model, pack, text_tokens))
    total = {name: sum(times) for name, times in best.items()}
    shuffled = {name: np.random.default_rng(0).permutation(times).tolist() for name, times in best.items()}
    slowest = {"packed": by_slowest(best["packed"], WORKERS)}
    slowest |= {name: by_slowest(times, WORKERS) for name, times in shuffled.items() if name != "packed"}
    work = {name: [counted(pack, text_tokens) for pack in made] for name, made in packs.items()}
    return {
        "samples": len(shapes),
        "batches": {name: len(made) for name, made in packs.items()},
        "seconds": total,
        "ratio_padded": total["padded"] / total["packed"],
        "ratio_padded_by_shape": total["padded_by_shape"] / total["packed"],
        "ratio_bucketed": total["bucketed"] / total["packed"],
        "ratio_padded_counted": sum(work["padded"]) / sum(work["packed"]),
        f"ratio_padded_{WORKERS}_workers": slowest["padded"] / slowest["packed"],
        f"ratio_bucketed_{WORKERS}_workers": slowest["bucketed"] / slowest["packed"],
        "imbalance_counted": {
            name: float(
                np.mean(
                    [pack_balance.imbalance(loads[i : i + WORKERS]) for i in range(0, len(loads), WORKERS)]
                )
            )
            for name, loads in work.items()
        },
    }
