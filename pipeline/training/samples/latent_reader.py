"""Precomputed samples: their latents and texts, and the table of all samples."""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from model import text_encoders
from pipeline.data import text_embeddings
from pipeline.data.upgrade import check_upgraded
from pipeline.store import bf16_columns, delta_tables, parquet, schema, storage
from pipeline.store.id_index import Lookup, id_array

_CACHE_BYTES = 2**30


class Reader(Protocol):
    """A source of samples: read from tables, or made on demand."""

    texts: text_embeddings.ClipTexts | text_embeddings.FixedTexts
    """The prompts for a model trained on these samples."""

    def latents(self, row: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of a row of the sample table in one epoch, each (T', H', W', 16) fp32."""
        ...

    def prompt(self, clip_id: str, drops: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
        """A clip's text input, (L, D) and (P,); dropped encoders' parts are those of ''."""
        ...


class LatentReader:
    """Reads samples' latents and texts by row group and caches the last GiB of them."""

    def __init__(self, data_url: str) -> None:
        self.latents_url = storage.join(data_url, schema.LATENTS)
        self.text_url = storage.join(data_url, schema.TEXT)
        self.texts = text_embeddings.read_texts(data_url)
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()  # shared with the thread that reads ahead
        self._texts = (
            None if isinstance(self.texts, text_embeddings.FixedTexts) else TextPlaces(self.text_url)
        )

    def _stored(self, url: str, row_group: int, row: int) -> dict[str, Any]:
        """One row of a file."""
        key = (url, row_group)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = parquet.read_table(url, row_group=row_group)
                self._kept_bytes += self._kept[key].nbytes
                while self._kept_bytes > _CACHE_BYTES and len(self._kept) > 1:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
            return self._kept[key].slice(row, 1).to_pylist()[0]

    def latents(self, row: dict[str, Any], epoch: int) -> tuple[Tensor, Tensor]:
        """HQ and LQ latents of a row of the table, each (T', H', W', 16) fp32: the same in every epoch."""
        place = row["reference"]
        stored = self._stored(storage.join(self.latents_url, place["file"]), place["row_group"], place["row"])
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
        assert self._texts is not None  # a fixed prompt belongs to no clip
        return text_embeddings.embedding_of(self._stored(*self._texts[clip_id]))


class TextPlaces:
    """The place of each clip's row in text/, in some 30 bytes per clip."""

    def __init__(self, text_url: str) -> None:
        table = delta_tables.open_table(text_url)
        self._files = [] if table is None else table.urls
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
    footer = parquet.read_metadata(file_url)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    ids = id_array(parquet.read_table(file_url, ["clip_id"])["clip_id"].to_pylist())
    rows = np.concatenate([np.arange(size) for size in sizes])
    return ids, np.column_stack([np.repeat(np.arange(len(sizes)), sizes), rows])


def read_index(data_url: str) -> pa.Table:
    """Every sample of `latents/_index/`, as `sample_table` gives them; ValueError if there is none."""
    check_upgraded(data_url)
    table = delta_tables.read(storage.join(data_url, schema.LATENTS, schema.INDEX))
    if table is None or not table.num_rows:
        raise ValueError(f"data: {data_url} has no latents; run precompute first")
    return sample_table(table)


def sample_table(index: pa.Table) -> pa.Table:
    """The rows of an index in the order in which their samples are stored, with two columns for their places.

    `reference` says where to read a sample; only readers use it, and they may change its content. `locality`
    (int64, never falling) is equal for samples that one read brings: it is the row group, numbered.
    """
    place = ["file", "row_group", "row"]
    index = index.sort_by([(name, "ascending") for name in place])
    files = index["file"].combine_chunks().dictionary_encode().indices.to_numpy()
    edges = (np.diff(files) != 0) | (np.diff(index["row_group"].to_numpy()) != 0)
    reference = pa.StructArray.from_arrays([index[name].combine_chunks() for name in place], names=place)
    locality = pa.array(np.concatenate([[0], np.cumsum(edges)]))
    return index.drop_columns(place).append_column("reference", reference).append_column("locality", locality)


def files_of(samples: pa.Table) -> list[str]:
    """The files of latents/ that these samples lie in."""
    return _files(samples).unique().to_pylist()


def of_files(samples: pa.Table, files: list[str]) -> pa.Table:
    """The samples in these files of latents/; ValueError if a file no longer exists."""
    gone = sorted(set(files) - set(files_of(samples)))
    if gone:
        raise ValueError(
            f"data: latents/ lacks {len(gone)} files that this stage began with ({gone[0]}, ...); put them "
            "back, or give another output to start over"
        )
    return samples.filter(pc.is_in(_files(samples), pa.array(files)))


def _files(samples: pa.Table) -> pa.ChunkedArray:
    return pc.struct_field(samples["reference"], "file")
