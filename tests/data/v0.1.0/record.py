"""Records what commit 3c6535f (tag v0.1.0) writes, by that commit's own jobs; README.md says what is here.

`python tests/data/v0.1.0/record.py CHECKOUT FOLDER`: CHECKOUT is a checkout of the tag, FOLDER a new folder
to work in, whose path the tables then hold.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import boto3
import numpy as np
import psutil
from moto.server import ThreadedMotoServer
from PIL import Image

COMMIT = "3c6535f"
HERE = Path(__file__).resolve().parent
FRAMES, HEIGHT, WIDTH = 26, 96, 128
BUCKET = "footage"
CHECKPOINTS = {"vae": 4, "dit": 6}
"""The step, in the midst of a stage, whose checkpoint is kept."""

VAE: dict[str, Any] = {
    "widths": [4, 4, 4, 4],
    "latent_channels": 16,
    "norm_groups": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "time_halvings": 2,
    "latent_scale": 0.9152,
    "latent_shift": 0.0,
}
DIT: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_ratio": 2,
    "patch": [1, 2, 2],
    "in_channels": 33,
    "out_channels": 16,
    "text_dim": 64,
    "pooled_dim": 48,
    "windows": [[2, 8, 8]],
    "shifted": [False, True],
    "rotary": True,
}


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Each job's config."""
    footage, run = f"file://{folder}/footage", f"file://{folder}/run"
    crops = [{"frames": frames, "height": 64, "width": 64} for frames in (1, 5)]
    two_workers = {"num_workers": 2, "zero_stage": 2}
    return {
        "ingest": {
            "input": footage,
            "output": run,
            "dataset": "fixture",
            "max_clip_frames": 13,
            "sources_per_shard": 3,
        },
        "filter": {
            "data": run,
            "thresholds": {"exposure": {"min": 40}},
            "held_out": ["box.mp4", "cat.jpg"],
            "clips_per_shard": 4,
        },
        "train_vae": {
            "data": run,
            "output": run,
            "model": VAE,
            "perceptual": "none",
            "stages": [
                {"crop": {"frames": 5, "height": 32, "width": 32}, "steps": 6, "learning_rate": 1e-3,
                 "crops_per_worker": 2},
                {"crop": {"frames": 9, "height": 32, "width": 32}, "steps": 2, "learning_rate": 5e-4,
                 "crops_per_worker": 1},
            ],
            "optimiser": {"betas": [0.9, 0.99], "weight_decay": 0.01, "warmup_steps": 2, "ema_decay": 0.9},
            "scale": two_workers,
            "kl_weight": 1e-3,
            "adversarial": {
                "discriminator": {"width": 4, "layers": 2, "norm_groups": 2},
                "weight": 0.5,
                "learning_rate": 1e-3,
                "start_step": 0,
                "warmup_steps": 2,
            },
            "image_share": 0.4,
            "crops_per_read": 1,
            "heldout_crops": 2,
            "checkpoint_every": CHECKPOINTS["vae"],
            "keep_last": 9,
        },
        "precompute": {
            "data": run,
            "vae": f"{run}/weights/vae",
            "text": {"clip_l": "tiny", "clip_g": "tiny", "t5": "tiny"},
            "buckets": crops,
            "variants": 2,
            "samples_per_shard": 4,
        },
        "train_dit": {
            "data": run,
            "output": run,
            "model": DIT,
            "stages": [
                {"name": "images", "buckets": ["1x64x64"], "steps": 4, "learning_rate": 1e-3,
                 "tokens_per_pack": 32},
                {"name": "mixed", "buckets": ["1x64x64", "5x64x64"], "steps": 6, "learning_rate": 1e-3,
                 "tokens_per_pack": 64},
            ],
            "optimiser": {"warmup_steps": 1, "schedule": "cosine", "ema_decay": 0.9},
            "scale": two_workers,
            "packs_per_step": 2,
            "checkpoint_every": CHECKPOINTS["dit"] // 2,
            "keep_last": 9,
            "heldout_triples": 4,
        },
        "restore": {
            "input": f"s3://{BUCKET}/box.mp4",
            "model": {"weights": f"{run}/weights/dit", "vae": f"{run}/weights/vae"},
            "sampling": {"steps": 4, "chunk_frames": 9, "overlap_frames": 4, "slice_frames": 4},
            "encoding": {"codec": "ffv1"},
            "memory_gib": 4.0,
            "size": [24, 32],
            "previews": 0,
        },
        "convert": {"data": run, "output": f"file://{folder}/converted/dit"},
    }  # fmt: skip


