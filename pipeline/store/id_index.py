"""Lookup of values by clip id for millions of clips, in sorted arrays: 16 bytes per clip plus its value."""

from collections.abc import Iterable

import numpy as np

ID_BYTES = 16


def id_array(ids: Iterable[str]) -> np.ndarray:
    """Ids as fixed-width bytes, `(N,)` S16. ValueError for one that is longer than a stable id."""
    values = np.array([text.encode() for text in ids], dtype=bytes)
    if values.dtype.itemsize > ID_BYTES:
        raise ValueError(
            f"{values[np.char.str_len(values).argmax()].decode()!r} is not an id: it has over 16 characters"
        )
    return values.astype(f"S{ID_BYTES}")


class Lookup:
    """Where an id stands among the given ones."""

    def __init__(self, ids: np.ndarray) -> None:
        """ids: `(N,)` S16, each once."""
        self._order = np.argsort(ids, kind="stable").astype(np.int32)
        self._sorted = ids[self._order]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Position of each id, -1 where it is not there: `(M,)` int64."""
        if not len(self._sorted):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._order[places], -1).astype(np.int64)
