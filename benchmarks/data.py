"""Cost of the data stages relative to the work that nobody can avoid: decoding, the autoencoder.

    python -m benchmarks.data                 (about 20 minutes on 2 cores; nothing else should run)
    python -m benchmarks.data --only KEY ...  (some of the numbers; the others stay as they were)
    python -m benchmarks.data --short         (a minute or two: shows that it runs, its numbers mean nothing)

One thread in each process; rivals take turns. Prints a table, writes out/bench/data.json:
    filter_vs_decode            frames/s of all weight-free scores but NIQE over those of bare PyAV decoding
    niqe_vs_basicsr             NIQE frames/s over basicsr's 1.4.2 (0.86 s for a 720p frame on one such core)
    cpu_path_clips_per_s_core   decode, crop, degrade: samples/s of one core, by bucket
    precompute_vae_share        share of a 5x256x256 sample's seconds that the full-size autoencoder takes
    ray_overhead                seconds a shard under Ray over those in a pool of 2 processes, less 1
"""

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import av
import cv2
import torch

from model.text_encoders import TINY_ENCODERS
from model.vae.autoencoder import FULL_CONFIG, CausalVideoAutoencoder
from pipeline.data import cropping, ingest, precompute
from pipeline.data import filter as filter_stage
from pipeline.data.filter import FilterConfig
from pipeline.data.sample_pixels import prepare_sample
from pipeline.data.scorers import technical
from pipeline.metrics import niqe
from pipeline.runtime import stage, work_plan
from pipeline.store import hashing, schema, storage
from pipeline.video import decoding

OUT = Path("out/bench")
MEDIA = Path("demo/media").resolve()
BASICSR_NIQE_S = 0.86
BUCKETS = [
    cropping.Bucket(1, 256, 256),
    cropping.Bucket(5, 256, 256),
    cropping.Bucket(9, 512, 512),
    cropping.Bucket(21, 256, 256),
]
KEYS = (
    "filter_vs_decode",
    "niqe_vs_basicsr",
    "cpu_path_clips_per_s_core",
    "precompute_vae_share",
    "ray_overhead",
)
_SAMPLED_FRAMES = 8
_PROCESSES = 2


def demo_clips() -> list[dict[str, Any]]:
    """Rows of clips/ of the bundled files."""
    with tempfile.TemporaryDirectory() as folder:
        config = ingest.IngestConfig(input=str(MEDIA), output=folder, max_clip_frames=49)
        sandbox = ingest.shared_sandbox(config.time_limit_s)
        found = [ingest.ingest_source(source, config, sandbox) for source in ingest.list_sources(config)]
    return [row for rows in found for row in rows if row["error"] is None]


