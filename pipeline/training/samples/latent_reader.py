"""The samples of a step as batches: read, with their noise drawn, laid end to end.

Noise, times and text drops come from (seed, epoch, sample_id), so a sample is the same wherever it is made.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model import flow, text_encoders
from pipeline.data import text_embeddings
from pipeline.store import bf16_columns, hashing, schema, storage
from pipeline.store.id_index import Lookup, id_array
from pipeline.training.samples.sample_order import Drawn, SampleStream, pack_step

Shape = tuple[int, int, int]
_CACHE_BYTES = 2**30


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
    buckets: list[str]

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


class Reader(Protocol):
    """Where samples come from: from tables, or made as they are asked for."""

    texts: text_embeddings.ClipTexts | text_embeddings.FixedTexts
    """the prompts that a model trained on them is used with"""

    def latents(self, row: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of an index row in an epoch, each (T', H', W', 16) fp32."""
        ...

    def prompt(self, clip_id: str, drops: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
        """A clip's text input, (L, D) and (P,); dropped encoders' parts are those of ''."""
        ...


class LatentReader:
    """Samples' latents and texts, by row group, the last GiB of them kept."""

    def __init__(self, data_url: str) -> None:
        self.latents_url = storage.join(data_url, schema.LATENTS)
        self.text_url = storage.join(data_url, schema.TEXT)
        self.texts = text_embeddings.read_texts(data_url)
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()  # the thread that reads ahead is not alone
        self._texts = (
            None if isinstance(self.texts, text_embeddings.FixedTexts) else TextPlaces(self.text_url)
        )

    def _stored(self, url: str, row_group: int, row: int) -> dict[str, Any]:
        """One row of a file."""
        key = (url, row_group)
        with self._lock:
            if key not in self._kept:
                with storage.open_input(url) as file:
                    self._kept[key] = pq.ParquetFile(file).read_row_group(row_group)
                self._kept_bytes += self._kept[key].nbytes
                while self._kept_bytes > _CACHE_BYTES and len(self._kept) > 1:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
            return self._kept[key].slice(row, 1).to_pylist()[0]

    def latents(self, row: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of an index row, each (T', H', W', 16) fp32: the same in every epoch."""
        stored = self._stored(storage.join(self.latents_url, row["file"]), row["row_group"], row["row"])
        assert stored["sample_id"] == row["sample_id"]
        return bf16_columns.from_columns(stored, "hq_latent"), bf16_columns.from_columns(stored, "lq_latent")

    def prompt(self, clip_id: str, drops: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
        """A clip's text input, (L, D) and (P,), with the parts of dropped encoders replaced by those of ''.

        A fixed prompt has no parts: the negative one takes its place where all three are dropped.
        """
        if isinstance(self.texts, text_embeddings.FixedTexts):
            return self.texts.prompt(dropped=all(drops))
        return text_encoders.join(self.text(clip_id), self.texts.null, *drops)

    def text(self, clip_id: str) -> text_encoders.TextEmbedding:
        assert self._texts is not None  # a fixed prompt is none of a clip's own
        return text_embeddings.embedding_of(self._stored(*self._texts[clip_id]))


class TextPlaces:
    """Where each clip's row of text/ stands: some 30 bytes a clip."""

    def __init__(self, text_url: str) -> None:
        self._files = storage.parquet_files(text_url)
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(_ids_and_groups, self._files))
        self._lookup = Lookup(np.concatenate([ids for ids, _ in parts]))
        files = np.repeat(np.arange(len(parts)), [len(ids) for ids, _ in parts])
        self._places = np.column_stack([files, np.concatenate([places for _, places in parts])]).astype("i4")

    def __getitem__(self, clip_id: str) -> tuple[str, int, int]:
        """(URL of the file, row group, row)."""
        place = self._lookup.find(id_array([clip_id]))[0]
        if place < 0:
            raise ValueError(f"text/ has no clip {clip_id}; run precompute again")
        file, group, row = self._places[place].tolist()
        return self._files[file], group, row


def _ids_and_groups(file_url: str) -> tuple[np.ndarray, np.ndarray]:
    """The clip ids of a text file, (rows,), and of each its row group and its row there, (rows, 2)."""
    footer = storage.read_metadata(file_url)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    ids = id_array(storage.read_table(file_url, ["clip_id"])["clip_id"].to_pylist())
    rows = np.concatenate([np.arange(size) for size in sizes])
    return ids, np.column_stack([np.repeat(np.arange(len(sizes)), sizes), rows])


def draw_generator(seed: int, epoch: int, sample_id: str) -> torch.Generator:
    """All of a sample's randomness in one epoch, whichever rank or pack it falls to."""
    return torch.Generator().manual_seed(hashing.stable_hash(seed, "draw", epoch, sample_id))


def training_sample(
    reader: Reader,
    drawn: Drawn,
    seed: int,
    drop_text: bool = True,
    timestep: float | None = None,
    one_step_share: float = 0.0,
) -> dict[str, Any]:
    """One sample with its noise, time, condition noise and text drops drawn.

    `timestep` fixes the time. Of the samples, `one_step_share` are pure noise beside a clean condition.
    """
    generator = draw_generator(seed, drawn.epoch, drawn.row["sample_id"])
    hq, lq = reader.latents(drawn.row, drawn.epoch)
    shape = (hq.shape[0], hq.shape[1], hq.shape[2])
    hq, lq = hq.flatten(0, 2), lq.flatten(0, 2)
    flowed = flow.training_batch(hq, lq, [shape], generator)
    video, time = flowed.video, flowed.time
    if timestep is not None:
        time = torch.full((1,), timestep)
        noisy = flow.interpolate(hq, flowed.target + hq, time)
        video = flow.network_input(noisy, flowed.video[:, hq.shape[1] : 2 * hq.shape[1]])
    drops = text_encoders.draw_drops(generator) if drop_text else (False, False, False)
    if one_step_share and torch.rand((), generator=generator) < one_step_share:
        time = torch.full((1,), flow.MAX_TIME)
        video = flow.network_input(flowed.target + hq, lq)
    tokens, pooled = reader.prompt(drawn.row["clip_id"], drops)
    return {
        "video": video,
        "target": flowed.target,
        "text": tokens,
        "pooled": pooled,
        "shape": shape,
        "timestep": time,
        "sample_id": drawn.row["sample_id"],
        "bucket": drawn.row["bucket"],
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
        buckets=[sample["bucket"] for sample in samples],
    )


@dataclasses.dataclass
class Step:
    """One rank's share of a step."""

    batches: list[Batch]
    """its packs"""
    samples: int
    """of all ranks"""
    imbalance: float
    """(max - mean) / mean of the ranks' counted operations"""
    next_position: int
    """of the stream, after the step"""


def rank_steps(
    reader: Reader,
    stream: SampleStream,
    position: int,
    packs_per_step: int,
    tokens_per_pack: int,
    rank: int,
    world_size: int,
    one_step_share: float = 0.0,
) -> Iterator[Step]:
    """A rank's steps from a position on; packs go to ranks in turn."""

    def sample(position: int) -> dict[str, Any]:
        return training_sample(reader, stream[position], stream.seed, one_step_share=one_step_share)

    while True:
        packed = pack_step(stream, position, packs_per_step, tokens_per_pack)
        position = packed.next_position
        yield Step(
            [collate([sample(one) for one in pack]) for pack in packed.packs[rank::world_size]],
            sum(map(len, packed.packs)),
            packed.imbalance(world_size),
            position,
        )


def read_index(data_url: str) -> pa.Table:
    """Every sample of `latents/_index/`; ValueError if there is none."""
    table = storage.read_folder(storage.join(data_url, schema.LATENTS, schema.INDEX))
    if table is None or not table.num_rows:
        raise ValueError(f"data: {data_url} has no latents; run precompute first")
    return table
