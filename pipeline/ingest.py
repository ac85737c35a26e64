"""Ingest: list videos and images, probe them, cut them into clips, write clips/.

One planned row is one source; one task makes the clips of a few sources. What cannot be read becomes one
row with `error` set, so that every file that was listed stands in the table.
"""

import dataclasses
import fnmatch
import json
import os
import tempfile
import time
from typing import Any

import pyarrow.compute as pc

from pipeline import media, schema, shards, shots, stage, storage
from pipeline.sandbox import MediaError, Sandbox
from pipeline.sandbox import shared as shared_sandbox

# fmt: off
VIDEO_ENDINGS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob",
    ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".3gp", ".gif", ".ivf", ".y4m",
)
# fmt: on
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
SIDECAR_ENDINGS = (".txt", ".json")
_SIDECAR_FIELDS = ("caption", "license", "dataset")


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    input: str
    """Folder with videos and images (file:///..., an absolute path or s3://bucket/prefix), searched with
    its subfolders. A caption may lie beside a file: name.txt, or name.json with the keys caption, license
    and dataset."""
    output: str
    """Data root; the table is written to <output>/clips."""
    exclude: list[str] = dataclasses.field(default_factory=list)
    """Globs of paths below input to leave out, e.g. "raw/*"."""
    dataset: str = ""
    """Name of the data set, kept with every clip that has no other in its sidecar file."""
    license: str = ""
    """Licence of the files, kept with every clip that has no other in its sidecar file."""
    max_clip_frames: int = 121
    """Longer shots are cut into clips of this many frames. 121 = 4n+1, as the model takes frames."""
    min_clip_frames: int = 9
    """Shorter shots, and shorter tails of cut shots, are left out, unless the file has nothing longer."""
    cut_ratio: float = 3.0
    """A hard cut is where a frame's difference to the one before is this many times that around it."""
    cut_difference: float = 15.0
    """... and at least this large: mean difference of hue, saturation and brightness, 0 to 255."""
    fade_level: float = 12.0
    """A shot also ends where the picture's mean falls below this level (0 to 255): fades through black."""
    max_pixels: int = 8192 * 4608
    """Files with more pixels a frame are not decoded and become error rows."""
    time_limit_s: float = 30.0
    """How long a decoder may take for 32 frames before it is ended and the file becomes an error row."""
    memory_limit_gib: float = 6.0
    """Address space of each decoding process, GiB."""
    sources_per_shard: int = 8
    """Source files for each task and output file: smaller loses less in a kill, larger makes fewer files."""
    concurrency: int | None = None
    """Tasks at a time; none: as many as the cluster has cores."""
    shared_filesystem: bool = False
    """Say true if every node of the cluster sees file:// URLs as the same folder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", storage.check_url(self.input, "input"))
        object.__setattr__(self, "output", storage.check_url(self.output, "output"))
        if not 1 <= self.min_clip_frames <= self.max_clip_frames:
            raise ValueError(
                f"min_clip_frames: {self.min_clip_frames} is not between 1 and max_clip_frames "
                f"({self.max_clip_frames})"
            )
        if self.sources_per_shard < 1:
            raise ValueError("sources_per_shard: must be at least 1")

    @property
    def cutting(self) -> shots.Cutting:
        return shots.Cutting(
            self.max_clip_frames, self.min_clip_frames, self.cut_ratio, self.cut_difference, self.fade_level
        )

    @property
    def fingerprint(self) -> str:
        return schema.fingerprint(stage="ingest", shots=shots.VERSION, **dataclasses.asdict(self.cutting))


def list_sources(config: IngestConfig) -> tuple[list[dict[str, Any]], int]:
    """(planned rows, number of ignored files): every file below the input that its name says is media.

    Names that begin with '.' or '_', and what lies below the output, do not count at all.
    """
    listed = storage.list_files(config.input)
    if not listed:
        raise ValueError(f"input: there are no files below {config.input}")
    urls = {url for url, _, _ in listed}
    sources, ignored = [], 0
    for url, size, etag in listed:
        path = url.removeprefix(config.input).lstrip("/")
        if url.startswith(config.output + "/") or any(part[0] in "._" for part in path.split("/")):
            continue
        stem, ending = os.path.splitext(url)
        if ending.lower() in SIDECAR_ENDINGS:
            continue
        if ending.lower() not in (*VIDEO_ENDINGS, *IMAGE_ENDINGS):
            ignored += 1
            continue
        if any(fnmatch.fnmatch(path, pattern) for pattern in config.exclude):
            ignored += 1
            continue
        sources.append(
            {
                "source_id": schema.stable_id(path, size),
                "path": path,
                "uri": url,
                "bytes": size,
                "etag": etag,
                "sidecars": [stem + end for end in SIDECAR_ENDINGS if stem + end in urls],
            }
        )
    return sources, ignored


def read_sidecars(urls: list[str]) -> dict[str, str]:
    """caption, license and dataset from the files beside a source; a JSON file wins over a text file."""
    values: dict[str, str] = {}
    for url in urls:
        text = storage.read_bytes(url).decode("utf-8", errors="replace").strip()
        if url.endswith(".txt"):
            values["caption"] = text
            continue
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            values |= {key: str(found[key]) for key in _SIDECAR_FIELDS if found.get(key)}
    return values


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
        common |= read_sidecars(source["sidecars"])
        with storage.local_copy(source["uri"], tempfile.gettempdir()) as path:
            return _rows(source, common, path, config, sandbox)
    except (MediaError, OSError) as error:
        return [
            schema.empty_row(
                schema.CLIPS_SCHEMA,
                clip_id=schema.stable_id(source["path"], source["bytes"], "", ""),
                error=str(error),
                **common,
            )
        ]


def _rows(
    source: dict[str, Any], common: dict[str, Any], path: str, config: IngestConfig, sandbox: Sandbox
) -> list[dict[str, Any]]:
    found: media.Probe = sandbox.call(media.probe, path, config.max_pixels)
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
        clips = []
        for progress in sandbox.stream(shots.scan, path, config.cutting, config.max_pixels):
            clips = progress.get("clips", [])
        if not clips:
            raise MediaError("no undamaged frame of it can be decoded")
    rows = []
    for clip in clips:
        clip_id = schema.stable_id(source["path"], source["bytes"], clip["start_pts"], clip["end_pts"])
        times = {}
        if found.media == "video":
            start_s, end_s = (float(clip[key] * found.time_base) for key in ("start_pts", "end_pts"))
            times = {"start_s": start_s, "end_s": end_s}
        rows.append(schema.empty_row(schema.CLIPS_SCHEMA, clip_id=clip_id, **common, **times, **clip))
    return rows


def ingest_shard(row: dict[str, Any], config: IngestConfig) -> dict[str, Any]:
    """One task: the clips of one shard's sources."""
    sandbox = shared_sandbox(config.time_limit_s, int(config.memory_limit_gib * 2**30))
    table_schema = schema.with_fingerprint(schema.CLIPS_SCHEMA, config.fingerprint)

    def make_rows(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [clip for source in sources for clip in ingest_source(source, config, sandbox)]

    return shards.make_shard(storage.join(config.output, schema.CLIPS), row["shard"], table_schema, make_rows)


def run(config: IngestConfig) -> stage.Summary:
    """The stage: list, plan, make the shards that are missing, count."""
    folder = storage.join(config.output, schema.CLIPS)
    sources, ignored = list_sources(config)

    def work(summary: stage.Summary) -> None:
        for key in ("input", "output"):
            stage.check_shared(getattr(config, key), config.shared_filesystem, key)
        start = time.monotonic()
        pending = shards.plan(folder, sources, "source_id", config.fingerprint, config.sources_per_shard)
        summary.details["planning_s"] = time.monotonic() - start
        reports = stage.run_shards(
            pending, ingest_shard, "ingest", config.concurrency, constructor_args=(config,)
        )
        summary.rows_in = len(sources)
        summary.already_done = len(sources) - sum(len(shard.rows) for shard in pending)
        summary.bytes = sum(report["bytes"] for report in reports)
        count_clips(folder, summary)
        summary.details |= {"files ignored (not media by name)": ignored}
        summary.details |= {"new clips": sum(report["rows"] - report["errors"] for report in reports)}

    return stage.run_stage("ingest", folder, work)


def count_clips(folder: str, summary: stage.Summary) -> None:
    """Fill in kept, errors and reasons from the table's small columns, one file at a time."""
    kinds: dict[str, int] = {}
    reasons: list[str] = []
    for url in storage.parquet_files(folder):
        table = storage.read_table(url, ["media", "error"])
        good = table.filter(pc.is_null(table["error"]))
        for kind in pc.value_counts(good["media"].combine_chunks()).to_pylist() if good.num_rows else []:
            kinds[kind["values"]] = kinds.get(kind["values"], 0) + kind["counts"]
        reasons += table["error"].drop_null().to_pylist()
    summary.rows_kept = sum(kinds.values())
    summary.errors = len(reasons)
    summary.rejected = shards.count_reasons([*reasons])
    summary.details |= {f"{kind} clips": count for kind, count in sorted(kinds.items())}
