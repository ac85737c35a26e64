"""Savings and costs of the training system.

    python -m benchmarks.training                   (7 to 25 minutes on 2 cores; nothing else should run)
    python -m benchmarks.training --only packing    (or online, wait, readers, peak: the others stay)
    python -m benchmarks.training --short           (shows that it runs, its numbers mean nothing)

fp32 on the CPU. Prints each part, writes out/bench/training.json:
    precomputed_vs_online   seconds of a step that decodes, degrades, embeds and encodes its sample over those
                            of one that reads it: at an encode-to-forward ratio of 1 to 1 (the paper's), and
                            with the demo's two models as they are. Nothing overlaps
    precomputed_predicted   the same from the parts, each timed alone
    data_wait_share         of a real job's steps (train_dit under Ray): time waiting for data
    packed_vs_padded        samples/s of our packs over sorted, padded batches (training_packing.py)
    packed_vs_bucketed      the same over batches of equal size
    reader_vs_torch         samples/s of our reader over a DataLoader's (training_readers.py): the least ratio
                            of cold, warm and S3
    reader_vs_webdataset    over WebDataset's, likewise; null where it is not installed, and a line says so
    peak_share_step         counted FLOPs of a whole step (forward, backward, clipping, AdamW, moving
                            average) at the paper's width over those of matrix products timed beside it
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import training_packing, training_readers
from benchmarks.attention import share_of_product_rate
from benchmarks.data import demo_clips, timed
from model import flops, flow, text_encoders
from model.dit.swin_mmdit import SD3_MEDIUM, TINY, SwinMMDiT, SwinMMDiTConfig
from model.text_encoders import TINY_ENCODERS, TextEncoders
from pipeline.data import cropping, precompute
from pipeline.data.cropping import Bucket
from pipeline.data.sample_pixels import prepare_sample, read_crop
from pipeline.store import bf16_columns, storage
from pipeline.training.runs import train_dit, trainer
from pipeline.training.samples import latent_reader
from pipeline.training.samples.batch import Batch
from pipeline.video.sandbox import shared as shared_sandbox
from pipeline.weights import weights_folder

OUT = Path("out/bench/training.json")
VAE = f"file://{Path('demo/weights/vae').resolve()}"
BUCKET = Bucket(5, 128, 128)
DEMO_MODEL = dataclasses.replace(TINY, num_layers=5, num_heads=6, head_dim=32, windows=((5, 16, 16),))
"""The shape of demo/weights/dit."""
WIDE = dataclasses.replace(TINY, num_heads=8, head_dim=32, windows=((5, 16, 16),))
"""Layers are added until a forward pass costs what encoding one video does."""


# --- (a) precomputed against online ---


class Learner:
    """A network that is trained on one sample a step."""

    def __init__(self, config: SwinMMDiTConfig) -> None:
        torch.manual_seed(0)
        self.model = SwinMMDiT(config)
        self.adam = torch.optim.AdamW(self.model.parameters(), 1e-4)

    def forward(self, batch: Batch) -> Tensor:
        return train_dit.forward(self.model, batch)

    def step(self, batch: Batch) -> None:
        self.adam.zero_grad()
        batch.sample_losses(self.forward(batch)).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()


class Sources:
    """The demo's clips, and one sample of each at every stage of its way."""

    def __init__(self, samples: int) -> None:
        self.config = precompute.PrecomputeConfig(data="/none", vae=VAE, text=TINY_ENCODERS, buckets=[BUCKET])
        self.vae = weights_folder.load_vae(VAE).eval()
        self.encoders = TextEncoders(TINY_ENCODERS)
        self.null = self.encoders.encode([""])[0]
        planned = [
            {**sample, "clip": clip}
            for clip in demo_clips()
            for sample in cropping.plan_samples(clip, [BUCKET], None, 1, seed=0)
        ]
        self.planned = [planned[i % len(planned)] for i in range(samples)]
        prepare_sample(self.planned[0], self.config.pixels)  # starts the decoding process

    def pixels(self, number: int) -> dict[str, Any]:
        """Decoded, cropped and degraded."""
        made = prepare_sample(self.planned[number], self.config.pixels)
        assert "error" not in made, made
        return made

    def frames(self, number: int) -> Any:
        """Decoded and cropped only, as the sandbox's process does it."""
        sample = self.planned[number]
        clip, (first, top, left) = sample["clip"], sample["crop"]
        window = (top, left, BUCKET.height, BUCKET.width)
        sandbox = shared_sandbox(self.config.decode_seconds)
        path = storage.path_of(clip["uri"])
        return sandbox.call(read_crop, clip, path, first, BUCKET.frames, window)

    def encoded(self, number: int, pixels: dict[str, Any]) -> dict[str, Any]:
        return precompute.encode_pair(self.vae, pixels["hq"], pixels["lq"], self.planned[number]["seed"])

    def batch(self, columns: dict[str, Any], embedding: text_encoders.TextEmbedding) -> Batch:
        hq, lq = (bf16_columns.from_columns(columns, f"{which}_latent") for which in ("hq", "lq"))
        return self.batch_of(hq, lq, embedding)

    def batch_of(self, hq: Tensor, lq: Tensor, embedding: text_encoders.TextEmbedding) -> Batch:
        """A training sample of its own, as `training_sample` makes it."""
        shape = (hq.shape[0], hq.shape[1], hq.shape[2])
        draws = flow.draw_training(lq.flatten(0, 2), [shape], torch.Generator())
        tokens, pooled = text_encoders.join(embedding, self.null, False, False, False)
        return Batch(
            hq.flatten(0, 2),
            draws.noise,
            draws.condition,
            tokens,
            pooled[None],
            [shape],
            [len(tokens)],
            draws.time,
            ["a"],
            ["b"],
        )

    def store(self, folder: str) -> None:
        """latents/ and text/ of all samples, as precompute writes them."""
        latents, texts = {}, {}
        for number, sample in enumerate(self.planned):
            latents[f"{number:06d}"] = self.encoded(number, self.pixels(number))
            texts[f"{number:06d}"] = self.encoders.encode([sample["clip"]["caption"] or ""])[0]
        training_readers.write_tables(f"file://{folder}", 0, latents, texts, self.null, BUCKET)


