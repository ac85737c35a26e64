"""Near-duplicate clips: which 64-bit perceptual hashes are so alike that their clips count as one.

The selection keeps the largest clip of each group.
"""

import itertools
from collections.abc import Iterator

import numpy as np

MAX_DUPLICATE_DISTANCE = 3
# Two hashes that differ in at most 3 bits agree in at least 3 of 6 bands, so each pair shares one of 20 keys
# of 31 to 33 bits: among millions of clips hardly any share one by chance.
_BANDS = (11, 11, 11, 11, 10, 10)
_EDGES_AT_ONCE = 4_000_000


def _bands() -> list[np.uint64]:
    """Bit masks of all combinations of three bands."""
    masks, first = [], 0
    for width in _BANDS:
        masks.append(((1 << width) - 1) << first)
        first += width
    return [np.uint64(a | b | c) for a, b, c in itertools.combinations(masks, 3)]


def _near_pairs(unique: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Index pairs `(2, P)` of hashes that differ in at most `distance` bits; a pair may come repeatedly."""
    for mask in _bands() if distance else ():
        keys = unique & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(keys[1:] == keys[:-1])  # each with its neighbour, then the one after, ...
        step = 1
        while len(first):
            one, other = order[first], order[first + step]
            near = np.bitwise_count(unique[one] ^ unique[other]) <= distance
            yield np.stack([one[near], other[near]])
            step += 1
            first = first[first + step < len(keys)]
            first = first[keys[first] == keys[first + step]]


def components(count: int, pairs: Iterator[np.ndarray]) -> np.ndarray:
    """Labels `(count,)` of the sets that the pairs link, from 0 on."""
    # Here, as the driver alone needs them: the workers' start would pay for them too.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(count, dtype=np.int32)
    waiting: list[np.ndarray] = []

    def link() -> np.ndarray:
        one, other = labels[np.concatenate(waiting, axis=1)] if waiting else np.zeros((2, 0), np.int32)
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
        return connected_components(graph, directed=False)[1].astype(np.int32)[labels]

    for found in pairs:
        if found.shape[1]:
            waiting.append(found)
        if sum(part.shape[1] for part in waiting) > _EDGES_AT_ONCE:
            labels, waiting = link(), []
    return link()


def duplicate_labels(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Group number of each 64-bit hash `(N,)` uint64: hashes linked by at most `distance` differing bits.

    Equal hashes are one; the others are compared only where half of their bits agree, so the work grows with
    the number of near hashes and not with all pairs.
    """
    unique, inverse = np.unique(hashes, return_inverse=True)
    return components(len(unique), _near_pairs(unique, distance))[inverse]
