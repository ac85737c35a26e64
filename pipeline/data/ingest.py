"""Ingest: list videos and images, probe them, cut them into clips, write clips/.

One planned row is one source; one task makes the clips of a few sources. A file that cannot be read becomes
one row with `error` set, so that every listed file is in the table. A long source is scanned in time spans,
one task each, whose results are kept until its clips are written.
"""

import contextlib
import dataclasses
import functools
import io
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.data import discovery, shots
from pipeline.data.upgrade import check_upgraded
from pipeline.runtime import stage, work_plan
from pipeline.store import delta_tables, hashing, schema, source_cache, storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding
from pipeline.video.sandbox import MediaError, Sandbox
from pipeline.video.sandbox import shared as shared_sandbox

_SPANS = "_spans"  # below clips/: scans of sources that are not in the table yet


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """What `jobs.ingest` reads."""

    input: Url
    """Folder with videos and images (file:///..., an absolute path or s3://bucket/prefix), searched with its
    subfolders. A caption may lie beside a file as name.txt, or as name.json with the keys caption, license
    and dataset."""
    output: Url
    """Absolute URL of the data root; the table of clips is written to clips/ below it."""
    manifest: Url | None = None
    """CSV, TSV or Parquet file that lists the files to take, by their paths below `input`; null searches the
    folder instead. Columns are the path (path, video, file_name and others, or WebVid's videoid and page_dir)
    and optionally the caption (caption, text or name), license, dataset and bytes. With a manifest, caption
    files beside the media are ignored."""
    exclude: list[str] = dataclasses.field(default_factory=list)
    """Globs of paths below `input` to leave out, such as "raw/*"."""
    dataset: str = ""
    """Name of the data set, stored with every clip whose caption file or manifest row does not give one."""
    license: str = ""
    """Licence of the files, stored with every clip whose caption file or manifest row does not give one."""
    max_clip_frames: int = 121
    """Largest number of frames of a clip; longer shots are cut into clips of this length, which is best of
    the form 4n+1, as the model takes frames."""
    min_clip_frames: int = 9
    """Smallest number of frames of a clip; shorter shots and shorter ends of cut shots are left out, unless
    the file has nothing longer."""
    segment_s: float = 300.0
    """Length in seconds of the parts in which longer videos are scanned, each by its own task; it does not
    change the clips."""
    cut_ratio: float = 3.0
    """A frame begins a new shot if its difference to the frame before is at least this many times the average
    difference around it."""
    cut_difference: float = 15.0
    """Smallest difference between two frames that counts as a cut: the mean difference of hue, saturation and
    brightness, from 0 to 255."""
    fade_level: float = 12.0
    """Mean brightness, from 0 to 255, below which a shot ends; this finds fades through black."""
    max_pixels: int = 8192 * 4608
    """Largest number of pixels in a frame; files with more are not decoded and become error rows."""
    time_limit_s: float = 30.0
    """Time in seconds that a decoder may take for 32 frames before it is stopped and its file becomes an
    error row."""
    memory_limit_gib: float = 6.0
    """Largest address space of each decoding process, in GiB; a file that needs more becomes an error row."""
    sources_per_shard: int = 8
    """Source files in each task and output file: a smaller number loses less work when a task is killed, a
    larger one makes fewer files."""
    concurrency: int | None = None
    """Largest number of tasks that run at once; null runs as many as the cluster has cores."""
    shared_filesystem: bool = False
    """Set this to true if file:// URLs name the same folders on every node of the cluster."""

    def __post_init__(self) -> None:
        check_urls(self)
        if f"{self.input}/".startswith(f"{self.output}/"):
            raise ValueError(f"input: {self.input} lies within the output, {self.output}")
        if self.manifest is not None:
            discovery.check_manifest(self.manifest)
        if not 1 <= self.min_clip_frames <= self.max_clip_frames:
            raise ValueError(
                f"min_clip_frames: {self.min_clip_frames} is not between 1 and max_clip_frames "
                f"({self.max_clip_frames})"
            )
        if self.sources_per_shard < 1:
            raise ValueError("sources_per_shard: must be at least 1")
        if self.segment_s < 2 * shots.OVERLAP_S:
            raise ValueError(f"segment_s: {self.segment_s:g}; it must be at least {2 * shots.OVERLAP_S:g}")

    @property
    def cutting(self) -> shots.Cutting:
        return shots.Cutting(
            self.max_clip_frames, self.min_clip_frames, self.cut_ratio, self.cut_difference, self.fade_level
        )

    @property
    def fingerprint(self) -> str:
        return hashing.fingerprint(stage="ingest", shots=shots.VERSION, **dataclasses.asdict(self.cutting))

    @property
    def table_schema(self) -> pa.Schema:
        """Of clips/ that are made with these settings."""
        return schema.with_fingerprint(schema.CLIPS_SCHEMA, self.fingerprint)


