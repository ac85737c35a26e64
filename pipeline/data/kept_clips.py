"""The clips that selection/ keeps, which all stages after the filter work on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.data.upgrade import check_upgraded
from pipeline.store import delta_tables, schema, storage
from pipeline.store.id_index import ID_BYTES, Lookup, id_array


class KeptClips:
    """The clips that selection/ keeps, by id: their split, and the text tokens of those that have text."""

    def __init__(self, data_url: str, version: int | None = None) -> None:
        """Read the newest selection, or that of a version; ValueError without one or without a kept clip."""
        ids, held_out = [np.zeros(0, f"S{ID_BYTES}")], [np.zeros(0, bool)]
        check_upgraded(data_url)
        clips = delta_tables.open_table(storage.join(data_url, schema.CLIPS))
        selection = delta_tables.open_table(storage.join(data_url, schema.SELECTION), version)
        if clips is None or selection is None:
            raise ValueError(f"data: {data_url} has no clips/ or no selection/; run ingest and filter first")
        for table in selection.iterate(["clip_id", "keep", "split"]):
            table = table.filter(table["keep"])
            ids.append(id_array(table["clip_id"].to_pylist()))
            held_out.append(pc.equal(table["split"], "held_out").to_numpy())
        joined = np.concatenate(ids)
        if not len(joined):
            raise ValueError(f"data: {data_url}/selection keeps no clip; loosen the filter's thresholds")
        self._lookup, self._held_out = Lookup(joined), np.concatenate(held_out)
        self._text_tokens = np.zeros(len(joined), np.int32)

    def rows(
        self, data_url: str, columns: list[str] | None = None
    ) -> Iterator[tuple[dict[str, Any], str, int]]:
        """(row of clips/, split, text tokens) of every kept clip, file by file. columns: None for all."""
        for table in delta_tables.iterate(storage.join(data_url, schema.CLIPS), columns):
            places = self._lookup.find(id_array(table["clip_id"].to_pylist()))
            kept = np.flatnonzero(places >= 0)
            for row, place in zip(table.take(kept).to_pylist(), places[kept], strict=True):
                split = "held_out" if self._held_out[place] else "train"
                yield row, split, int(self._text_tokens[place])

    def read_text_tokens(self, text_url: str) -> None:
        """Fill in each clip's tokens from text/."""
        for table in delta_tables.iterate(text_url, ["clip_id", "clip_l_shape", "clip_g_shape", "t5_shape"]):
            places = self._lookup.find(id_array(table["clip_id"].to_pylist()))
            tokens = np.array([token_count(row) for row in table.to_pylist()], np.int32)
            self._text_tokens[places[places >= 0]] = tokens[places >= 0]

    def same_text(self, tokens: int) -> None:
        """Give every clip the same number of text tokens."""
        self._text_tokens[:] = tokens


def kept_clips(data_url: str, split: str, version: int | None = None) -> list[dict[str, Any]]:
    """The rows of clips/ that are kept in one split (train, held_out), by clip id.

    version: of selection/; None for the newest.

    ValueError if there is no selection, or it keeps nothing.
    """
    kept = KeptClips(data_url, version).rows(data_url)
    return sorted((row for row, side, _ in kept if side == split), key=lambda row: row["clip_id"])


def token_count(row: dict[str, Any]) -> int:
    """Text tokens of a row: both CLIPs share theirs (joined by channel), T5's follow."""
    return max(row["clip_l_shape"][0], row["clip_g_shape"][0]) + row["t5_shape"][0]
