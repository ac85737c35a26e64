"""Which samples a training step sees, and reading them.

The order of samples is a function of (seed, epoch) alone, packed into a fixed number of packs a step; the
state is one counter: samples drawn so far. So a resumed run, on whatever number of workers, sees the
same samples in the same steps. Noise, times and text drops come from (seed, epoch, sample_id).
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model import flow, text
from pipeline import bfloat16, schema, storage, text_stage

Shape = tuple[int, int, int]
_ROW_GROUPS_KEPT = 32


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One sample of the endless stream: a row of the index in one epoch."""

    row: dict[str, Any]
    epoch: int

    @property
    def tokens(self) -> int:
        return self.row["video_tokens"]


class SampleStream:
    """The endless order of samples: each epoch is a permutation by (seed, epoch), the next follows on."""

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int) -> None:
        assert rows
        self.rows = sorted(rows, key=lambda row: row["sample_id"])
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> Drawn:
        epoch, within = divmod(position, len(self.rows))
        if self._order[0] != epoch:
            draw = np.random.default_rng(schema.stable_hash(self.seed, "epoch", epoch))
            self._order = (epoch, draw.permutation(len(self.rows)))
        return Drawn(self.rows[self._order[1][within]], epoch)


def pack_step(
    stream: SampleStream, position: int, packs_per_step: int, tokens_per_pack: int
) -> tuple[list[list[Drawn]], int]:
    """One step's packs and the position after them.

    Each next sample goes to the emptiest pack; the first that fits nowhere begins the next step. So no
    pack is empty and their loads differ by less than one sample.
    """
    packs: list[list[Drawn]] = [[] for _ in range(packs_per_step)]
    loads = [0] * packs_per_step
    while True:
        drawn = stream[position]
        emptiest = loads.index(min(loads))
        if packs[emptiest] and loads[emptiest] + drawn.tokens > tokens_per_pack:
            return packs, position
        packs[emptiest].append(drawn)
        loads[emptiest] += drawn.tokens
        position += 1


def check_budget(rows: Sequence[dict[str, Any]], tokens_per_pack: int, stage_name: str) -> None:
    largest = max(rows, key=lambda row: row["video_tokens"])
    if largest["video_tokens"] > tokens_per_pack:
        raise ValueError(
            f"stages.{stage_name}: tokens_per_pack is {tokens_per_pack}, but a sample of bucket "
            f"{largest['bucket']} has {largest['video_tokens']} tokens; raise it or leave that bucket out"
        )


