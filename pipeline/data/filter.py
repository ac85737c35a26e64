"""Filter: score every clip, then decide which to keep. clips/ -> scores/, learned_scores/ -> selection/.

Scores that need no weights are measured on every clip, scores by networks only on clips that pass those. All
scores are stored, so thresholds can change without measuring again: `--rethreshold` rebuilds selection/ from
them in seconds. Near-duplicates are found by perceptual hash; no shot and no duplicate is both in training
and held out.
"""

import dataclasses
import functools
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data import duplicates, filter_report, selection
from pipeline.data.scorers import scorer_config, technical
from pipeline.data.scorers.scorer_config import ScorersConfig
from pipeline.data.selection import Threshold
from pipeline.data.upgrade import check_upgraded
from pipeline.runtime import prometheus, stage, work_plan
from pipeline.store import delta_tables, hashing, schema, source_cache, storage
from pipeline.store.urls import Url, check_urls
from pipeline.video.sandbox import MediaError
from pipeline.video.sandbox import shared as shared_sandbox

_PAGE = "scores.html"
_DECIDING_FIELDS = ("clip_id", "uri", "source_id", "start_s", "width", "height", "phash", "error")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What `jobs.filter` reads."""

    data: Url
    """Absolute URL of the data root that holds clips/; scores/, learned_scores/ and selection/ are written
    there."""
    thresholds: dict[str, Threshold]
    """Limits by score. Without weights there are sharpness, exposure, exposure_range, contrast,
    clipped_share, motion, static_share, border_share, blockiness, bits_per_pixel and niqe; networks give
    aesthetic, clip_iqa, fast_vqa, musiq, dover_technical, dover_aesthetic and dover_overall. A clip without a
    score (an image has no motion) passes that score's limits."""
    scorers: ScorersConfig = dataclasses.field(default_factory=ScorersConfig)
    """Networks that score the clips which pass the weight-free thresholds; by default there are none."""
    held_out: list[str] = dataclasses.field(default_factory=list)
    """Clips kept from training: globs of file names, or single shots of a file by the range of seconds in
    which they begin, as in "name.mp4@12.5-20"."""
    held_out_share: float = 0.0
    """Share of all other sources, from 0 to 1, that is held out as well; they are chosen by a hash of their
    id."""
    duplicate_bits: int | None = 3
    """Clips of two sources whose 64-bit perceptual hashes differ in at most this many bits (0 to 3) are
    duplicates, of which only the largest is kept; null looks for no duplicates."""
    sampled_frames: int = 8
    """Frames of each clip that are measured at full size; motion is measured between each of them and the
    frame after it."""
    niqe_frames: int = 2
    """Number of the sampled frames on which NIQE, the slowest score, is measured."""
    clips_per_shard: int = 64
    """Clips in one file of scores/; work on an unfinished file is lost when a task is killed."""
    decode_seconds: float = 120.0
    """Time limit in seconds for measuring one clip; a clip that exceeds it becomes an error row."""
    concurrency: int | None = None
    """Largest number of tasks that run at once; null runs as many as the cluster has cores."""
    rethreshold: bool = False
    """Whether to measure nothing and only rebuild selection/ from the scores that exist, which takes
    seconds."""
    shared_filesystem: bool = False
    """Set this to true if `data` is a file:// URL of a folder that every node mounts; on several nodes a
    local folder would be incomplete on each."""

    def __post_init__(self) -> None:
        check_urls(self)
        learned = {column: name for name, columns in schema.LEARNED_SCORES.items() for column in columns}
        for score in sorted(set(self.thresholds) - set(technical.SCORES)):
            if score not in learned:
                known = ", ".join([*technical.SCORES, *learned])
                raise ValueError(f"thresholds.{score}: no such score; there are {known}")
            if learned[score] not in self.scorers.names:
                raise ValueError(f"thresholds.{score}: set scorers.{learned[score]} to its weights")
        most = duplicates.MAX_DUPLICATE_DISTANCE
        if self.duplicate_bits is not None and not 0 <= self.duplicate_bits <= most:
            raise ValueError(f"duplicate_bits: {self.duplicate_bits} is not within 0 to {most}")
        selection.check_held_out(self.held_out)

    @property
    def fingerprint(self) -> str:
        return hashing.fingerprint(
            scores=list(technical.SCORES),
            version=technical.VERSION,
            frames=self.sampled_frames,
            niqe=self.niqe_frames,
        )

    @property
    def table_schema(self) -> pa.Schema:
        """Of scores/ that are measured with these settings."""
        return schema.with_fingerprint(SCORES_SCHEMA, self.fingerprint)

    @property
    def decided_by(self) -> dict[str, str]:
        """The settings that a selection depends on, for its history."""
        names = ("thresholds", "held_out", "held_out_share", "duplicate_bits")
        settings = dataclasses.asdict(self)
        return {name: json.dumps(settings[name]) for name in names}


_GAP_S = 5.0  # over a longer gap between two clips the decoder seeks instead of decoding


