"""Kept clips -> text/ (embeddings, once per clip) and latents/ (HQ and LQ of every sample) with its index.

Pixels exist only in memory: a CPU task decodes, crops and degrades one sample, an encoder actor turns it into
two latents, and one shard of samples becomes one file. A sample's row depends only on its id, the clip's
bytes, the recipe, the seed and the models, so a row made again is identical to the bit.
"""

import dataclasses
import functools
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from degradations.config import REALBASICVSR, REALESRGAN, RecipeConfig
from model.vae.autoencoder import CausalVideoAutoencoder, posterior_noise
from pipeline.data import cropping, precompute_cost, text_embeddings
from pipeline.data.kept_clips import KeptClips
from pipeline.data.sample_pixels import PixelConfig, prepare_sample
from pipeline.runtime import prometheus, stage, work_plan
from pipeline.store import bf16_columns, delta_tables, hashing, parquet, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import pixel_range
from pipeline.weights import weights_folder

_ESTIMATE = "_estimate"  # below the data root: a dry run's summary
_MEDIA_FIELDS = (
    "clip_id",
    "uri",
    "source_etag",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What samples are made of clips, and with which models: the same beforehand and while training."""

    vae: Url
    """URL of a folder of trained autoencoder weights, or of the released autoencoder's file."""
    buckets: list[cropping.Bucket]
    """Sizes to which samples are cropped: one or more for each training stage, and sizes of 1 frame for
    images."""
    text: text_embeddings.TextConfig | None = None
    """Text encoders that embed the captions; give exactly one of `text` and `fixed_text`."""
    fixed_text: text_embeddings.FixedTextConfig | None = None
    """One prompt for all clips, for fine-tuning a released transformer; no text encoder is needed. Give
    exactly one of `text` and `fixed_text`."""
    native: cropping.Native | None = None
    """Limits of additional samples at each clip's own size; null makes none."""
    video_recipe: RecipeConfig = REALBASICVSR
    """Recipe that degrades videos; the default is RealBasicVSR's."""
    image_recipe: RecipeConfig = REALESRGAN
    """Recipe that degrades images; the default is Real-ESRGAN's."""
    decode_seconds: float = 120.0
    """Time limit in seconds for decoding one sample; a sample that exceeds it becomes an error row."""

    def __post_init__(self) -> None:
        check_urls(self)
        if (self.text is None) == (self.fixed_text is None):
            raise ValueError("text, fixed_text: give exactly one of them")

    @property
    def pixels(self) -> PixelConfig:
        """What of it the tasks that make pixels are given."""
        return PixelConfig(self.video_recipe, self.image_recipe, self.decode_seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(SampleConfig):
    """What `jobs.precompute` reads: the samples, and where and how they are made."""

    data: Url
    """Absolute URL of the data root that holds clips/ and selection/; text/ and latents/ are written
    there."""
    variants: int = 1
    """Number of random crops and degradations of each clip in each bucket; time and storage grow in
    proportion."""
    seed: int = 0
    """Seed of the crops, the degradations and the autoencoder's posterior samples."""
    samples_per_shard: int = 64
    """Samples in one output file; work on an unfinished file is lost when an encoder is killed."""
    encode_actors: int = 1
    """Number of processes that encode: one for each GPU of the nodes that encode."""
    encode_cpus: float = 1.0
    """CPU cores reserved for each encoding process."""
    encode_gpus: float = 0.0
    """GPUs reserved for each encoding process; 0 encodes on the CPU."""
    samples_in_flight: int = 4
    """Decoded samples that may wait for each encoder, which bounds the object store: a sample of 21x768x768
    takes 74 MB."""
    dry_run: bool = False
    """Whether to write no sample and only report the rows, bytes and hours to expect, estimated from a few
    samples of each bucket."""
    dry_run_samples: int = 4
    """Samples of each bucket that a dry run measures."""
    shared_filesystem: bool = False
    """Set this to true if `data` is a file:// URL of a folder that every node mounts; on several nodes a
    local folder would be incomplete on each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("variants", "samples_per_shard", "encode_actors", "samples_in_flight", "dry_run_samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")


@torch.no_grad()
def encode_pair(vae: CausalVideoAutoencoder, hq: np.ndarray, lq: np.ndarray, seed: int) -> dict[str, Any]:
    """The latent columns of one sample; HQ and LQ are a batch of their own, so the result is reproducible."""
    parameter = next(vae.parameters())
    pixels = torch.cat([pixel_range.to_network(pair, parameter.device) for pair in (hq, lq)])
    mean, log_variance = vae.encode(pixels.to(parameter.dtype))
    columns: dict[str, Any] = {}
    for row, which in enumerate(("hq", "lq")):
        shape = tuple(mean[row : row + 1].shape)
        noise = posterior_noise(shape, hashing.stable_hash(seed, which)).to(mean)
        latent = vae.to_latent(mean[row : row + 1], log_variance[row : row + 1], noise)
        columns |= bf16_columns.to_columns(f"{which}_latent", latent[0].permute(1, 2, 3, 0))
    return columns


class EncodeShard:
    """The encoder actor: loads the autoencoder once; one call makes one shard's file.

    It hands its samples' pixels to CPU tasks anywhere in the cluster and keeps a bounded number in flight.
    """

    def __init__(self, config: PrecomputeConfig, folder: str, fingerprint: str) -> None:
        self.config, self.folder = config, folder
        self.schema = table_schema(config, fingerprint)
        device = torch.device("cuda" if config.encode_gpus and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(config.encode_cpus)))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.vae = weights_folder.load_vae(config.vae).to(device=device, dtype=dtype).eval()
        self.prepare = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_retries=3)(prepare_sample)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        report = work_plan.make_shard(self.folder, row["shard"], self.schema, self._rows)
        index = index_file(self.folder, work_plan.Shard(**json.loads(row["shard"])))
        return {**report, "index_rows": index.rows, "index_bytes": index.bytes}

    def measure(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Measure what each sample costs and keep nothing: {bucket, cpu_s, encode_s, bytes}.

        The first sample is processed twice, since its first pass only warms up.
        """
        costs = []
        for sample, pixels in self._prepared([planned[0], *planned]):
            start = time.monotonic()
            row = self._encode(sample, pixels)
            size = sum(len(row[name] or b"") for name in ("hq_latent", "lq_latent"))
            times = {"cpu_s": pixels["seconds"], "encode_s": time.monotonic() - start}
            costs.append({"bucket": sample["bucket"], "bytes": size, **times})
        return costs[1:]

    def _rows(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._encode(sample, pixels) for sample, pixels in self._prepared(planned)]

    def _prepared(self, planned: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(planned row, its pixels) in order, with at most `samples_in_flight` decoded ahead."""
        waiting: deque[tuple[dict[str, Any], Any]] = deque()
        for sample in planned:
            waiting.append((sample, self.prepare.remote(sample, self.config.pixels)))
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
        start = time.monotonic()
        latents = encode_pair(self.vae, pixels["hq"], pixels["lq"], planned["seed"])
        prometheus.count(prometheus.MODEL_SECONDS, time.monotonic() - start, model="vae")
        return {**row, **latents, "degradation": pixels["degradation"]}


def plan_rows(
    config: SampleConfig, kept: KeptClips, data_url: str, variants: int = 1, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """The sample rows of every kept clip, both splits, one after the other."""
    for clip, split, text_tokens in kept.rows(data_url, list(_MEDIA_FIELDS)):
        extra = {"split": split, "text_tokens": text_tokens, "clip": clip}
        for sample in cropping.plan_samples(clip, config.buckets, config.native, variants, seed):
            yield {**sample, **extra}


def table_schema(config: PrecomputeConfig, fingerprint: str) -> pa.Schema:
    """Of latents/ that are made with these settings."""
    return schema.with_fingerprint(schema.LATENTS_SCHEMA, fingerprint, vae=config.vae)


def commit(latents_url: str, latents_schema: pa.Schema, reports: list[dict[str, Any]]) -> None:
    """Let the files of these reports belong to latents/, then their indices to latents/_index/."""
    indices = [
        delta_tables.DataFile(report["name"], report["index_rows"], report["index_bytes"])
        for report in reports
    ]
    work_plan.commit(latents_url, latents_schema, reports)
    delta_tables.append(storage.join(latents_url, schema.INDEX), schema.INDEX_SCHEMA, indices)


def index_file(latents_url: str, shard: work_plan.Shard) -> delta_tables.DataFile:
    """Write the index of one latents file: where each sample without an error stands."""
    file = storage.join(latents_url, shard.name)
    planned = {row["sample_id"]: row for row in work_plan.read_shard(latents_url, shard)}
    columns = ["sample_id", "clip_id", "media", "num_frames", "height", "width", "error"]
    rows = []
    for group_number in range(parquet.read_metadata(file).num_row_groups):
        group = parquet.read_table(file, columns, row_group=group_number).to_pylist()
        for row_number, row in enumerate(group):
            if row.pop("error") is not None:
                continue
            plan = planned[row["sample_id"]]
            size = (row["num_frames"], row["height"], row["width"])
            rows.append(
                {
                    **row,
                    "split": plan["split"],
                    "file": shard.name,
                    "row_group": group_number,
                    "row": row_number,
                    "bucket": plan["bucket"],
                    "video_tokens": schema.video_tokens(*size),
                    "text_tokens": plan["text_tokens"],
                }
            )
    table = pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA)
    index_url = storage.join(latents_url, schema.INDEX)
    return delta_tables.write_file(index_url, shard.name, [table], schema.INDEX_SCHEMA)


def complete_index(latents_url: str) -> int:
    """Index the files whose task was killed before it could; returns the number of indexed samples."""
    index_url = storage.join(latents_url, schema.INDEX)
    latents, index = (delta_tables.open_table(url) for url in (latents_url, index_url))
    missing = (latents.names if latents else set()) - (index.names if index else set())
    if missing:
        shards = [shard for shard in work_plan.planned_shards(latents_url) if shard.name in missing]
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(functools.partial(index_file, latents_url), shards))
        delta_tables.append(index_url, schema.INDEX_SCHEMA, files)
        index = delta_tables.open_table(index_url)
    return index.rows if index else 0


def latents_fingerprint(config: PrecomputeConfig) -> str:
    """Names everything that determines the rows of latents/."""
    return hashing.fingerprint(
        vae=weights_folder.weights_hash(config.vae),
        video_recipe=config.video_recipe.settings(),
        image_recipe=config.image_recipe.settings(),
        seed=config.seed,
    )


def write_texts(
    config: SampleConfig, kept: KeptClips, data_url: str, cpus: float = 1.0, gpus: float = 0.0
) -> None:
    """Fill text/, and `kept` with the text tokens of its clips. cpus, gpus: reserved for each encoder."""
    if config.fixed_text is not None:
        text_embeddings.fix_kept_clips(data_url, kept, config.fixed_text)
        return
    assert config.text is not None  # SampleConfig has checked
    text_embeddings.embed_kept_clips(data_url, kept, config.text, cpus, gpus)


class _Counted:
    """Planned rows as they pass: how many there are of each kind."""

    def __init__(self) -> None:
        self.buckets: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.clips = 0

    def watch(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        clip = ""
        for row in rows:
            self.buckets[row["bucket"]] += 1
            self.splits[row["split"]] += 1
            self.clips += row["clip_id"] != clip  # a clip's samples come in a row
            clip = row["clip_id"]
            yield row


def _make(config: PrecomputeConfig, kept: KeptClips, folder: str, summary: stage.Summary) -> None:
    """Text first (it is small), then latents, then what is missing of their index."""
    start = time.monotonic()
    write_texts(config, kept, config.data, config.encode_cpus, config.encode_gpus)
    text_s = time.monotonic() - start
    fingerprint = latents_fingerprint(config)
    counted = _Counted()
    planned = work_plan.plan(
        folder,
        counted.watch(plan_rows(config, kept, config.data, config.variants, config.seed)),
        "sample_id",
        fingerprint,
        config.samples_per_shard,
    )
    start = time.monotonic()
    reports = stage.run_shards(
        planned.pending,
        EncodeShard,
        "precompute: encode HQ and LQ",
        functools.partial(commit, folder, table_schema(config, fingerprint)),
        concurrency=config.encode_actors,
        constructor_args=(config, folder, fingerprint),
        num_cpus=config.encode_cpus,
        num_gpus=config.encode_gpus,
    )
    latents_s = time.monotonic() - start
    summary.rows_in = planned.rows
    summary.rows_kept = complete_index(folder)
    summary.errors = sum(report["errors"] for report in reports)
    summary.already_done = planned.already_done
    summary.bytes = sum(report["bytes"] for report in reports)
    made = sum(report["rows"] for report in reports)
    busy_s = sum(report["seconds"] for report in reports)
    summary.details = {
        "clips": counted.clips,
        "samples by bucket": dict(counted.buckets.most_common()),
        "samples by split": dict(counted.splits.most_common()),
        "seconds for text": round(text_s, 1),
        "seconds a sample and encoder": round(busy_s / made, 3) if made else 0.0,
        "samples/s": round(made / latents_s, 3) if made else 0.0,
        "hours for all planned samples at this rate": (
            round(latents_s / made * planned.rows / 3600, 3) if made else 0.0
        ),
    }


def run(config: PrecomputeConfig) -> stage.Summary:
    """text/, latents/ and latents/_index/ of every kept clip; or, in a dry run, what they would cost."""
    folder = storage.join(config.data, schema.LATENTS)
    kept = KeptClips(config.data)
    fingerprint = latents_fingerprint(config)
    work_plan.check_fingerprint(folder, fingerprint)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.data, config.shared_filesystem, "data")
        if not config.dry_run:
            _make(config, kept, folder, summary)
            return
        actor: Any = ray.remote(num_cpus=config.encode_cpus, num_gpus=config.encode_gpus)(EncodeShard)
        encoder = actor.remote(config, folder, fingerprint)

        def measure(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return ray.get(encoder.measure.remote(samples))

        rows = plan_rows(config, kept, config.data, config.variants, config.seed)
        found = precompute_cost.estimate(rows, config.dry_run_samples, measure)
        summary.rows_in = sum(bucket.samples for bucket in found)
        summary.details = precompute_cost.details(
            found, config.encode_actors, config.encode_gpus, stage.cores()
        )
        print(precompute_cost.table(found), flush=True)
        ray.kill(encoder)

    if config.dry_run:
        return stage.run_stage("precompute (dry run)", storage.join(config.data, _ESTIMATE), work)
    return stage.run_stage("precompute", folder, work)
