"""Filter: measure every clip, then decide. clips/ -> scores/ (every score) -> selection/ (keep or not, why).

Scores are kept for every clip, so thresholds can change without measuring again: `--rethreshold` rebuilds
selection/ from scores/ in seconds. Near-duplicates are found by perceptual hash; no shot and no twin is
both in training and held out.
"""

import dataclasses
import tempfile
from typing import Any

import pyarrow as pa

from pipeline import schema, selection, shards, stage, storage
from pipeline.sandbox import MediaError
from pipeline.sandbox import shared as shared_sandbox
from pipeline.scores import technical
from pipeline.selection import Threshold

_SELECTION_FILE = "part-selection.parquet"
_HISTOGRAM_ABOVE = 2000


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What `jobs.filter` reads."""

    data: str
    """absolute URL of the data root that holds clips/; scores/ and selection/ are written there"""
    thresholds: dict[str, Threshold]
    """by score: sharpness, exposure, exposure_range, contrast, clipped_share, motion, static_share,
    border_share, blockiness, bits_per_pixel, niqe. A clip without a score (an image has no motion)
    passes its threshold."""
    held_out: list[str] = dataclasses.field(default_factory=list)
    """globs of file names kept from training, or shots of a file by the seconds in which they begin:
    "name.mp4@12.5-20" """
    held_out_share: float = 0.0
    """share of the other sources that is held out too, drawn by hash"""
    duplicate_bits: int | None = 3
    """clips of two sources whose 64-bit perceptual hashes differ in at most so many bits (0 to 3) are twins,
    of which the largest stays (null: do not look for twins)"""
    sampled_frames: int = 8
    """frames of full size that are measured in a clip"""
    niqe_frames: int = 2
    """how many of those NIQE gets: it takes longest"""
    clips_per_shard: int = 64
    """clips in one file of scores/: what a kill can lose"""
    decode_seconds: float = 120.0
    """a clip that takes longer to measure becomes an error row"""
    concurrency: int | None = None
    """tasks at once (null: as many as there are cores)"""
    rethreshold: bool = False
    """only rebuild selection/ from the scores that are there"""
    shared_filesystem: bool = False
    """set to true if `data` is file:// on a folder that every node mounts"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", storage.check_url(self.data, "data"))
        unknown = sorted(set(self.thresholds) - set(technical.SCORES))
        if unknown:
            raise ValueError(
                f"thresholds.{unknown[0]}: no such score; there are {', '.join(technical.SCORES)}"
            )
        most = selection.MAX_DUPLICATE_DISTANCE
        if self.duplicate_bits is not None and not 0 <= self.duplicate_bits <= most:
            raise ValueError(f"duplicate_bits: {self.duplicate_bits} is not within 0 to {most}")
        selection.check_held_out(self.held_out)

    @property
    def fingerprint(self) -> str:
        return schema.fingerprint(
            scores=list(technical.SCORES), frames=self.sampled_frames, niqe=self.niqe_frames
        )


def score_clip(clip: dict[str, Any], config: FilterConfig) -> dict[str, Any]:
    """One row of scores/."""
    row = schema.empty_row(SCORES_SCHEMA, clip_id=clip["clip_id"])
    if clip["error"] is not None:
        return {**row, "error": clip["error"]}
    sandbox = shared_sandbox(config.decode_seconds)
    try:
        with storage.local_copy(clip["uri"], tempfile.gettempdir()) as path:
            row |= sandbox.call(technical.measure_clip, clip, path, config.sampled_frames, config.niqe_frames)
        return {**row, "bits_per_pixel": technical.bits_per_pixel(clip)}
    except (MediaError, OSError) as error:
        return {**row, "error": str(error)}


SCORES_SCHEMA = schema.scores_schema(list(technical.SCORES))


def score_shard(row: dict[str, Any], config: FilterConfig) -> dict[str, Any]:
    """One task: the scores of one shard's clips."""
    table_schema = schema.with_fingerprint(SCORES_SCHEMA, config.fingerprint)
    folder = storage.join(config.data, schema.SCORES)
    return shards.make_shard(
        folder, row["shard"], table_schema, lambda clips: [score_clip(clip, config) for clip in clips]
    )


def rebuild_selection(config: FilterConfig, summary: stage.Summary) -> None:
    """Write selection/ anew from clips/ and scores/, and count."""
    clips = read_clips(config.data)
    table = storage.read_folder(storage.join(config.data, schema.SCORES))
    scores = {} if table is None else {row["clip_id"]: row for row in table.to_pylist()}
    rows = selection.select(
        clips,
        scores,
        config.thresholds,
        config.duplicate_bits,
        config.held_out,
        config.held_out_share,
    )
    chosen = pa.Table.from_pylist(rows, schema=schema.SELECTION_SCHEMA)
    url = storage.join(config.data, schema.SELECTION, _SELECTION_FILE)
    storage.write_table(url, [chosen], schema.SELECTION_SCHEMA)
    kept = [row for row in rows if row["keep"]]
    summary.rows_in, summary.rows_kept = len(clips), len(kept)
    summary.errors = sum(1 for clip in clips if clip["error"] is not None)
    summary.rejected = shards.count_reasons([row["reject_reason"] for row in rows])
    summary.details |= {
        "held out": sum(row["split"] == "held_out" for row in kept),
        "clips without scores yet": sum(clip["clip_id"] not in scores for clip in clips),
    }
    if len(scores) <= _HISTOGRAM_ABOVE:
        values = {
            name: [row[name] for row in scores.values() if row[name] is not None] for name in technical.SCORES
        }
        summary.details["scores"] = values


def read_clips(data_url: str) -> list[dict[str, Any]]:
    table = storage.read_folder(storage.join(data_url, schema.CLIPS))
    if table is None:
        raise ValueError(f"data: {data_url} has no clips/; run ingest first")
    return table.to_pylist()


def run(config: FilterConfig) -> stage.Summary:
    """Score what has no scores yet, then decide for all."""
    clips = read_clips(config.data)
    folder = storage.join(config.data, schema.SCORES)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.data, config.shared_filesystem, "data")
        if not config.rethreshold:
            pending = shards.plan(folder, clips, "clip_id", config.fingerprint, config.clips_per_shard)
            reports = stage.run_shards(
                pending, score_shard, "filter: score", config.concurrency, constructor_args=(config,)
            )
            summary.bytes = sum(report["bytes"] for report in reports)
            summary.already_done = len(clips) - sum(len(shard.rows) for shard in pending)
        rebuild_selection(config, summary)

    return stage.run_stage("filter", folder, work)