def make_footage(media: Path, footage: Path) -> None:
    """Small cuts of the bundled media with their captions; a dark image, a twin and a broken file."""
    footage.mkdir(parents=True)
    for name in ("city.mp4", "box.mp4"):
        make_video(media / name, footage / name)
    for name in ("flower.jpg", "cat.jpg", "fig.jpg", "brushes.jpg"):
        picture = Image.open(media / name).convert("RGB").resize((160, 120))
        picture.crop((16, 12, 16 + WIDTH, 12 + HEIGHT)).save(footage / name, quality=90)
    Image.open(footage / "flower.jpg").save(footage / "twin.jpg", quality=60)
    (footage / "brushes.jpg").rename(footage / "dark.jpg")
    Image.open(footage / "dark.jpg").point(lambda level: level // 8).save(footage / "dark.jpg", quality=90)
    (footage / "broken.mp4").write_bytes((footage / "city.mp4").read_bytes()[:3000])
    (footage / "city.txt").write_text("office towers at night\n")
    (footage / "flower.json").write_text(json.dumps({"caption": "a dahlia", "license": "CC BY 2.0"}) + "\n")


def make_video(source: Path, target: Path) -> None:
    with av.open(str(source)) as video, av.open(str(target), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(24000, 1001), options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(video.decode(video=0)):
            if number == FRAMES:
                break
            pixels = np.ascontiguousarray(frame.to_ndarray(format="rgb24")[: 2 * HEIGHT : 2, : 2 * WIDTH : 2])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def start(checkout: Path, job: str, config: dict[str, Any], folder: Path) -> subprocess.Popen:
    """A job of the checkout on a Ray of its own."""
    file = folder / f"{job}.yaml"
    file.write_text(json.dumps(config))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{job}", "--config", str(file)],
        cwd=checkout,
        env={**kept, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )


def run(checkout: Path, job: str, config: dict[str, Any], folder: Path) -> None:
    if start(checkout, job, config, folder).wait():
        raise SystemExit(f"jobs.{job} failed")


def restore_half(checkout: Path, config: dict[str, Any], folder: Path) -> None:
    """A restoration that is killed, with all its processes, once it has saved a state."""
    output = Path(config["output"].removeprefix("file://"))
    while not list(output.glob("_parts/*/state.safetensors")):  # again, if it ended before it was killed
        shutil.rmtree(output, ignore_errors=True)
        process = start(checkout, "restore", config, folder)
        while process.poll() is None and not list(output.glob("_parts/*/state.safetensors")):
            time.sleep(0.001)
        if process.poll() is not None:
            continue
        everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in everything:
            one.kill()
        psutil.wait_procs(everything, timeout=30)


def put_into_bucket(file: Path) -> None:
    """Into an object store that ends with this process: a result goes by the URL of its source, and that one
    is the same wherever the results lie."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key=file.name, Body=file.read_bytes())


def kept_checkpoint(run_folder: Path, name: str) -> Path:
    (found,) = (run_folder / "checkpoints" / name).glob(f"checkpoint_{CHECKPOINTS[name]:08d}-*")
    return found


def record(checkout: Path, folder: Path) -> None:
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)
    assert head.startswith(COMMIT), f"{checkout} is at {head}"
    make_footage(checkout / "demo" / "media", folder / "footage")
    made = configs(folder)
    for job in ("ingest", "filter", "train_vae", "precompute", "train_dit"):
        run(checkout, job, made[job], folder)
    source = f"file://{kept_checkpoint(folder / 'run', 'dit')}"
    run(checkout, "convert", made["convert"] | {"source": source}, folder)
    put_into_bucket(folder / "footage" / "box.mp4")
    run(checkout, "restore", made["restore"] | {"output": f"file://{folder}/restored"}, folder)
    restore_half(checkout, made["restore"] | {"output": f"file://{folder}/half_restored"}, folder)


def keep(folder: Path) -> None:
    """Copy what the test reads to where this script lies."""
    for name in ("footage", "run", "converted", "restored", "half_restored"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        ignored = shutil.ignore_patterns("tensorboard", "checkpoints", "*.html")
        shutil.copytree(folder / name, HERE / name, ignore=ignored)
    for name in CHECKPOINTS:
        checkpoint = kept_checkpoint(folder / "run", name)
        shutil.copytree(checkpoint, HERE / checkpoint.relative_to(folder))


if __name__ == "__main__":
    checkout, folder = (Path(argument).resolve() for argument in sys.argv[1:])
    folder.mkdir(parents=True)
    record(checkout, folder)
    keep(folder)
