"""A synthetic benchmark: clips -> lossless HQ and LQ files with the same degradations as training.

    <output>/hq/<name>.mkv (or .png)   the truth, cropped, never resized
    <output>/lq/<name>.mkv (or .png)   the same frames, degraded, at the same size
    <output>/manifest.json             every drawn parameter, seeds, sources

Each pair depends on the clip, the recipes, the seed and the limits of its size alone. Run again, a job makes
what is missing; it refuses a folder that holds pairs made with other settings.
"""

import dataclasses
import json
import os
import tempfile
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import ray

from degradations.recipe import REALBASICVSR, REALESRGAN, RecipeConfig, apply, draw, to_json
from pipeline.data.kept_clips import kept_clips
from pipeline.runtime import stage
from pipeline.store import hashing, source_cache, storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding, encoding
from pipeline.video.file_endings import MEDIA_ENDINGS, ending_of
from pipeline.video.sandbox import shared as shared_sandbox

HQ, LQ, MANIFEST, RECORDS, SETTINGS = "hq", "lq", "manifest.json", "_records", "_settings.json"


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """What `jobs.pairs` reads."""

    output: Url
    """Absolute URL of the folder to which hq/, lq/ and manifest.json are written."""
    data: Url | None = None
    """Absolute URL of a data root whose kept clips are degraded; give exactly one of `data` and `folder`."""
    split: str = "held_out"
    """Split of the data root to take clips from, held_out or train; a plain folder has none."""
    folder: Url | None = None
    """Absolute URL of a folder of videos and images, searched with its subfolders; give exactly one of `data`
    and `folder`."""
    max_frames: int = 32
    """Largest number of frames of a pair, taken from the middle of the clip."""
    max_height: int = 720
    """Largest height of a pair in pixels; larger clips are cropped around their centre."""
    max_width: int = 1280
    """Largest width of a pair in pixels; larger clips are cropped around their centre."""
    video_recipe: RecipeConfig = REALBASICVSR
    """Recipe that degrades videos; the default is RealBasicVSR's."""
    image_recipe: RecipeConfig = REALESRGAN
    """Recipe that degrades images; the default is Real-ESRGAN's."""
    seed: int = 0
    """Seed of all drawn degradation parameters."""
    decode_seconds: float = 120.0
    """Time limit in seconds for decoding one clip; a clip that exceeds it is left out, with the reason in the
    manifest."""
    max_clips: int | None = None
    """Largest number of pairs, spread evenly over the sources; null makes one of every clip."""

    def __post_init__(self) -> None:
        check_urls(self)
        if (self.data is None) == (self.folder is None):
            raise ValueError("give either data (a data root) or folder (a folder of videos)")
        for key in ("max_frames", "max_height", "max_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")

    @property
    def fingerprint(self) -> str:
        """Hash of what determines a pair, besides its clip."""
        return hashing.fingerprint(
            stage="pairs",
            recipes=(self.video_recipe.settings(), self.image_recipe.settings()),
            limits=(self.max_frames, self.max_height, self.max_width),
            seed=self.seed,
        )


def clip_rows(config: PairsConfig) -> list[dict[str, Any]]:
    """What pairs are made from: rows like those of clips/, each with a `name` for its files."""
    if config.folder is not None:
        rows = [
            {"clip_id": hashing.stable_id(url.removeprefix(config.folder).lstrip("/"), size), "uri": url}
            for url, size, _ in storage.list_files(config.folder)
            if ending_of(url) in MEDIA_ENDINGS
        ]
    else:
        assert config.data is not None
        rows = kept_clips(config.data, config.split)
    named = [{**row, "name": f"{_stem(row['uri'])}_{row['clip_id'][:8]}"} for row in rows]
    return spread_over_sources(named, config.max_clips)


def _stem(uri: str) -> str:
    return os.path.splitext(os.path.basename(uri))[0]