def parts_of(sources: Sources, learner: Learner, stored: str) -> dict[str, Callable[[int], Any]]:
    """Each part of a step both ways, and the two steps whole, on a sample; stored: the URL of all."""
    samples = range(len(sources.planned))
    captions = [sample["clip"]["caption"] or "" for sample in sources.planned]
    pixels = [sources.pixels(number) for number in samples]
    columns = [sources.encoded(number, pixels[number]) for number in samples]
    embeddings = [sources.encoders.encode([caption])[0] for caption in captions]
    made = [sources.batch(c, e) for c, e in zip(columns, embeddings, strict=True)]
    reader = latent_reader.LatentReader(stored)
    index = sorted(latent_reader.read_index(stored).to_pylist(), key=lambda row: row["sample_id"])

    def read(number: int) -> Batch:
        latents = reader.latents(index[number], 0)
        return sources.batch_of(*latents, reader.text(index[number]["clip_id"]))

    def online(number: int) -> Batch:
        embedding = sources.encoders.encode([captions[number]])[0]
        return sources.batch(sources.encoded(number, sources.pixels(number)), embedding)

    return {
        "decode": sources.frames,
        "decode and degrade": sources.pixels,
        "encode HQ and LQ": lambda number: sources.encoded(number, pixels[number]),
        "text": lambda number: sources.encoders.encode([captions[number]]),
        "noise": lambda number: sources.batch(columns[number], embeddings[number]),
        "read and noise": read,
        "forward": lambda number: learner.forward(made[number]),
        "step": lambda number: learner.step(made[number]),
        "whole online": lambda number: learner.step(online(number)),
        "whole precomputed": lambda number: learner.step(read(number)),
    }


def online_of(sources: Sources, learner: Learner) -> dict[str, Any]:
    """Seconds a step both ways, and what the parts add up to."""
    samples = range(len(sources.planned))
    with tempfile.TemporaryDirectory() as folder:
        sources.store(folder)
        parts = parts_of(sources, learner, f"file://{folder}")
        for work in parts.values():  # warms up
            work(0)
        seconds = dict.fromkeys(parts, 0.0)
        for number in samples:  # the parts take turns: a shared machine's speed changes by the minute
            for name, work in parts.items():
                seconds[name] += timed(functools.partial(work, number)) / len(samples)
    seconds["degrade"] = seconds["decode and degrade"] - seconds["decode"]
    kinds = ("decode", "degrade", "encode HQ and LQ", "text", "noise", "step")
    predicted = sum(seconds[name] for name in kinds)
    return {
        "measured": seconds["whole online"] / seconds["whole precomputed"],
        "predicted": predicted / (seconds["read and noise"] + seconds["step"]),
        "encode_over_forward": seconds["encode HQ and LQ"] / 2 / seconds["forward"],
        "encode_and_step_over_step": (seconds["encode HQ and LQ"] + seconds["step"]) / seconds["step"],
        "online_shares": {name: seconds[name] / predicted for name in kinds},
        "seconds": seconds,
    }


def layers_like_encode(sources: Sources) -> int:
    """How many layers of WIDE take as long forward as one video takes to encode."""
    pixels = [sources.pixels(number) for number in range(4)]
    columns = [sources.encoded(number, pixels[number]) for number in range(4)]
    batch = sources.batch(columns[0], sources.null)
    encode = min(timed(functools.partial(sources.encoded, n, pixels[n])) for n in range(4)) / 2
    learners = [Learner(dataclasses.replace(WIDE, num_layers=n)) for n in (2, 10)]
    few, many = (min(timed(functools.partial(one.forward, batch)) for _ in range(5)) for one in learners)
    return max(1, round(2 + (encode - few) / (many - few) * 8))


