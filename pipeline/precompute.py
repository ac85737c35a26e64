"""Kept clips -> text/ (embeddings, once a clip) and latents/ (HQ and LQ of every sample) with its index.

Pixels live only in memory: a CPU task decodes, crops and degrades one sample, an encoder actor turns it
into two latents, and one shard of samples becomes one file. A sample's row depends on its id, the
clip's bytes, the recipe, the seed and the models alone, so a row made again is the same to the bit.
"""

import dataclasses
import json
import tempfile
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from degradations.recipe import REALBASICVSR, REALESRGAN, RecipeConfig, apply, draw, to_json
from model.vae.autoencoder import CausalVideoAutoencoder, posterior_noise
from pipeline import bfloat16, media, sampling, schema, shards, stage, storage, text_stage, weights
from pipeline.sandbox import MediaError
from pipeline.sandbox import shared as shared_sandbox

_MEDIA_FIELDS = (
    "clip_id",
    "uri",
    "media",
    "start_pts",
    "end_pts",
    "time_base",
    "num_frames",
    "fps",
    "width",
    "height",
    "rotation",
)


@dataclasses.dataclass(frozen=True)
class PrecomputeConfig:
    """What `jobs.precompute` reads."""

    data: str
    """absolute URL of the data root that holds clips/ and selection/; text/ and latents/ are written there"""
    vae: str
    """URL of a folder of trained autoencoder weights"""
    text: text_stage.TextConfig
    """the text encoders"""
    buckets: list[sampling.Bucket]
    """sizes that samples are cropped to: one or more for each progressive stage, and 1-frame ones"""
    native: sampling.Native | None = None
    """also samples of each clip's own size (null: none)"""
    variants: int = 1
    """random crops and degradations of each clip in each bucket"""
    seed: int = 0
    """of crops, degradations and posterior samples"""
    video_recipe: RecipeConfig = REALBASICVSR
    """degradations of videos"""
    image_recipe: RecipeConfig = REALESRGAN
    """degradations of images"""
    samples_per_shard: int = 64
    """samples in one output file: what a kill can lose"""
    encode_actors: int = 1
    """processes that encode; one for each GPU of the encode nodes"""
    encode_cpus: float = 1.0
    """CPU cores reserved for each of them"""
    encode_gpus: float = 0.0
    """GPUs reserved for each of them"""
    samples_in_flight: int = 4
    """decoded samples waiting for each encoder (bounds the object store: 74 MB each at 21x768x768)"""
    decode_seconds: float = 120.0
    """a sample that takes longer to decode becomes an error row"""
    shared_filesystem: bool = False
    """set to true if `data` is file:// on a folder that every node mounts"""

    def __post_init__(self) -> None:
        storage.check_url(self.data, "data")
        storage.check_url(self.vae, "vae")
        for key in ("variants", "samples_per_shard", "encode_actors", "samples_in_flight"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")


def degrade(frames: np.ndarray, clip: dict[str, Any], config: PrecomputeConfig, seed: int) -> dict[str, Any]:
    """HQ (the frames, sharpened if the recipe says so) and LQ, uint8 (T, H, W, 3), and what made it."""
    recipe = config.image_recipe if clip["media"] == "image" else config.video_recipe
    shape = (frames.shape[0], frames.shape[1], frames.shape[2])
    degradation = draw(recipe, seed, shape, clip["fps"] or 25.0)
    applied = apply(degradation, frames)
    record = {"operations": json.loads(to_json(degradation)), "measured": applied.measured}
    return {"hq": applied.hq, "lq": applied.lq, "degradation": json.dumps(record)}


def read_crop(
    clip: dict[str, Any], path: str, first: int, count: int, window: tuple[int, int, int, int]
) -> np.ndarray:
    """Frames [first, first + count) of a clip, cut to (top, left, height, width): uint8 (T, H, W, 3)."""
    top, left, height, width = window
    frames = media.read_frames(clip, path, first, count)
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def prepare_sample(planned: dict[str, Any], config: PrecomputeConfig) -> dict[str, Any]:
    """Decode, crop and degrade one planned sample: {hq, lq, degradation} or {error}."""
    clip, (first, top, left) = planned["clip"], planned["crop"]
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            storage.local_copy(clip["uri"], folder) as path,
        ):
            count = planned["num_frames"]
            window = (top, left, planned["height"], planned["width"])
            sandbox = shared_sandbox(config.decode_seconds)
            frames = sandbox.call(read_crop, clip, path, first, count, window)
        return degrade(frames, clip, config, planned["seed"])
    except (MediaError, ValueError, OSError) as error:
        return {"error": f"{type(error).__name__}: {clip['uri']}: {error}"}


