"""Which samples a training step sees: an endless order, packed step by step into packs of equal work.

Both are functions of (seed, epoch) and of the number of packs a step; the state is one counter, samples drawn
so far. So a resumed run, on whatever number of workers, sees the same samples in the same steps.
"""

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import flops
from pipeline.store import hashing, schema
from pipeline.training.samples import pack_balance

_WINDOW_TOKENS = 2**21  # of 256 bytes each


def of_files(index: pa.Table, files: list[str]) -> pa.Table:
    """The rows that lie in these files of latents/; ValueError if a file is gone."""
    gone = sorted(set(files) - set(index["file"].unique().to_pylist()))
    if gone:
        raise ValueError(
            f"data: latents/ lacks {len(gone)} files that this stage began with ({gone[0]}, ...); put them "
            "back, or give another output to begin anew"
        )
    return index.filter(pc.is_in(index["file"], pa.array(files)))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One sample of the endless stream: a row of the index in one epoch."""

    row: dict[str, Any]
    epoch: int

    @property
    def tokens(self) -> int:
        return self.row["video_tokens"]


class SampleStream:
    """The endless order of samples: each epoch is an order by (seed, epoch), the next follows on.

    Row groups are shuffled, then samples within windows of some 512 MB of latents, which a reader keeps: so
    it reads each row group about once. A small data set is one window. (Row groups are random samples of all
    the data already, since shards are assigned by hash.)
    """

    def __init__(self, rows: pa.Table, seed: int, model: flops.Config) -> None:
        """rows: of the index, at least one. model: the network whose operations are a sample's cost."""
        assert rows.num_rows
        self.rows = rows.sort_by([(key, "ascending") for key in ("file", "row_group", "row")])
        self.seed, self.model = seed, model
        self.tokens = _numbers(self.rows, "video_tokens")
        self.mean_tokens = float(self.tokens.mean())
        files = self.rows["file"].combine_chunks().dictionary_encode().indices.to_numpy()
        edges = (np.diff(files) != 0) | (np.diff(_numbers(self.rows, "row_group")) != 0)
        self.row_groups = np.concatenate([[0], np.cumsum(edges)])
        """(rows,) number of the row group that each row lies in."""
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
            turns = draw.permutation(self.row_groups[-1] + 1)  # of each row group
            sizes = np.zeros(len(turns), np.int64)
            np.add.at(sizes, turns[self.row_groups], self.tokens)
            windows = np.cumsum(sizes) // _WINDOW_TOKENS  # by turn
            self._orders[epoch] = np.argsort(windows[turns[self.row_groups]] + draw.random(len(self)))
            while len(self._orders) > 2:  # a step may lie across two
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def numbers(self, position: int, count: int) -> np.ndarray:
        """(count,) row numbers of the samples from a position on."""
        parts = []
        while count:
            epoch, within = divmod(position, len(self))
            parts.append(self.order(epoch)[within : within + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def costs(self, numbers: np.ndarray) -> np.ndarray:
        """Counted operations of these rows' forward passes, nothing of their text dropped."""
        found = np.array([_cost_by_text(self.model, *shape) for shape in self._shapes[numbers].tolist()])
        text_tokens = self._text_tokens[numbers].astype(np.float64)
        return found[:, 0] + found[:, 1] * text_tokens + found[:, 2] * text_tokens**2

    def __getitem__(self, position: int) -> Drawn:
        epoch, within = divmod(position, len(self))
        return Drawn(self.rows.slice(self.order(epoch)[within], 1).to_pylist()[0], epoch)


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    return table[column].to_numpy().astype(np.int64)


@functools.lru_cache(maxsize=2**16)
def _cost_by_text(model: flops.Config, frames: int, height: int, width: int) -> tuple[float, ...]:
    """A sample's operations as a polynomial of its text tokens, of degree 2: three counts tell it exactly."""
    shape = schema.latent_shape(frames, height, width)
    none, one, two = (flops.forward_flops(model, shape, n).total for n in (0, 1, 2))
    square = (two - 2 * one + none) / 2
    return float(none), one - none - square, square


@dataclasses.dataclass(frozen=True)
class PackedStep:
    """Which samples a step takes."""

    packs: list[list[int]]
    """positions in the stream"""
    costs: list[float]
    """counted operations of each pack's forward pass"""
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
    numbers = stream.numbers(position, count)
    # One more than fit.
    numbers = numbers[: int(np.searchsorted(np.cumsum(stream.tokens[numbers]), budget, side="right")) + 1]
    costs, tokens, places = stream.costs(numbers), stream.tokens[numbers], stream.row_groups[numbers]
    packs = pack_balance.fill_packs(costs, tokens, places, packs_per_step, tokens_per_pack)
    return PackedStep(
        [[position + one for one in pack] for pack in packs],
        [float(costs[pack].sum()) for pack in packs],
        position + sum(map(len, packs)),
    )


def check_budget(rows: pa.Table, tokens_per_pack: int, stage_name: str) -> None:
    tokens = _numbers(rows, "video_tokens")
    largest = int(tokens.argmax())
    if tokens[largest] > tokens_per_pack:
        raise ValueError(
            f"stages.{stage_name}: tokens_per_pack is {tokens_per_pack}, but a sample of bucket "
            f"{rows['bucket'][largest]} has {tokens[largest]} tokens; raise it or leave that bucket out"
        )