def online(short: bool) -> dict[str, Any]:
    """Measure (a), precomputed against online latents."""
    sources = Sources(4 if short else 40)
    one_to_one = dataclasses.replace(WIDE, num_layers=layers_like_encode(sources))
    found = {
        "one_to_one": {"layers": one_to_one.num_layers, **online_of(sources, Learner(one_to_one))},
        "demo_models": online_of(sources, Learner(DEMO_MODEL)),
    }
    return {
        "precomputed_vs_online": {name: result["measured"] for name, result in found.items()},
        "precomputed_predicted": {name: result["predicted"] for name, result in found.items()},
        "online": found,
    }


# --- (b) waiting for data, (e) share of the peak ---


def wait(short: bool) -> dict[str, Any]:
    """Measure (b) with two workers of one core each, on samples with text of SD3's widths."""
    steps = 4 if short else 40
    model = dataclasses.replace(SD3_MEDIUM, num_layers=4, num_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        training_readers.write_latents(f"file://{folder}", 64 if short else 512)
        config = train_dit.TrainDitConfig(
            data=f"file://{folder}",
            output=f"file://{folder}/run",
            model=model,
            stages=[train_dit.StageConfig("5x256x256", ["5x256x256"], steps, 1e-4, tokens_per_pack=2048)],
            scale=trainer.ScaleConfig(num_workers=2),
            packs_per_step=2,
            checkpoint_every=10**6,
            heldout_triples=4,
        )
        train_dit.run(config)
        history = storage.read_json(f"file://{folder}/run/weights/dit/history.json")["steps"]
    shares = [step["wait_share"] for step in history]
    seconds = [step["seconds"] for step in history]
    total = sum(share * s for share, s in zip(shares, seconds, strict=True)) / sum(seconds)
    return {
        "data_wait_share": total,
        "data_wait_share_first_step": shares[0],
        "data_wait_share_later_median": statistics.median(shares[1:]),
        "seconds_a_step": statistics.median(seconds),
        "samples_a_step": statistics.mean(step["samples"] for step in history),
        "imbalance": statistics.mean(step["imbalance"] for step in history),
    }


def peak(short: bool) -> dict[str, Any]:
    """Measure (e): two layers of the paper's width on a video and two images, 154 text tokens each."""
    config = dataclasses.replace(SD3_MEDIUM, num_layers=2)
    learner = Learner(config)
    average = [parameter.detach().clone() for parameter in learner.model.parameters()]
    shapes = [(1, 32, 32)] if short else [(3, 64, 64), (1, 64, 64), (1, 64, 64)]
    rows = sum(t * h * w for t, h, w in shapes)
    batch = Batch(
        data=torch.randn(rows, config.out_channels),
        noise=torch.randn(rows, config.out_channels),
        condition=torch.randn(rows, config.out_channels),
        text=torch.randn(154 * len(shapes), config.text_dim),
        pooled=torch.randn(len(shapes), config.pooled_dim),
        video_shapes=shapes,
        text_lengths=[154] * len(shapes),
        timestep=torch.full((len(shapes),), 500.0),
        sample_ids=["a"] * len(shapes),
        buckets=["b"] * len(shapes),
    )

    def step() -> None:
        learner.step(batch)
        with torch.no_grad():
            for kept, parameter in zip(average, learner.model.parameters(), strict=True):
                kept.lerp_(parameter, 1e-4)

    counted = sum(flops.forward_flops(config, shape, 154).total for shape in shapes)
    step()
    training_flops = flops.TRAINING_OVER_FORWARD * counted
    share, rates = share_of_product_rate(step, training_flops, 1 if short else 3)
    return {"peak_share_step": share, "product_gflops": [min(rates) / 1e9, max(rates) / 1e9]}


def packing(short: bool) -> dict[str, Any]:
    """Measure (c), ways to make batches."""
    found = training_packing.run(short)
    ratios = {"packed_vs_padded": found["ratio_padded"], "packed_vs_bucketed": found["ratio_bucketed"]}
    return {**ratios, "packing": found}


def readers(short: bool) -> dict[str, Any]:
    """Measure (d) in the folder OPENSEEDVR_BENCH_DIR, for machines whose /tmp is memory."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("OPENSEEDVR_BENCH_DIR")) as folder:
        found = training_readers.run(folder, short)
    least = found["ratio_least"]
    return {"reader_vs_torch": least["torch"], "reader_vs_webdataset": least["webdataset"], "readers": found}


def main() -> None:
    parts = {"online": online, "wait": wait, "packing": packing, "readers": readers, "peak": peak}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=parts, help="one part; the others keep their last recorded numbers")
    parser.add_argument(
        "--short", action="store_true", help="as little of each as possible, nothing is written"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name, part in parts.items():
        if arguments.only in (None, name):
            found = part(arguments.short)
            print(name, json.dumps(found, indent=1), flush=True)
            result |= found | {f"load_before_{name}": os.getloadavg()[0]}
            if not arguments.short:
                OUT.parent.mkdir(parents=True, exist_ok=True)
                OUT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
