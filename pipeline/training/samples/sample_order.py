"""The samples of each training step: an endless order, packed step by step into packs of equal work.

Both are functions of (seed, epoch) and of the number of packs per step; the only state is a counter of the
samples drawn so far. A resumed run therefore sees the same samples in the same steps, on any number of
workers.
"""

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa

from model import flops
from pipeline.store import hashing, schema
from pipeline.training.samples import pack_balance

_WINDOW_TOKENS = 2**21  # of 256 bytes each


@dataclasses.dataclass(frozen=True)
class ScheduledSample:
    """One sample of the endless stream: a row of the sample table in one epoch."""

    row: dict[str, Any]
    epoch: int

    @property
    def tokens(self) -> int:
        return self.row["video_tokens"]


class SampleStream:
    """The endless order of samples: epoch after epoch, each in an order drawn from (seed, epoch).

    Localities are shuffled first, then samples within windows of some 512 MB of latents, which a reader
    caches, so that each locality is read about once. A small data set is a single window. (Localities are
    random samples of the whole data already, since shards are assigned by hash.) Positions of samples that
    may no longer be used are passed over, so the others keep their order.
    """

    def __init__(
        self, rows: pa.Table, seed: int, model: flops.Config, allowed: np.ndarray | None = None
    ) -> None:
        """rows: of the sample table, at least one, in its order. model: whose FLOPs are a sample's cost.

        allowed: `(rows,)` bool, the samples that may be used, at least one; None for all.
        """
        assert rows.num_rows
        self.rows = rows
        self.allowed = np.ones(rows.num_rows, bool) if allowed is None else allowed
        assert self.allowed.any()
        self.seed, self.model = seed, model
        self.tokens = _numbers(self.rows, "video_tokens")
        self.mean_tokens = float(self.tokens[self.allowed].mean())
        steps = np.diff(_numbers(rows, "locality"))
        assert (steps >= 0).all(), "the rows are not in the sample table's order"
        self.localities = np.concatenate([[0], np.cumsum(steps != 0)])
        """(rows,) number of the locality that each row lies in, without gaps."""
        self._shapes = np.stack([_numbers(self.rows, k) for k in ("num_frames", "height", "width")], axis=1)
        self._text_tokens = _numbers(self.rows, "text_tokens")
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.rows.num_rows

    def order(self, epoch: int) -> np.ndarray:
        """(samples,) row numbers of one epoch."""
        if epoch not in self._orders:
            draw = np.random.default_rng(hashing.stable_hash(self.seed, "epoch", epoch))
            turns = draw.permutation(self.localities[-1] + 1)  # of each locality
            sizes = np.zeros(len(turns), np.int64)
            np.add.at(sizes, turns[self.localities], self.tokens)
            windows = np.cumsum(sizes) // _WINDOW_TOKENS  # by turn
            self._orders[epoch] = np.argsort(windows[turns[self.localities]] + draw.random(len(self)))
            while len(self._orders) > 2:  # a step may lie across two
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def upcoming(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) positions and (count,) row numbers of the next samples from a position on."""
        positions, numbers = [], []
        while count:
            epoch, within = divmod(position, len(self))
            order = self.order(epoch)[within:]
            places = np.flatnonzero(self.allowed[order])[:count]
            positions.append(position + places)
            numbers.append(order[places])
            position, count = (epoch + 1) * len(self), count - len(places)
        return np.concatenate(positions), np.concatenate(numbers)

    def numbers(self, position: int, count: int) -> np.ndarray:
        """(count,) row numbers of the next samples from a position on."""
        return self.upcoming(position, count)[1]

    def costs(self, numbers: np.ndarray) -> np.ndarray:
        """FLOPs of these rows' forward passes, nothing of their text dropped."""
        by_text = np.array([_flops_by_text(self.model, *shape) for shape in self._shapes[numbers].tolist()])
        text_tokens = self._text_tokens[numbers].astype(np.float64)
        return by_text[:, 0] + by_text[:, 1] * text_tokens + by_text[:, 2] * text_tokens**2

    def __getitem__(self, position: int) -> ScheduledSample:
        epoch, within = divmod(position, len(self))
        return ScheduledSample(self.rows.slice(self.order(epoch)[within], 1).to_pylist()[0], epoch)


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    return table[column].to_numpy().astype(np.int64)


@functools.lru_cache(maxsize=2**16)
def _flops_by_text(model: flops.Config, frames: int, height: int, width: int) -> tuple[float, ...]:
    """A sample's FLOPs as a quadratic in its text tokens, which three counts determine exactly."""
    shape = schema.latent_shape(frames, height, width)
    at_0, at_1, at_2 = (flops.forward_flops(model, shape, tokens).total for tokens in range(3))
    square = (at_2 - 2 * at_1 + at_0) / 2
    return float(at_0), at_1 - at_0 - square, square


@dataclasses.dataclass(frozen=True)
class PackedStep:
    """Which samples a step takes."""

    packs: list[list[int]]
    """positions in the stream"""
    costs: list[float]
    """FLOPs of each pack's forward pass"""
    next_position: int
    """of the stream, after the step"""

    def imbalance(self, world_size: int) -> float:
        """(max - mean) / mean of the ranks' work, packs going to them in turn."""
        return pack_balance.imbalance([sum(self.costs[rank::world_size]) for rank in range(world_size)])


def pack_step(stream: SampleStream, position: int, packs_per_step: int, tokens_per_pack: int) -> PackedStep:
    """One step's packs: the next samples of the stream, as many as fit, in packs of equal work."""
    budget = packs_per_step * tokens_per_pack
    count = -(-budget // int(stream.mean_tokens)) + 1
    while stream.tokens[stream.numbers(position, count)].sum() <= budget:
        count *= 2
    positions, numbers = stream.upcoming(position, count)
    # One more than fit.
    numbers = numbers[: int(np.searchsorted(np.cumsum(stream.tokens[numbers]), budget, side="right")) + 1]
    costs, tokens, localities = stream.costs(numbers), stream.tokens[numbers], stream.localities[numbers]
    packs = pack_balance.fill_packs(costs, tokens, localities, packs_per_step, tokens_per_pack)
    return PackedStep(
        [[int(positions[number]) for number in pack] for pack in packs],
        [float(costs[pack].sum()) for pack in packs],
        int(positions[sum(map(len, packs)) - 1]) + 1,
    )


def check_budget(rows: pa.Table, tokens_per_pack: int, stage_name: str) -> None:
    """ValueError if a sample is too large for a pack."""
    tokens = _numbers(rows, "video_tokens")
    largest = int(tokens.argmax())
    if tokens[largest] > tokens_per_pack:
        raise ValueError(
            f"stages.{stage_name}: tokens_per_pack is {tokens_per_pack}, but a sample of bucket "
            f"{rows['bucket'][largest]} has {tokens[largest]} tokens; raise it or leave that bucket out"
        )