@dataclasses.dataclass
class Batch:
    """One pack, ready for the network: samples laid end to end, rows are latent pixels, W fastest.

    video: (rows, 33) = noisy 16, condition 16, mask 1. target: (rows, 16) = noise - data.
    text: (text tokens, D). pooled: (B, P). timestep: (B,) in 0..1000.
    """

    video: Tensor
    target: Tensor
    text: Tensor
    pooled: Tensor
    video_shapes: list[Shape]
    text_lengths: list[int]
    timestep: Tensor
    sample_ids: list[str]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype) for name in ("video", "text", "pooled")
        }
        rest = {name: getattr(self, name).to(device) for name in ("target", "timestep")}
        return dataclasses.replace(self, **moved, **rest)

    def sample_losses(self, velocity: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,), in fp32."""
        squared = (velocity.float() - self.target).square().mean(dim=1)
        counts = [t * h * w for t, h, w in self.video_shapes]
        return torch.stack([part.mean() for part in squared.split(counts)])


class LatentReader:
    """Samples' latents and texts, by row group, the last few row groups kept."""

    def __init__(self, data_url: str) -> None:
        self.latents_url = storage.join(data_url, schema.LATENTS)
        self.text_url = storage.join(data_url, schema.TEXT)
        self.null = text_stage.read_null(data_url)
        self._kept: OrderedDict[tuple[str, int], list[dict[str, Any]]] = OrderedDict()
        self._texts: dict[str, tuple[str, int, int]] = {}
        for file in storage.parquet_files(self.text_url):
            self._texts |= _places(file)

    def _row_group(self, url: str, number: int) -> list[dict[str, Any]]:
        key = (url, number)
        if key not in self._kept:
            with storage.open_input(url) as file:
                self._kept[key] = pq.ParquetFile(file).read_row_group(number).to_pylist()
            while len(self._kept) > _ROW_GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def latents(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of an index row, each (T', H', W', 16) fp32."""
        group = self._row_group(storage.join(self.latents_url, row["file"]), row["row_group"])
        stored = group[row["row"]]
        assert stored["sample_id"] == row["sample_id"]
        return bfloat16.from_columns(stored, "hq_latent"), bfloat16.from_columns(stored, "lq_latent")

    def text(self, clip_id: str) -> text.TextEmbedding:
        file, group, row = self._texts[clip_id]
        return text_stage.embedding_of(self._row_group(file, group)[row])


def _places(file_url: str) -> dict[str, tuple[str, int, int]]:
    """Where each clip's row stands in a text file: (file, row group, row)."""
    places: dict[str, tuple[str, int, int]] = {}
    with storage.open_input(file_url) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            ids = parquet.read_row_group(group, columns=["clip_id"]).column("clip_id").to_pylist()
            places |= {clip_id: (file_url, group, row) for row, clip_id in enumerate(ids)}
    return places


def draw_generator(seed: int, epoch: int, sample_id: str) -> torch.Generator:
    """All of a sample's randomness in one epoch, whichever rank or pack it falls to."""
    return torch.Generator().manual_seed(schema.stable_hash(seed, "draw", epoch, sample_id))


def training_sample(
    reader: LatentReader, drawn: Drawn, seed: int, drop_text: bool = True, timestep: float | None = None
) -> dict[str, Any]:
    """One sample with its noise, time, condition noise and text drops drawn. `timestep` fixes the time."""
    generator = draw_generator(seed, drawn.epoch, drawn.row["sample_id"])
    hq, lq = reader.latents(drawn.row)
    shape = (hq.shape[0], hq.shape[1], hq.shape[2])
    hq, lq = hq.flatten(0, 2), lq.flatten(0, 2)
    flowed = flow.training_batch(hq, lq, [shape], generator)
    video, time = flowed.video, flowed.time
    if timestep is not None:
        time = torch.full((1,), timestep)
        noisy = flow.interpolate(hq, flowed.target + hq, time)
        video = flow.network_input(noisy, flowed.video[:, hq.shape[1] : 2 * hq.shape[1]])
    drops = text.draw_drops(generator) if drop_text else (False, False, False)
    tokens, pooled = text.join(reader.text(drawn.row["clip_id"]), reader.null, *drops)
    return {
        "video": video,
        "target": flowed.target,
        "text": tokens,
        "pooled": pooled,
        "shape": shape,
        "timestep": time,
        "sample_id": drawn.row["sample_id"],
    }


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Lay samples end to end."""
    return Batch(
        video=torch.cat([sample["video"] for sample in samples]),
        target=torch.cat([sample["target"] for sample in samples]),
        text=torch.cat([sample["text"] for sample in samples]),
        pooled=torch.stack([sample["pooled"] for sample in samples]),
        video_shapes=[sample["shape"] for sample in samples],
        text_lengths=[len(sample["text"]) for sample in samples],
        timestep=torch.cat([sample["timestep"] for sample in samples]),
        sample_ids=[sample["sample_id"] for sample in samples],
    )


@dataclasses.dataclass
class Step:
    """One rank's share of a step: its packs, the step's sample count, the position after the step."""

    batches: list[Batch]
    samples: int
    next_position: int


def rank_steps(
    reader: LatentReader,
    stream: SampleStream,
    position: int,
    packs_per_step: int,
    tokens_per_pack: int,
    rank: int,
    world_size: int,
) -> Iterator[Step]:
    """A rank's steps from a position on; packs go to ranks in turn."""
    while True:
        packs, position = pack_step(stream, position, packs_per_step, tokens_per_pack)
        mine = packs[rank::world_size]
        batches = [collate([training_sample(reader, drawn, stream.seed) for drawn in pack]) for pack in mine]
        yield Step(batches, sum(len(pack) for pack in packs), position)


def read_index(data_url: str) -> list[dict[str, Any]]:
    """Every sample of `latents/_index/`; ValueError if there is none."""
    table = storage.read_folder(storage.join(data_url, schema.LATENTS, schema.INDEX))
    if table is None or not table.num_rows:
        raise ValueError(f"data: {data_url} has no latents; run precompute first")
    return table.to_pylist()
