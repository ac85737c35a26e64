"""selection/ from clips/ and scores/: which clips to use, which are twins, which are held out from training.

Needs no pixels, so it is rebuilt as a whole in seconds whenever a threshold changes.
"""

import dataclasses
import fnmatch
from collections import defaultdict
from typing import Any

import numpy as np

from pipeline import schema

MAX_DUPLICATE_DISTANCE = 3
_BANDS = 4  # of 16 bits: two hashes that differ in at most 3 bits agree in at least one band


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A clip is kept if min <= score <= max; a score that does not apply (null) rejects nothing."""

    min: float | None = None
    """Smallest score to keep."""
    max: float | None = None
    """Largest score to keep."""

    def reason(self, name: str, value: float | None) -> str | None:
        """Why this value is rejected, or None."""
        if value is None:
            return None
        if self.min is not None and value < self.min:
            return f"{name} too low: {value:.4g} < {self.min:g}"
        if self.max is not None and value > self.max:
            return f"{name} too high: {value:.4g} > {self.max:g}"
        return None


def duplicate_groups(hashes: list[str | None], distance: int) -> list[list[int]]:
    """Groups (two or more indices) whose 64-bit hashes are linked by at most `distance` differing bits.

    Equal hashes are joined first; the rest is compared only within equal 16-bit bands, so the work grows
    with the number of near hashes and not with all pairs.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, text in enumerate(hashes):
        if text is not None:
            members[int(text, 16)].append(index)
    unique = np.array(sorted(members), dtype=np.uint64)
    parent = np.arange(len(unique))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = int(parent[index])
        return index

    for band in range(_BANDS if distance > 0 else 0):
        keys = (unique >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, edges):
            for position, index in enumerate(bucket[:-1]):
                others = bucket[position + 1 :]
                near = np.bitwise_count(unique[others] ^ unique[index]) <= distance
                for other in others[near]:
                    parent[root(int(other))] = root(int(index))
    groups: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(unique):
        groups[root(index)] += members[int(value)]
    return [sorted(group) for group in groups.values() if len(group) > 1]


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


def split(
    clips: list[dict[str, Any]], groups: list[list[int]], held_out: list[str], held_out_share: float
) -> list[str]:
    """train or held_out for each clip; neither a source nor a group of twins is on both sides.

    Sources with twins in each other are one unit. A pattern without a time span holds out its unit; one
    with a span only the clips that begin in it, and their twins.
    """
    parent: dict[str, str] = {clip["source_id"]: clip["source_id"] for clip in clips}

    def root(source: str) -> str:
        while parent[source] != source:
            parent[source] = parent[parent[source]]
            source = parent[source]
        return source

    for group in groups:
        for index in group[1:]:
            parent[root(clips[index]["source_id"])] = root(clips[group[0]]["source_id"])
    units: dict[str, str] = {}  # root -> smallest source id, which does not depend on the order of joining
    for source in parent:
        units[root(source)] = min(units.get(root(source), source), source)
    whole = [pattern for pattern in held_out if "@" not in pattern]
    parts = [pattern for pattern in held_out if "@" in pattern]
    held_units = {root(c["source_id"]) for c in clips if any(_matches(c, pattern) for pattern in whole)}
    threshold = held_out_share * 2**63
    held_units |= {unit for unit, name in units.items() if schema.stable_hash("split", name) < threshold}
    held = [
        root(clip["source_id"]) in held_units or any(_matches(clip, pattern) for pattern in parts)
        for clip in clips
    ]
    for group in groups:
        if any(held[index] for index in group):
            for index in group:
                held[index] = True
    return ["held_out" if is_held else "train" for is_held in held]


def select(
    clips: list[dict[str, Any]],
    scores: dict[str, dict[str, Any]],
    thresholds: dict[str, Threshold],
    duplicate_distance: int | None,
    held_out: list[str],
    held_out_share: float,
) -> list[dict[str, Any]]:
    """Rows of selection/, one for each clip and in its order.

    clips: rows of clips/ (clip_id, uri, source_id, start_s, width, height, phash, error); scores: rows of
    scores/ by clip_id. Of a group of twins the largest clip that passes stays, others from other sources
    go; neighbours within one source are no twins of each other (a still camera makes them alike).
    """
    reasons: list[str | None] = []
    for clip in clips:
        row = scores.get(clip["clip_id"])
        reason = f"error: {clip['error']}" if clip["error"] else None
        if reason is None and row is None:
            reason = "not scored"
        elif reason is None and row is not None and row["error"]:
            reason = f"error: {row['error']}"
        for name, threshold in thresholds.items():
            if reason is None and row is not None:
                reason = threshold.reason(name, row[name])
        reasons.append(reason)
    hashes = [clip["phash"] for clip in clips]
    groups = [] if duplicate_distance is None else duplicate_groups(hashes, duplicate_distance)
    duplicate_of: list[str | None] = [None] * len(clips)
    for group in groups:
        best = min(group, key=lambda i: (reasons[i] is not None, -_pixels(clips[i]), clips[i]["clip_id"]))
        for index in group:
            if clips[index]["source_id"] != clips[best]["source_id"]:
                duplicate_of[index] = clips[best]["clip_id"]
                reasons[index] = reasons[index] or f"duplicate: of {clips[best]['clip_id']}"
    sides = split(clips, groups, held_out, held_out_share)
    return [
        {
            "clip_id": clip["clip_id"],
            "keep": reason is None,
            "reject_reason": reason,
            "duplicate_of": twin,
            "split": side,
        }
        for clip, reason, twin, side in zip(clips, reasons, duplicate_of, sides, strict=True)
    ]


def _pixels(clip: dict[str, Any]) -> int:
    return (clip["width"] or 0) * (clip["height"] or 0)
