"""Packs of equal work: which samples a step takes, and which pack each goes to.

Packs are trained in parallel and wait for the slowest, so what counts is the ratio of the most expensive one
to the mean. Costs are FLOPs (`model.flops`): a token costs up to 1.4 times as much in a large window as in a
small one, so packs with equal tokens would not be equal work. Tokens bound a pack's memory.
"""

import heapq
from collections.abc import Sequence
from itertools import groupby

import numpy as np

GOOD_ENOUGH = 0.01
"""Imbalance below which no other number of samples is tried."""
_TRIES = 12
_FINE_SAMPLES = 4
_PIECE_SHARE = 8


def imbalance(loads: Sequence[float]) -> float:
    """(max - mean) / mean, the share of time for which the other packs wait for the slowest."""
    mean = sum(loads) / len(loads)
    return max(loads) / mean - 1


def fill_packs(
    costs: np.ndarray, tokens: np.ndarray, localities: np.ndarray, packs: int, tokens_per_pack: int
) -> list[list[int]]:
    """Packs, each a list of positions, that hold the first n of the given samples; n is chosen here.

    costs, tokens, localities: (N,) of the next samples in order; samples of one locality are read together.
    N must reach over packs x tokens_per_pack tokens, no sample over tokens_per_pack. n is the most that fit,
    or up to a quarter less where that is better balanced. No pack is empty.
    """
    count = int(np.searchsorted(np.cumsum(tokens), packs * tokens_per_pack, side="right"))
    least = max(packs, count * 3 // 4)
    best: tuple[float, list[list[int]]] | None = None
    tries = 0
    while count >= packs and (best is None or (count >= least and tries < _TRIES)):
        assigned, left_over = _assign(
            costs[:count], tokens[:count], localities[:count], packs, tokens_per_pack
        )
        if left_over:
            # As many of the last as have the tokens that found no room.
            back = np.cumsum(tokens[:count][::-1])
            count -= int(np.searchsorted(back, left_over, side="left")) + 1
            count, least = max(count, packs), max(packs, min(least, count * 3 // 4))
            continue
        uneven = imbalance([float(costs[pack].sum()) for pack in assigned])
        if best is None or uneven < best[0]:
            best = uneven, assigned
        if uneven <= GOOD_ENOUGH:
            break
        tries += 1
        count -= max(1, count // 100)
    assert best is not None  # one sample per pack always fits
    return best[1]


def _assign(
    costs: np.ndarray, tokens: np.ndarray, localities: np.ndarray, packs: int, tokens_per_pack: int
) -> tuple[list[list[int]], int]:
    """Assign samples to packs, most expensive first, each to the least loaded pack that has room.

    Also returns the tokens of the samples that found no room, in which case the packs are of no use.
    """
    assigned: list[list[int]] = [[] for _ in range(packs)]
    room = [tokens_per_pack] * packs
    heap = [(0.0, pack) for pack in range(packs)]
    left_over = 0
    for cost, size, piece in _pieces(costs, tokens, localities, packs):
        passed = []
        while heap and room[heap[0][1]] < size:
            passed.append(heapq.heappop(heap))
        if not heap:
            left_over += size
        else:
            load, pack = heap[0]
            assigned[pack] += piece
            room[pack] -= size
            heapq.heapreplace(heap, (load + cost, pack))
        for entry in passed:
            heapq.heappush(heap, entry)
    return assigned, left_over


def _pieces(
    costs: np.ndarray, tokens: np.ndarray, localities: np.ndarray, packs: int
) -> list[tuple[float, int, list[int]]]:
    """(cost, tokens, positions) of what is assigned as one, the most expensive first.

    Samples of one locality stay together, up to an eighth of a pack, so that it is read by few workers. The
    last samples, some for each pack, are pieces of their own: they even out the loads.
    """
    count = len(costs)
    coarse = max(0, count - _FINE_SAMPLES * packs)
    most = costs.sum() / packs / _PIECE_SHARE
    order = np.argsort(localities[:coarse], kind="stable").tolist()
    pieces: list[tuple[float, int, list[int]]] = []
    cost_of, tokens_of = costs.tolist(), tokens.tolist()
    for _, group in groupby(order, key=localities.tolist().__getitem__):
        cost, size, piece = 0.0, 0, list[int]()
        for number in group:
            if piece and cost + cost_of[number] > most:
                pieces.append((cost, size, piece))
                cost, size, piece = 0.0, 0, []
            cost, size = cost + cost_of[number], size + tokens_of[number]
            piece.append(number)
        pieces.append((cost, size, piece))
    pieces += [(cost_of[number], tokens_of[number], [number]) for number in range(coarse, count)]
    pieces.sort(key=lambda piece: (-piece[0], piece[2][0]))
    return pieces