def spread_over_sources(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` rows: the first clip of every source, then the second of every source, and so on."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["uri"], row.get("start_pts") or 0)):
        by_source.setdefault(row["uri"], []).append(row)
    turns = [(turn, source, row) for source, group in by_source.items() for turn, row in enumerate(group)]
    ordered = [row for _, _, row in sorted(turns, key=lambda item: item[:2])]
    return ordered[:limit]


def read_middle(row: dict[str, Any], path: str, max_frames: int) -> tuple[np.ndarray, str, float]:
    """The middle frames of a clip row, or of a whole file where the row has no span: frames, media, fps."""
    if "num_frames" not in row:
        probe = decoding.probe(path)
        # counted, since the number of frames in a file's header is often wrong
        count = 1 if probe.media == "image" else sum(1 for _ in decoding.decode_video(path))
        row = {"media": probe.media, "num_frames": count, "fps": float(probe.fps or 0)}
        row |= {"start_pts": None, "end_pts": None}
    count = min(row["num_frames"], max_frames)
    first = (row["num_frames"] - count) // 2
    return decoding.read_frames(row, path, first, count), row["media"], row["fps"] or 25.0


def centre_crop(frames: np.ndarray, max_height: int, max_width: int) -> np.ndarray:
    """Frames (T, H, W, 3) cut to at most this height and width around their centre."""
    height, width = frames.shape[1:3]
    top, left = max(0, (height - max_height) // 2), max(0, (width - max_width) // 2)
    return np.ascontiguousarray(frames[:, top : top + max_height, left : left + max_width])


def write_lossless(url: str, frames: np.ndarray, fps: float, is_image: bool) -> None:
    """PNG for one image, FFV1 in RGB for a video: what is read back is what was written."""
    if is_image:
        storage.write_bytes(url, encoding.png(frames[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "pair.mkv")
        _, height, width, _ = frames.shape
        with encoding.VideoWriter(
            path, Fraction(fps).limit_denominator(1001), width, height, codec="ffv1"
        ) as out:
            for frame in frames:
                out.write(frame)
        with open(path, "rb") as file:
            storage.write_bytes(url, file.read())


def make_pair(row: dict[str, Any], config: PairsConfig) -> dict[str, Any]:
    """Write one pair and its record; a clip that cannot be read or degraded is a record with `error`."""
    record_url = storage.join(config.output, RECORDS, f"{row['name']}.json")
    if storage.exists(record_url):
        return storage.read_json(record_url)
    record = {"name": row["name"], "clip_id": row["clip_id"], "source": os.path.basename(row["uri"])}
    sandbox = shared_sandbox(config.decode_seconds)
    seed = hashing.stable_hash(config.seed, row["clip_id"])
    cv2.setNumThreads(1)  # one task, one core
    try:
        with source_cache.local_file(row["uri"], row.get("source_etag")) as path:
            frames, kind, fps = sandbox.call(read_middle, row, path, config.max_frames)
        hq = centre_crop(frames, config.max_height, config.max_width)
        recipe = config.image_recipe if kind == "image" else config.video_recipe
        degradation = draw(recipe, seed, (hq.shape[0], hq.shape[1], hq.shape[2]), fps)
        applied = apply(degradation, hq)
    except (ValueError, OSError) as error:
        return {**record, "error": f"{row['uri']}: {error}"}
    suffix = ".png" if kind == "image" else ".mkv"
    for name, pixels in ((HQ, applied.hq), (LQ, applied.lq)):
        url = storage.join(config.output, name, row["name"] + suffix)
        write_lossless(url, pixels, fps, kind == "image")
    count, height, width, _ = hq.shape
    record |= {"file": row["name"] + suffix, "media": kind, "frames": count, "height": height, "width": width}
    record |= {"fps": fps, "seed": seed, "degradation": json.loads(to_json(degradation))}
    record["measured"] = applied.measured
    storage.write_json(record_url, record)
    return record


def claim_folder(config: PairsConfig) -> None:
    """ValueError if the output holds pairs that were made with other settings; else it is this job's."""
    url = storage.join(config.output, SETTINGS)
    if not storage.exists(url):
        storage.write_json(url, {"fingerprint": config.fingerprint, **dataclasses.asdict(config)})
    elif storage.read_json(url)["fingerprint"] != config.fingerprint:
        raise ValueError(
            f"output: {config.output} holds pairs made with another seed, recipe or size (see {SETTINGS} "
            "there); write to another folder or remove this one"
        )


def run(config: PairsConfig) -> stage.Summary:
    """Make every pair that is missing, then the manifest."""
    claim_folder(config)

    def work(summary: stage.Summary) -> None:
        rows = clip_rows(config)
        if not rows:
            raise ValueError("no clip to make pairs from")
        # One block a clip, so that long clips do not wait for each other. As JSON: Ray would give the
        # operations of a degradation each other's fields.
        items = [{"row": json.dumps(row)} for row in rows]
        dataset = ray.data.from_items(items, override_num_blocks=len(rows))
        made = dataset.map(
            lambda item: {"record": json.dumps(make_pair(json.loads(item["row"]), config))}, num_cpus=1
        )
        made.set_name("pairs")
        records = [json.loads(item["record"]) for item in made.take_all()]
        records.sort(key=lambda record: record["name"])
        storage.write_json(storage.join(config.output, MANIFEST), {"seed": config.seed, "pairs": records})
        summary.rows_in = len(rows)
        summary.errors = sum(1 for record in records if "error" in record)
        summary.rows_kept = len(rows) - summary.errors

    return stage.run_stage("pairs", config.output, work)