def list_sources(config: IngestConfig) -> discovery.Listing:
    """The sources of the config's input, to be iterated once."""
    return discovery.Listing(config.input, config.output, config.exclude, config.manifest)


def ingest_source(source: dict[str, Any], config: IngestConfig, sandbox: Sandbox) -> list[dict[str, Any]]:
    """The rows of clips/ that one source file becomes; one row with `error` if it cannot be read."""
    common: dict[str, Any] = {
        "uri": source["uri"],
        "source_id": source["source_id"],
        "source_bytes": source["bytes"],
        "source_etag": source["etag"] or None,
        "dataset": config.dataset or None,
        "license": config.license or None,
    }
    try:
        if ".." in source["path"].split("/") or "://" in source["path"]:
            raise MediaError("its path leads out of the input folder")
        labels = source["labels"]
        common |= discovery.read_sidecars(source["uri"]) if labels is None else labels
        with source_cache.local_file(source["uri"], source["etag"], last_use=True) as path:
            return _rows(source, common, path, config, sandbox)
    except (MediaError, OSError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        return [
            schema.empty_row(
                schema.CLIPS_SCHEMA,
                clip_id=hashing.stable_id(source["path"], source["bytes"], "", ""),
                error=reason,
                **common,
            )
        ]


def _rows(
    source: dict[str, Any], common: dict[str, Any], path: str, config: IngestConfig, sandbox: Sandbox
) -> list[dict[str, Any]]:
    found: decoding.Probe = sandbox.call(decoding.probe, path, config.max_pixels)
    common = common | {
        "media": found.media,
        "time_base": str(found.time_base),
        "width": found.width,
        "height": found.height,
        "rotation": found.rotation,
        "sample_aspect": found.sample_aspect,
        "codec": found.codec,
        "pix_fmt": found.pix_fmt,
        "bit_depth": found.bit_depth,
        "color_primaries": found.color_primaries or None,
        "color_transfer": found.color_transfer or None,
        "has_audio": found.has_audio,
    }
    if found.media == "image":
        phash = sandbox.call(shots.scan_image, path, config.max_pixels)
        clips = [{"start_pts": 0, "end_pts": 1, "num_frames": 1, "phash": phash}]
    else:
        common |= {"bit_rate": found.bit_rate or None}
        about = shots.Source(found.coded_size, found.fps, found.time_base)
        clips = shots.cut(_scan(source, found, about, path, config, sandbox), config.cutting, about)
        if not clips:
            raise MediaError("it has no undamaged frame that can be decoded")
    rows = []
    for clip in clips:
        clip_id = hashing.stable_id(source["path"], source["bytes"], clip["start_pts"], clip["end_pts"])
        times = {}
        if found.media == "video":
            start_s, end_s = (float(clip[key] * found.time_base) for key in ("start_pts", "end_pts"))
            times = {"start_s": start_s, "end_s": end_s}
        rows.append(schema.empty_row(schema.CLIPS_SCHEMA, clip_id=clip_id, **common, **times, **clip))
    return rows


def _scan(
    source: dict[str, Any],
    found: decoding.Probe,
    about: shots.Source,
    path: str,
    config: IngestConfig,
    sandbox: Sandbox,
) -> np.ndarray:
    """Scan a video's frames into an array of shots.FRAME; a long one is scanned in spans, by tasks."""
    begins = shots.spans(found.start_pts, found.duration_s, config.segment_s, found.time_base)
    if len(begins) > 1:
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=3)(scan_span)
        ends: list[int | None] = [*begins[1:], None]
        spans = [
            task.remote(source, about, None if i == 0 else begin, end, config)
            for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        parts = ray.get(spans)
        whole = [part for part in parts if part is not None]
        joined = shots.join(whole, begins, found.time_base) if len(whole) == len(parts) else None
        if joined is not None:
            return joined
    return _scan_frames(sandbox, path, config, about)[0]


def _scan_frames(
    sandbox: Sandbox, path: str, config: IngestConfig, about: shots.Source, *span: int | None
) -> tuple[np.ndarray, str]:
    """(frames, why it stopped before the end or ''), by the sandbox."""
    parts, stopped = [], ""
    for progress in sandbox.stream(shots.scan, path, config.max_pixels, about, *span):
        parts.append(progress["frames"])
        stopped = progress.get("stopped", "")
    return np.concatenate(parts), stopped


def _span_url(source: dict[str, Any], begin: int | None, end: int | None, config: IngestConfig) -> str:
    name = hashing.stable_id(source["source_id"], begin, end, shots.VERSION)
    return storage.join(_spans_folder(source, config), f"{name}.npy")


def _spans_folder(source: dict[str, Any], config: IngestConfig) -> str:
    return storage.join(config.output, schema.CLIPS, _SPANS, source["source_id"])


def scan_span(
    source: dict[str, Any], about: shots.Source, begin: int | None, end: int | None, config: IngestConfig
) -> np.ndarray | None:
    """One task: the frames of one span, with the overlap before it; begin None means from the start.

    If an earlier run was killed after this task, its result is used. None means that not all frames can be
    read, so that the file has to be scanned in one pass.
    """
    url = _span_url(source, begin, end, config)
    with contextlib.suppress(FileNotFoundError):
        return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    start = None if begin is None else begin - round(shots.OVERLAP_S / about.time_base)
    try:
        with source_cache.local_file(source["uri"], source["etag"]) as path:
            frames, stopped = _scan_frames(_sandbox(config), path, config, about, start, end)
    except (MediaError, OSError):
        return None
    if stopped:
        return None
    data = io.BytesIO()
    np.save(data, frames)
    storage.write_bytes(url, data.getvalue())
    return frames


def _sandbox(config: IngestConfig) -> Sandbox:
    return shared_sandbox(config.time_limit_s, int(config.memory_limit_gib * 2**30))


def ingest_shard(row: dict[str, Any], config: IngestConfig) -> dict[str, Any]:
    """One task: the clips of one shard's sources."""
    folder = storage.join(config.output, schema.CLIPS)
    made: list[dict[str, Any]] = []

    def make_rows(planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made.extend(planned)
        return [clip for source in planned for clip in ingest_source(source, config, _sandbox(config))]

    report = work_plan.make_shard(folder, row["shard"], config.table_schema, make_rows)
    for source in made:  # the clips are written, so the scans behind them can go
        storage.remove_folder(_spans_folder(source, config))
    return report


def run(config: IngestConfig) -> stage.Summary:
    """The stage: list, plan, make the shards that are missing, count."""
    folder = storage.join(config.output, schema.CLIPS)
    check_upgraded(config.output)
    if config.manifest is None and next(storage.walk(config.input), None) is None:
        raise ValueError(f"input: there are no files below {config.input}")
    if config.manifest is not None and not storage.exists(config.manifest):
        raise ValueError(f"manifest: there is no file {config.manifest}")

    def work(summary: stage.Summary) -> None:
        for key in ("input", "output"):
            stage.check_shared(getattr(config, key), config.shared_filesystem, key)
        start = time.monotonic()
        listed = list_sources(config)
        planned = work_plan.plan(folder, listed, "source_id", config.fingerprint, config.sources_per_shard)
        summary.details["planning_s"] = time.monotonic() - start
        reports = stage.run_shards(
            planned.pending,
            ingest_shard,
            "ingest",
            functools.partial(work_plan.commit, folder, config.table_schema),
            config.concurrency,
            constructor_args=(config,),
        )
        summary.rows_in = planned.rows
        summary.already_done = planned.already_done
        summary.bytes = sum(report["bytes"] for report in reports)
        count_clips(folder, summary)
        summary.details |= {"files ignored (not media by name)": listed.ignored}
        summary.details |= {"new clips": sum(report["rows"] - report["errors"] for report in reports)}

    return stage.run_stage("ingest", folder, work)


def count_clips(folder: str, summary: stage.Summary) -> None:
    """Fill in kept, errors and reasons from the table's small columns, one file at a time."""
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for table in delta_tables.iterate(folder, ["media", "error"]):
        good = table.filter(pc.is_null(table["error"]))
        kinds.update(good["media"].to_pylist())
        reasons.update(work_plan.count_reasons(table["error"].to_pylist()))
    summary.rows_kept = sum(kinds.values())
    summary.errors = sum(reasons.values())
    summary.rejected = dict(reasons.most_common())
    summary.details |= {f"{kind} clips": count for kind, count in sorted(kinds.items())}
