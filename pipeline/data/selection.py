"""Decides which clips to use, which are duplicates and which are held out: clips/ + scores/ -> selection/.

Deciding needs no pixels, so selection/ is rebuilt as a whole in seconds whenever a threshold changes. Clips
are held as arrays of some 70 bytes each, never as rows, so that millions fit into a driver's memory:
`Clips.add` takes clips/ and `Clips.judge` takes scores/ file by file, `decide` looks at all clips, and `rows`
gives each file's decisions.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.duplicates import components, duplicate_labels
from pipeline.store import hashing
from pipeline.store.id_index import Lookup, id_array

_PASSES, _ERROR, _NOT_SCORED, _LACKS = -1, -2, -3, -4  # instead of the number of the threshold that rejects


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A clip is kept if min <= score <= max; a score that does not apply (null) rejects nothing."""

    min: float | None = None
    """Smallest score with which a clip is kept; null sets no lower limit."""
    max: float | None = None
    """Largest score with which a clip is kept; null sets no upper limit."""

    def reason(self, name: str, value: float | None) -> str | None:
        """Why this value is rejected, or None."""
        if value is None:
            return None
        if self.min is not None and value < self.min:
            return f"{name} too low: {value:.4g} < {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{name} too high: {value:.4g} > {self.max:g}"
        return None


def _matches(clip: dict[str, Any], pattern: str) -> bool:
    """Whether a held_out pattern names this clip: a glob of its URI's end, with @from-to seconds or not."""
    glob, _, span = pattern.partition("@")
    if not fnmatch.fnmatchcase(clip["uri"], "*/" + glob.lstrip("/")):
        return False
    if not span:
        return True
    start_s, _, end_s = span.partition("-")
    return clip["start_s"] is not None and float(start_s) <= clip["start_s"] < float(end_s)


def check_held_out(patterns: list[str]) -> None:
    """ValueError for a pattern whose time span cannot be read."""
    for pattern in patterns:
        _, _, span = pattern.partition("@")
        try:
            if span:
                start_s, end_s = map(float, span.split("-"))
                if start_s >= end_s:
                    raise ValueError
        except ValueError:
            raise ValueError(f"held_out: {pattern!r}: write name.mp4 or name.mp4@12.5-20 (seconds)") from None


