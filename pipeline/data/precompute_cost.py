"""Estimate of what a precompute run will cost, from a few measured samples of each bucket.

All planned samples are counted; those to measure are drawn by hash, so they are a fair sample of the clips.
"""

import dataclasses
import heapq
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.store import hashing


@dataclasses.dataclass(frozen=True)
class BucketCost:
    """One bucket: how many samples there are, and what one costs on average."""

    bucket: str
    samples: int
    measured: int
    bytes: float  # of one sample's latents
    cpu_s: float  # decode, crop, degrade: one core
    encode_s: float  # one encoder


def estimate(
    rows: Iterable[dict[str, Any]],
    measured_samples: int,
    measure: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> list[BucketCost]:
    """Costs by bucket. rows: planned samples; measure: samples -> {bucket, bytes, cpu_s, encode_s} each."""
    counts: dict[str, int] = {}
    chosen: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for row in rows:
        bucket = row["bucket"]
        counts[bucket] = counts.get(bucket, 0) + 1
        heap = chosen.setdefault(bucket, [])
        entry = (-hashing.stable_hash("measure", row["sample_id"]), row["sample_id"], row)
        if len(heap) < measured_samples:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    if not counts:
        raise ValueError("buckets: no kept clip is large and long enough for any of them")
    costs = measure([row for bucket in sorted(chosen) for _, _, row in sorted(chosen[bucket])])
    found = []
    for bucket in sorted(counts):
        own = [cost for cost in costs if cost["bucket"] == bucket]
        means = {key: sum(cost[key] for cost in own) / len(own) for key in ("bytes", "cpu_s", "encode_s")}
        found.append(BucketCost(bucket, counts[bucket], len(own), **means))
    return found


def details(costs: list[BucketCost], encoders: int, gpus_each: float, cores: float) -> dict[str, Any]:
    """Totals for the summary. cores: CPU cores of the cluster, of which the encoders' hosts need some."""
    encode_h = sum(cost.samples * cost.encode_s for cost in costs) / 3600
    cpu_h = sum(cost.samples * cost.cpu_s for cost in costs) / 3600
    return {
        "latents GB": round(sum(cost.samples * cost.bytes for cost in costs) / 1e9, 3),
        "CPU core hours (decode, crop, degrade)": round(cpu_h, 3),
        "encoder hours": round(encode_h, 3),
        "GPU hours": round(encode_h * gpus_each, 3),
        "hours with this cluster": round(max(encode_h / encoders, cpu_h / cores), 3),
        "cores that keep one encoder busy": round(cpu_h / encode_h, 1) if encode_h else 0.0,
        "buckets": [dataclasses.asdict(cost) for cost in costs],
    }


def table(costs: list[BucketCost]) -> str:
    """The buckets as a human-readable table."""
    lines = [
        f"   {'bucket':<14}{'samples':>10}{'GB':>10}{'CPU s each':>12}{'encode s each':>15}{'measured':>10}"
    ]
    for cost in costs:
        size = cost.samples * cost.bytes / 1e9
        lines.append(
            f"   {cost.bucket:<14}{cost.samples:>10}{size:>10.3f}{cost.cpu_s:>12.3f}"
            f"{cost.encode_s:>15.3f}{cost.measured:>10}"
        )
    return "\n".join(lines)