def in_turns(rounds: int, **rivals: Callable[[], float]) -> dict[str, float]:
    """The sum of what each rival returns (seconds), over rounds in which each runs once."""
    total = dict.fromkeys(rivals, 0.0)
    for _ in range(rounds):
        for name, run in rivals.items():
            total[name] += run()
    return total


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def decode_bare(path: str) -> int:
    """Every frame of a file through PyAV alone, one thread; returns their number."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def filter_vs_decode(clips: list[dict[str, Any]], rounds: int) -> dict[str, float]:
    """Both rivals go through the same files from end to end."""
    videos = [clip for clip in clips if clip["media"] == "video"]
    paths = sorted({storage.path_of(clip["uri"]) for clip in videos})
    sources = [[clip for clip in videos if storage.path_of(clip["uri"]) == path] for path in paths]
    frames = sum(decode_bare(path) for path in paths)
    scored = sum(clip["num_frames"] for clip in videos)

    def score() -> None:
        for path, own in zip(paths, sources, strict=True):
            assert len(list(technical.measure_clips(own, path, _SAMPLED_FRAMES, 0))) == len(own)

    seconds = in_turns(
        rounds,
        decode=lambda: timed(lambda: [decode_bare(path) for path in paths]),
        filter=lambda: timed(score),
    )
    rates = {"decode": rounds * frames / seconds["decode"], "filter": rounds * scored / seconds["filter"]}
    return {"ratio": rates["filter"] / rates["decode"], **{f"{k}_frames_per_s": v for k, v in rates.items()}}


def niqe_vs_basicsr(rounds: int) -> dict[str, float]:
    frame = next(decoding.decode_frames(str(MEDIA / "trailer_bbb.mp4"), max_frames=1))
    frame = cv2.resize(frame, (1280, 720))
    niqe.niqe(frame)
    seconds = min(timed(lambda: niqe.niqe(frame)) for _ in range(rounds))
    return {"ratio": BASICSR_NIQE_S / seconds, "seconds_a_720p_frame": seconds}


def cpu_path(clips: list[dict[str, Any]], samples: int, encoder_mpx_per_s: float) -> dict[str, Any]:
    """Samples/s of a core by bucket, and the cores that feed one GPU that encodes so many megapixels/s."""
    config = precompute.PrecomputeConfig(data="/none", vae="/none", text=TINY_ENCODERS, buckets=BUCKETS)
    found: dict[str, Any] = {}
    for bucket in BUCKETS:
        planned = [
            {**sample, "clip": clip}
            for variant in range(samples)
            for clip in clips
            for sample in cropping.plan_samples(clip, [bucket], None, 1, seed=variant)
        ][:samples]
        if not planned:
            continue
        prepare_sample(planned[0], config.pixels)  # starts the decoding process
        seconds = sum(prepare_sample(sample, config.pixels)["seconds"] for sample in planned)
        rate = len(planned) / seconds
        megapixels = 2 * bucket.frames * bucket.height * bucket.width / 1e6  # HQ and LQ
        found[bucket.name] = {
            "clips_per_s_core": rate,
            "cores_for_one_gpu": encoder_mpx_per_s / megapixels / rate,
        }
    return found


def vae_share(clips: list[dict[str, Any]], samples: int) -> dict[str, float]:
    config = precompute.PrecomputeConfig(data="/none", vae="/none", text=TINY_ENCODERS, buckets=BUCKETS)
    videos = [clip for clip in clips if cropping.fits(clip, BUCKETS[1])]
    torch.manual_seed(0)
    vae = CausalVideoAutoencoder(FULL_CONFIG).eval()
    seconds = {"prepare": 0.0, "encode": 0.0}
    for clip in videos[:samples]:
        (planned,) = cropping.plan_samples(clip, BUCKETS[1:2], None, 1, seed=0)
        pixels = prepare_sample({**planned, "clip": clip}, config.pixels)
        seconds["prepare"] += pixels["seconds"]
        seconds["encode"] += timed(
            lambda pixels=pixels: precompute.encode_pair(vae, pixels["hq"], pixels["lq"], 0)
        )
    return {"share": seconds["encode"] / sum(seconds.values()), **seconds}


def steady_seconds_a_shard(folder: Path) -> tuple[float, float]:
    """Seconds per shard, and the minutes over which they were measured, from the files' times.

    The first and the last twentieth are left out, since start-up and tail do not count.
    """
    times = sorted(path.stat().st_mtime for path in folder.glob("part-*.parquet"))
    skip = max(1, len(times) // 20)
    seconds = times[-1 - skip] - times[skip]
    return seconds / (len(times) - 1 - 2 * skip), seconds / 60


def _score_in_pool(arguments: tuple[str, FilterConfig]) -> None:
    filter_stage.score_shard({"shard": arguments[0]}, arguments[1])


def filter_shards(clips: list[dict[str, Any]], copies: int, rival: str) -> tuple[float, float]:
    """The clips so often through the filter's own shards, in a pool or under Ray."""
    many = [
        {**clip, "clip_id": hashing.stable_id(clip["clip_id"], n), "source_id": f"{clip['source_id']}{n}"}
        for n in range(copies)
        for clip in clips
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = FilterConfig(data=folder, thresholds={})
        scores = storage.join(config.data, schema.SCORES)
        pending = work_plan.plan(
            scores, many, "clip_id", config.fingerprint, config.clips_per_shard, near=itemgetter("source_id")
        ).pending
        if rival == "pool":
            with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
                list(pool.imap_unordered(_score_in_pool, [(shard.to_json(), config) for shard in pending]))
        else:
            stage.connect()
            commit = functools.partial(work_plan.commit, scores, config.table_schema)
            stage.run_shards(pending, filter_stage.score_shard, "score", commit, _PROCESSES, (config,))
        return steady_seconds_a_shard(Path(folder) / schema.SCORES)


def ray_overhead(clips: list[dict[str, Any]], minutes: float) -> dict[str, float]:
    """Seconds per shard under Ray for so many minutes, and in a pool before and after it.

    The pool runs for a quarter of that time each. A machine that slows down meanwhile then favours neither.
    """
    one = FilterConfig(data="/none", thresholds={})
    filter_stage.score_clips(clips[:1], one)  # starts the decoding process
    pass_s = timed(lambda: filter_stage.score_clips(clips, one)) / _PROCESSES
    copies = max(1, round(minutes * 60 / pass_s))
    before, _ = filter_shards(clips, max(1, copies // 4), "pool")
    under_ray, measured = filter_shards(clips, copies, "ray")
    after, _ = filter_shards(clips, max(1, copies // 4), "pool")
    pool = (before + after) / 2
    return {
        "overhead": under_ray / pool - 1,
        "minutes_under_ray": measured,
        "clips_under_ray": copies * len(clips),
        "ray_s_a_shard": under_ray,
        "pool_s_a_shard": pool,
        "pool_before_s": before,
        "pool_after_s": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=KEYS, help="these numbers alone")
    parser.add_argument("--short", action="store_true", help="as little of each as possible")
    parser.add_argument(
        "--encoder_mpx_per_s", type=float, default=100.0, help="megapixels that one GPU encodes in a second"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that are started
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    clips = demo_clips()
    rounds, samples, encoded, minutes = (1, 2, 1, 0.1) if arguments.short else (6, 60, 10, 5.6)
    pieces: dict[str, Callable[[], Any]] = {
        "filter_vs_decode": lambda: filter_vs_decode(clips, rounds),
        "niqe_vs_basicsr": lambda: niqe_vs_basicsr(3 * rounds),
        "cpu_path_clips_per_s_core": lambda: cpu_path(clips, samples, arguments.encoder_mpx_per_s),
        "precompute_vae_share": lambda: vae_share(clips, encoded),
        "ray_overhead": lambda: ray_overhead(clips, minutes),
    }
    file = OUT / "data.json"
    result: dict[str, Any] = json.loads(file.read_text()) if arguments.only and file.exists() else {}
    for name in arguments.only or KEYS:
        result[name] = pieces[name]()
        print(name, json.dumps(result[name]), flush=True)
        OUT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"clips": len(clips), **result}, indent=1))


if __name__ == "__main__":
    main()