class Clips:
    """The facts about each clip on which decisions depend, in the order in which the clips are added."""

    def __init__(
        self, thresholds: dict[str, Threshold], held_out: list[str], scorers: Mapping[str, Sequence[str]]
    ) -> None:
        """scorers: the columns of each learned scorer that clips shall have, by what makes them."""
        self.thresholds = thresholds
        self._scorers = dict(scorers)
        self._names = list(thresholds)
        self._whole = [pattern for pattern in held_out if "@" not in pattern]
        self._parts = [pattern for pattern in held_out if "@" in pattern]
        self._files: list[dict[str, np.ndarray]] = []
        self.score_errors: dict[int, str] = {}

    def add(self, clips: pa.Table) -> None:
        """Rows of clips/ (clip_id, uri, source_id, start_s, width, height, phash, error)."""
        uris, starts = clips["uri"].to_pylist(), clips["start_s"].to_pylist()
        named = [{"uri": uri, "start_s": start} for uri, start in zip(uris, starts, strict=True)]
        hashes = clips["phash"].to_pylist()
        sides = [clips[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height")]
        broken = clips["error"].is_valid().to_numpy()
        self._files.append(
            {
                "ids": id_array(clips["clip_id"].to_pylist()),
                "sources": id_array(clips["source_id"].to_pylist()),
                "hashes": np.array([int(text, 16) if text else 0 for text in hashes], np.uint64),
                "hashed": np.array([text is not None for text in hashes], bool),
                "pixels": sides[0] * sides[1],
                "held_whole": np.array([any(_matches(c, p) for p in self._whole) for c in named], bool),
                "held_part": np.array([any(_matches(c, p) for p in self._parts) for c in named], bool),
                "cause": np.where(broken, _ERROR, _NOT_SCORED).astype(np.int16),
            }
        )

    def close(self) -> None:
        """After the last `add`."""
        assert self._files, "no clips"
        joined = {name: np.concatenate([file[name] for file in self._files]) for name in self._files[0]}
        self._files = []
        self.ids, self.sources = joined["ids"], joined["sources"]
        self.hashes, self.hashed, self.pixels = joined["hashes"], joined["hashed"], joined["pixels"]
        self.held_whole, self.held_part = joined["held_whole"], joined["held_part"]
        self.cause = joined["cause"]
        self.value = np.zeros(len(self.ids))  # the score that rejects
        self._lookup = Lookup(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def judge(self, scores: pa.Table) -> None:
        """Check rows of scores/ (clip_id, the scores with a threshold, error) against the thresholds."""
        places = self._lookup.find(id_array(scores["clip_id"].to_pylist()))
        self._decide(scores, places, (places >= 0) & (self.cause[places] != _ERROR))

    def judge_learned(self, scores: pa.Table, made_by: Sequence[str]) -> None:
        """Check rows of learned_scores/ against the thresholds; after the last `judge`.

        made_by: the scorers that made these rows. Earlier rejections stay: a network only judges clips that
        passed so far.
        """
        places = self._lookup.find(id_array(scores["clip_id"].to_pylist()))
        known = places >= 0
        for bit, scorer in enumerate(self._scorers):
            if scorer in made_by:
                self._found[places[known]] |= np.uint8(1 << bit)
        ours = {column for scorer in made_by for column in self._scorers.get(scorer, ())}
        table = scores.select(["clip_id", *[name for name in self._names if name in ours], "error"])
        self._decide(table, places, known & (self.cause[places] == _PASSES))

    def _decide(self, scores: pa.Table, places: np.ndarray, open_: np.ndarray) -> None:
        """Set the cause of the open ones among the clips at these places, by the scores in the table."""
        cause, value = np.full(len(places), _PASSES, np.int16), np.zeros(len(places))
        for number, name in reversed(list(enumerate(self._names))):  # the first that rejects is the reason
            if name not in scores.column_names:
                continue
            found = scores[name].cast(pa.float64()).fill_null(float("nan")).to_numpy()
            threshold = self.thresholds[name]
            low = np.zeros(len(found), bool) if threshold.min is None else found < threshold.min
            high = np.zeros(len(found), bool) if threshold.max is None else found > threshold.max
            cause[low | high] = number
            value[low | high] = found[low | high]
        for row, text in enumerate(scores["error"].to_pylist()):
            if text is not None and open_[row]:
                self.score_errors[int(places[row])] = text
                cause[row] = _ERROR
        self.cause[places[open_]], self.value[places[open_]] = cause[open_], value[open_]

    def ask(self) -> None:
        """After the last `judge`: the clips that pass will get learned scores."""
        self._asked = self.cause == _PASSES
        self._found = np.zeros(len(self.ids), np.uint8)

    @property
    def lacking(self) -> np.ndarray:
        """Bits of the scorers (in their given order) that each clip still lacks, `(N,)` uint8."""
        every = np.uint8((1 << len(self._scorers)) - 1)
        return np.where(self._asked, ~self._found & every, np.uint8(0))

    def settle(self) -> None:
        """After the last `judge_learned`: clips that still lack a score with a threshold are not kept yet."""
        with_threshold = sum(
            1 << bit for bit, columns in enumerate(self._scorers.values()) if set(columns) & set(self._names)
        )
        waits = (self.lacking & np.uint8(with_threshold)) != 0
        self.cause[waits & (self.cause == _PASSES)] = _LACKS

    @property
    def not_scored(self) -> int:
        return int((self.cause == _NOT_SCORED).sum())

    def reason(self, index: int, clip_error: str | None) -> str | None:
        """Why a clip is rejected, regardless of its duplicates; None if it is not."""
        cause = int(self.cause[index])
        if cause >= 0:
            name = self._names[cause]
            return self.thresholds[name].reason(name, float(self.value[index]))
        if cause == _ERROR:
            return f"error: {clip_error or self.score_errors[index]}"
        return {_NOT_SCORED: "not scored", _LACKS: "learned scores not computed yet"}.get(cause)


@dataclasses.dataclass(frozen=True)
class Decision:
    """The decisions that need all clips at once."""

    twin: np.ndarray  # (N,) index of the clip that this one is a duplicate of, or -1
    held_out: np.ndarray  # (N,) bool


def decide(clips: Clips, duplicate_distance: int | None, held_out_share: float) -> Decision:
    """Find the duplicates and the split of all clips.

    Of a group of duplicates the largest clip that passes is kept and those from other sources are rejected;
    neighbours within one source are not duplicates of each other (a still camera makes them alike).
    """
    labels = np.arange(len(clips), dtype=np.int32)
    if duplicate_distance is not None and clips.hashed.any():
        hashed = np.flatnonzero(clips.hashed)
        # A group goes by its first clip's number.
        groups = duplicate_labels(clips.hashes[hashed], duplicate_distance)
        firsts = np.full(int(groups.max()) + 1, len(clips), np.int32)
        np.minimum.at(firsts, groups, hashed.astype(np.int32))
        labels[hashed] = firsts[groups]
    order = np.lexsort((clips.ids, -clips.pixels, clips.cause != _PASSES, labels))
    begins = np.flatnonzero(np.diff(labels[order], prepend=-1))
    best = np.zeros(len(clips), np.int32)
    best[labels[order][begins]] = order[begins]
    best = best[labels]
    sources, source = np.unique(clips.sources, return_inverse=True)
    source = source.astype(np.int32)
    twin = np.where(source != source[best], best, -1)
    return Decision(twin, split(clips, labels, sources, source, held_out_share))


def split(
    clips: Clips, labels: np.ndarray, sources: np.ndarray, source: np.ndarray, held_out_share: float
) -> np.ndarray:
    """Decide whether each clip is held out; no source and no group of duplicates is on both sides.

    labels: the first clip of each clip's group of duplicates. sources: sorted ids; source: the index of each
    clip's source. Sources that contain duplicates of each other are one unit. A pattern without a time span
    holds out its unit; one with a span holds out only the clips that begin in it, and their duplicates.
    """
    linked = np.flatnonzero(labels != np.arange(len(labels)))
    pairs = np.stack([source[linked], source[labels[linked]]])
    units = components(len(sources), iter([pairs]))
    held_units = np.zeros(len(sources), bool)
    held_units[units[source[clips.held_whole]]] = True
    if held_out_share > 0:
        threshold = held_out_share * 2**63
        # A unit's name is its smallest source, which does not depend on the order of joining.
        numbers, firsts = np.unique(units, return_index=True)
        for unit, first in zip(numbers, firsts, strict=True):
            if hashing.stable_hash("split", sources[first].decode()) < threshold:
                held_units[unit] = True
    held = held_units[units[source]] | clips.held_part
    held_groups = np.zeros(len(labels), bool)
    held_groups[labels[held]] = True
    return held | held_groups[labels]


def rows(clips: Clips, decision: Decision, first: int, table: pa.Table) -> list[dict[str, Any]]:
    """Rows of selection/ for one file of clips/ (clip_id, error); `first` is the number of its first clip."""
    made = []
    ids, errors = table["clip_id"].to_pylist(), table["error"].to_pylist()
    for index, (clip_id, error) in enumerate(zip(ids, errors, strict=True), start=first):
        reason, twin_of = clips.reason(index, error), None
        if decision.twin[index] >= 0:
            twin_of = clips.ids[decision.twin[index]].decode()
            reason = reason or f"duplicate: of {twin_of}"
        made.append(
            {
                "clip_id": clip_id,
                "keep": reason is None,
                "reject_reason": reason,
                "duplicate_of": twin_of,
                "split": "held_out" if decision.held_out[index] else "train",
            }
        )
    return made