def score_clips(clips: list[dict[str, Any]], config: FilterConfig) -> list[dict[str, Any]]:
    """Rows of scores/; consecutive clips of one source share one decode of it."""
    found: dict[str, dict[str, Any]] = {}
    for run in _runs([clip for clip in clips if clip["error"] is None]):
        made = _score_run(run, config)
        if len(made) < len(run):  # the others one by one, so that an error concerns one clip only
            made += [row for clip in run[len(made) :] for row in _score_run([clip], config)]
        found |= {clip["clip_id"]: row for clip, row in zip(run, made, strict=True)}
    rows = []
    for clip in clips:
        row = found.get(clip["clip_id"], {"error": clip["error"]})
        rows.append(schema.empty_row(SCORES_SCHEMA, clip_id=clip["clip_id"], **row))
    return rows


def _runs(clips: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the clips, in order of source and time, into runs that can be decoded in one pass."""
    runs: list[list[dict[str, Any]]] = []
    for clip in sorted(clips, key=lambda clip: (clip["uri"], clip["start_pts"] or 0, clip["clip_id"])):
        before = runs[-1][-1] if runs else clip
        if runs and before["uri"] == clip["uri"] and None not in (before["end_pts"], clip["start_pts"]):
            gap_s = (clip["start_pts"] - before["end_pts"]) * Fraction(clip["time_base"])
            if clip["media"] == "video" and 0 <= gap_s <= _GAP_S:
                runs[-1].append(clip)
                continue
        runs.append([clip])
    return runs


def _score_run(clips: list[dict[str, Any]], config: FilterConfig) -> list[dict[str, Any]]:
    """Scores, or the error, of each clip of a run; fewer than there are if a run of several fails."""
    sandbox, made = shared_sandbox(config.decode_seconds), list[dict[str, Any]]()
    frames = config.sampled_frames, config.niqe_frames
    try:
        with source_cache.local_file(clips[0]["uri"], clips[0]["source_etag"]) as path:
            # zip exhausts its first argument, the stream; otherwise the sandbox would give its child up.
            for row, clip in zip(
                sandbox.stream(technical.measure_clips, clips, path, *frames), clips, strict=False
            ):
                made.append({**row, "bits_per_pixel": technical.bits_per_pixel(clip)})
    except (MediaError, OSError) as error:
        if len(clips) == 1:
            made.append({"error": str(error)})
    return made


SCORES_SCHEMA = schema.scores_schema(list(technical.SCORES))


def score_shard(row: dict[str, Any], config: FilterConfig) -> dict[str, Any]:
    """One task: the scores of one shard's clips."""
    folder = storage.join(config.data, schema.SCORES)
    return work_plan.make_shard(
        folder, row["shard"], config.table_schema, lambda clips: score_clips(clips, config)
    )


def read_decided(
    config: FilterConfig, made_by: list[str], clips_table: delta_tables.Table
) -> selection.Clips:
    """Read what deciding needs about the clips in this version of clips/, with every score there is.

    made_by: the learned scorers of this config, as "name-<fingerprint>".
    """
    columns = {scorer: scorer_config.columns_of(scorer) for scorer in made_by}
    clips = selection.Clips(config.thresholds, config.held_out, columns)
    for table in clips_table.iterate(list(_DECIDING_FIELDS)):
        clips.add(table)
    clips.close()
    weight_free = [name for name in config.thresholds if name in technical.SCORES]
    for table in delta_tables.iterate(
        storage.join(config.data, schema.SCORES), ["clip_id", *weight_free, "error"]
    ):
        clips.judge(table)
    clips.ask()
    for scores, found in learned_tables(config.data, made_by):
        for table in scores.iterate():
            clips.judge_learned(table, found)
    return clips


def learned_tables(data_url: str, made_by: list[str]) -> Iterator[tuple[delta_tables.Table, list[str]]]:
    """(table, what made its rows) of learned_scores/, of those that any of these scorers made."""
    root = storage.join(data_url, schema.LEARNED)
    for name in storage.folders_in(root) if made_by else ():
        found = scorer_config.makers(name)
        table = delta_tables.open_table(storage.join(root, name)) if set(found) & set(made_by) else None
        if table is not None:
            yield table, found


def score_learned(
    config: FilterConfig, made_by: list[str], clips_table: delta_tables.Table
) -> list[dict[str, Any]]:
    """Compute the learned scores that passing clips still lack; returns the shards' reports."""
    lacking = read_decided(config, made_by, clips_table).lacking
    reports: list[dict[str, Any]] = []
    if not lacking.any():
        return reports
    from pipeline.data.scorers import (
        learned,  # the networks' libraries, which all other filtering does without
    )

    for bits in map(int, np.unique(lacking[lacking > 0])):
        wanted = [scorer for bit, scorer in enumerate(made_by) if bits >> bit & 1]
        folder = storage.join(config.data, schema.LEARNED, scorer_config.folder_of(wanted))
        fingerprint = hashing.fingerprint(scorers=sorted(wanted))
        rows = (row for row, own in zip(_rows_of(clips_table), lacking, strict=True) if own == bits)
        size = config.scorers.clips_per_shard
        planned = work_plan.plan(folder, rows, "clip_id", fingerprint, size, near=itemgetter("source_id"))
        reports += stage.run_shards(
            planned.pending,
            learned.ScoreShard,
            f"filter: {', '.join(map(scorer_config.name_of, wanted))}",
            functools.partial(
                work_plan.commit, folder, schema.with_fingerprint(schema.LEARNED_SCHEMA, fingerprint)
            ),
            config.scorers.actors,
            constructor_args=(config.scorers, wanted, folder, fingerprint, config.decode_seconds),
            num_cpus=config.scorers.actor_cpus,
            num_gpus=config.scorers.actor_gpus,
        )
    return reports


def _rows_of(table: delta_tables.Table) -> Iterator[dict[str, Any]]:
    for part in table.iterate():
        yield from part.to_pylist()


def rebuild_selection(config: FilterConfig, made_by: list[str], summary: stage.Summary) -> None:
    """Rewrite selection/ from clips/ and the existing scores, and count."""
    clips_table = open_clips(config.data)  # opened once: each pass must see the same rows in the same order
    clips = read_decided(config, made_by, clips_table)
    clips.settle()
    decision = selection.decide(clips, config.duplicate_bits, config.held_out_share)
    reasons: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        first = 0
        for table in clips_table.iterate(["clip_id", "error"]):
            rows = selection.rows(clips, decision, first, table)
            first += len(rows)
            reasons.update(work_plan.count_reasons([row["reject_reason"] for row in rows]))
            summary.rows_kept += sum(row["keep"] for row in rows)
            held_out = sum(row["keep"] and row["split"] == "held_out" for row in rows)
            summary.details["held out"] = summary.details.get("held out", 0) + held_out
            summary.errors += sum(error is not None for error in table["error"].to_pylist())
            yield pa.Table.from_pylist(rows, schema=schema.SELECTION_SCHEMA)

    url, name = storage.join(config.data, schema.SELECTION), f"part-{uuid.uuid4().hex}.parquet"
    file = delta_tables.write_file(url, name, work_plan.joined(tables()), schema.SELECTION_SCHEMA)
    delta_tables.replace(url, schema.SELECTION_SCHEMA, [file], config.decided_by)
    summary.rows_in = len(clips)
    summary.rejected = dict(reasons.most_common())
    summary.details["clips without scores yet"] = clips.not_scored
    if config.scorers.names:
        summary.details["clips without learned scores yet"] = int((clips.lacking > 0).sum())
    prometheus.count_rejected(summary.rejected)
    spreads = read_spreads(config, made_by)
    shown = filter_report.page(spreads, summary.rejected, len(clips), summary.rows_kept)
    page_url = storage.join(config.data, schema.SELECTION, _PAGE)
    storage.write_bytes(page_url, shown.encode())
    summary.details["histograms"] = page_url


def read_spreads(config: FilterConfig, made_by: list[str]) -> dict[str, filter_report.Spread]:
    """The values of every score over all clips, with its threshold."""
    meanings = technical.SCORES | schema.LEARNED_MEANINGS
    spreads = {
        name: filter_report.Spread(meaning, config.thresholds.get(name, Threshold()))
        for name, meaning in meanings.items()
    }
    weight_free = list(technical.SCORES)
    scores = delta_tables.open_table(storage.join(config.data, schema.SCORES))
    parts = [] if scores is None else [(scores, weight_free)]
    parts += [
        (table, [column for one in found if one in made_by for column in scorer_config.columns_of(one)])
        for table, found in learned_tables(config.data, made_by)
    ]
    for scored, columns in parts:
        for table in scored.iterate(columns):
            for name in columns:
                spreads[name].add(table[name].drop_null().to_numpy())
    return spreads


def open_clips(data_url: str) -> delta_tables.Table:
    """clips/ as it is now; ValueError if there is none."""
    check_upgraded(data_url)
    table = delta_tables.open_table(storage.join(data_url, schema.CLIPS))
    if table is None:
        raise ValueError(f"data: {data_url} has no clips/; run ingest first")
    return table


def run(config: FilterConfig) -> stage.Summary:
    """Score the clips that have no scores yet, then decide for all."""
    folder = storage.join(config.data, schema.SCORES)
    clips_table = open_clips(config.data)
    made_by = list(scorer_config.fingerprints(config.scorers).values())

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.data, config.shared_filesystem, "data")
        if not config.rethreshold:
            planned = work_plan.plan(
                folder,
                _rows_of(clips_table),
                "clip_id",
                config.fingerprint,
                config.clips_per_shard,
                near=itemgetter("source_id"),
            )
            reports = stage.run_shards(
                planned.pending,
                score_shard,
                "filter: score",
                functools.partial(work_plan.commit, folder, config.table_schema),
                config.concurrency,
                constructor_args=(config,),
            )
            summary.already_done = planned.already_done
            reports += score_learned(config, made_by, clips_table) if made_by else []
            summary.bytes = sum(report["bytes"] for report in reports)
        rebuild_selection(config, made_by, summary)

    return stage.run_stage("filter", folder, work)