def to_network(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (T, H, W, 3) -> float (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames.copy()).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def encode_pair(vae: CausalVideoAutoencoder, hq: np.ndarray, lq: np.ndarray, seed: int) -> dict[str, Any]:
    """The latent columns of one sample. HQ and LQ are one batch, whoever the neighbours are."""
    parameter = next(vae.parameters())
    pixels = torch.cat([to_network(hq, parameter.device), to_network(lq, parameter.device)])
    mean, log_variance = vae.encode(pixels.to(parameter.dtype))
    columns: dict[str, Any] = {}
    for row, which in enumerate(("hq", "lq")):
        shape = tuple(mean[row : row + 1].shape)
        noise = posterior_noise(shape, schema.stable_hash(seed, which)).to(mean)
        latent = vae.to_latent(mean[row : row + 1], log_variance[row : row + 1], noise)
        columns |= bfloat16.to_columns(f"{which}_latent", latent[0].permute(1, 2, 3, 0))
    return columns


class EncodeShard:
    """The encoder actor: loads the autoencoder once; one call makes one shard's file.

    It hands its samples' pixels to CPU tasks anywhere in the cluster and keeps a bounded number in flight.
    """

    def __init__(self, config: PrecomputeConfig, folder: str, fingerprint: str) -> None:
        self.config, self.folder = config, folder
        self.schema = schema.with_fingerprint(schema.LATENTS_SCHEMA, fingerprint, vae=config.vae)
        device = torch.device("cuda" if config.encode_gpus and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(config.encode_cpus)))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.vae = weights.load_vae(config.vae).to(device=device, dtype=dtype).eval()
        self.prepare = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=3)(prepare_sample)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return shards.make_shard(self.folder, row["shard"], self.schema, self._rows)

    def _rows(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._encode(sample, pixels) for sample, pixels in self._prepared(planned)]

    def _prepared(self, planned: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(planned row, its pixels) in order, with at most `samples_in_flight` decoded ahead."""
        waiting: deque[tuple[dict[str, Any], Any]] = deque()
        for sample in planned:
            waiting.append((sample, self.prepare.remote(sample, self.config)))
            if len(waiting) > self.config.samples_in_flight:
                first, reference = waiting.popleft()
                yield first, ray.get(reference)
        while waiting:
            first, reference = waiting.popleft()
            yield first, ray.get(reference)

    def _encode(self, planned: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
        known = {
            name: planned[name]
            for name in ("sample_id", "clip_id", "num_frames", "height", "width", "crop", "seed")
        }
        row = schema.empty_row(schema.LATENTS_SCHEMA, media=planned["clip"]["media"], **known)
        if "error" in pixels:
            return {**row, "error": pixels["error"]}
        latents = encode_pair(self.vae, pixels["hq"], pixels["lq"], planned["seed"])
        return {**row, **latents, "degradation": pixels["degradation"]}


def plan_rows(config: PrecomputeConfig, text_tokens: dict[str, int]) -> list[dict[str, Any]]:
    """The sample rows of every kept clip, both splits."""
    clips = storage.read_folder(storage.join(config.data, schema.CLIPS))
    selection = storage.read_folder(storage.join(config.data, schema.SELECTION))
    if clips is None or selection is None:
        raise ValueError(f"data: {config.data} has no clips/ or no selection/; run ingest and filter first")
    kept = {row["clip_id"]: row["split"] for row in selection.to_pylist() if row["keep"]}
    rows = []
    for clip in clips.to_pylist():
        if clip["clip_id"] in kept:
            short = {name: clip[name] for name in _MEDIA_FIELDS}
            extra = {
                "split": kept[clip["clip_id"]],
                "text_tokens": text_tokens[clip["clip_id"]],
                "clip": short,
            }
            samples = sampling.plan_samples(clip, config.buckets, config.native, config.variants, config.seed)
            rows += [{**sample, **extra} for sample in samples]
    return rows


def index_file(latents_url: str, file: str, planned: dict[str, dict[str, Any]]) -> int:
    """Write the index of one latents file (samples without an error); returns its rows."""
    with storage.open_input(storage.join(latents_url, file)) as source:
        parquet = pq.ParquetFile(source)
        groups = [
            parquet.read_row_group(
                number, columns=["sample_id", "clip_id", "media", "num_frames", "height", "width", "error"]
            ).to_pylist()
            for number in range(parquet.metadata.num_row_groups)
        ]
    rows = []
    for group_number, group in enumerate(groups):
        for row_number, row in enumerate(group):
            if row.pop("error") is not None:
                continue
            plan = planned[row["sample_id"]]
            size = (row["num_frames"], row["height"], row["width"])
            rows.append(
                {
                    **row,
                    "split": plan["split"],
                    "file": file,
                    "row_group": group_number,
                    "row": row_number,
                    "bucket": plan["bucket"],
                    "video_tokens": schema.video_tokens(*size),
                    "text_tokens": plan["text_tokens"],
                }
            )
    table = pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA)
    storage.write_table(storage.join(latents_url, schema.INDEX, file), [table], schema.INDEX_SCHEMA)
    return len(rows)


def update_index(latents_url: str) -> int:
    """Write `_index/` for each latents file that has none yet; returns the samples in the whole index."""
    index_url = storage.join(latents_url, schema.INDEX)
    indexed = {url.rsplit("/", 1)[1] for url in storage.parquet_files(index_url)}
    files = [url.rsplit("/", 1)[1] for url in storage.parquet_files(latents_url)]
    planned: dict[str, dict[str, Any]] = {}
    if set(files) - indexed:
        for plan in shards.read_plans(latents_url):
            planned |= {row["sample_id"]: row for row in map(json.loads, plan.column("row").to_pylist())}
    for file in files:
        if file not in indexed:
            index_file(latents_url, file, planned)
    index = storage.read_folder(index_url, ["sample_id"])
    return 0 if index is None else index.num_rows


def latents_fingerprint(config: PrecomputeConfig) -> str:
    return schema.fingerprint(
        vae=weights.weights_hash(config.vae),
        video_recipe=dataclasses.asdict(config.video_recipe),
        image_recipe=dataclasses.asdict(config.image_recipe),
        seed=config.seed,
    )


def run(config: PrecomputeConfig) -> stage.Summary:
    """Text first (it is small), then latents, then their index."""
    folder = storage.join(config.data, schema.LATENTS)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.data, config.shared_filesystem, "data")
        text_tokens = text_stage.embed_kept_clips(
            config.data, config.text, config.encode_cpus, config.encode_gpus
        )
        fingerprint = latents_fingerprint(config)
        rows = plan_rows(config, text_tokens)
        pending = shards.plan(folder, rows, "sample_id", fingerprint, config.samples_per_shard)
        reports = stage.run_shards(
            pending,
            EncodeShard,
            "precompute: encode HQ and LQ",
            concurrency=config.encode_actors,
            constructor_args=(config, folder, fingerprint),
            num_cpus=config.encode_cpus,
            num_gpus=config.encode_gpus,
        )
        summary.rows_in = len(rows)
        summary.rows_kept = update_index(folder)
        summary.errors = sum(report["errors"] for report in reports)
        summary.already_done = len(rows) - sum(len(shard.rows) for shard in pending)
        summary.bytes = sum(report["bytes"] for report in reports)
        encode_s = sum(report["seconds"] for report in reports)
        made = sum(report["rows"] for report in reports)
        summary.details = {
            "clips": len({row["clip_id"] for row in rows}),
            "samples by bucket": _count(rows, "bucket"),
            "samples by split": _count(rows, "split"),
            "seconds a sample and encoder": round(encode_s / made, 3) if made else 0.0,
        }

    return stage.run_stage("precompute", folder, work)


def _count(rows: list[dict[str, Any]], name: str) -> dict[str, int]:
    return shards.count_reasons([row[name] for row in rows])
