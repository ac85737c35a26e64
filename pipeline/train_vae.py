"""Train the causal video autoencoder on crops of the kept clips (paper section 3.2: L1 and a small KL here).

clips/ + selection/ -> checkpoints/vae/ (to resume) and weights/vae/ (the moving average). Pixels are
decoded and cropped by a thread of each worker; which crops a step sees is a function of (seed, step).
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from degradations.recipe import LIGHT, RecipeConfig, apply, draw
from model import losses
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from pipeline import media, precompute, sampling, schema, stage, storage, training, weights
from pipeline.sandbox import MediaError, Sandbox

NAME = "vae"


@dataclasses.dataclass(frozen=True)
class VaeStageConfig:
    """One stage of growing length."""

    crop: sampling.Bucket
    """frames and size of a video crop; images give 1-frame crops of the same size"""
    steps: int
    """optimiser steps"""
    learning_rate: float
    """after warm-up"""
    crops_per_worker: int
    """crops in one worker's batch (the paper's: 5 of 17x256x256)"""


@dataclasses.dataclass(frozen=True)
class TrainVaeConfig:
    """What `jobs.train_vae` reads."""

    data: str
    """absolute URL of the data root that holds clips/ and selection/"""
    output: str
    """absolute URL; checkpoints/vae, weights/vae and tensorboard/vae are written there"""
    model: AutoencoderConfig
    """the network's shape"""
    stages: list[VaeStageConfig]
    """in order; the run moves on by itself"""
    optimiser: training.OptimiserConfig = dataclasses.field(default_factory=training.OptimiserConfig)
    """AdamW, clipping, warm-up, moving average"""
    scale: training.ScaleConfig = dataclasses.field(default_factory=training.ScaleConfig)
    """workers and ZeRO"""
    measure_latent_scale: bool = True
    """write 1 / (spread of the last steps' latents) as the weights' latent_scale instead of model's"""
    kl_weight: float = 1e-6
    """of the KL divergence, summed over a crop's latent and averaged over its pixels"""
    image_share: float = 0.2
    """share of a batch's crops that are 1-frame images, where there are images"""
    degraded_share: float = 0.25
    """share of the crops that are degraded first: the autoencoder must carry bad video too"""
    degraded_recipe: RecipeConfig = LIGHT
    """how those are degraded"""
    crops_per_read: int = 4
    """crops taken from one decoded piece of a clip (decoding is slow, cropping is not)"""
    heldout_crops: int = 16
    """fixed crops of held-out clips, measured before and after each stage"""
    checkpoint_every: int = 200
    """steps between checkpoints"""
    initial_weights: str | None = None
    """URL of a weights folder to start from (null: random weights)"""
    seed: int = 0
    """of crops, posterior samples and initial weights"""

    def __post_init__(self) -> None:
        storage.check_url(self.data, "data")
        storage.check_url(self.output, "output")
        if not self.stages:
            raise ValueError("stages: give at least one")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def kept_clips(data_url: str, split: str) -> list[dict[str, Any]]:
    """The clips rows of one split, in a fixed order."""
    clips = storage.read_folder(storage.join(data_url, schema.CLIPS))
    selection = storage.read_folder(storage.join(data_url, schema.SELECTION))
    if clips is None or selection is None:
        raise ValueError(f"data: {data_url} has no clips/ or no selection/; run ingest and filter first")
    kept = {row["clip_id"] for row in selection.to_pylist() if row["keep"] and row["split"] == split}
    rows = sorted(clips.to_pylist(), key=lambda row: row["clip_id"])
    return [row for row in rows if row["clip_id"] in kept]


def fitting(clips: list[dict[str, Any]], crop: sampling.Bucket, where: str) -> list[dict[str, Any]]:
    """The clips that are large enough for a crop; images need one frame only."""
    image = dataclasses.replace(crop, frames=1)
    found = [clip for clip in clips if sampling.fits(clip, image if clip["media"] == "image" else crop)]
    if not found:
        raise ValueError(f"stages: no kept {where} clip is as large as {crop.name}")
    return found


class CropReader:
    """Decodes pieces of clips and cuts crops from them, in a child process that may die."""

    def __init__(self, config: TrainVaeConfig, clips: list[dict[str, Any]], crop: sampling.Bucket) -> None:
        self.config, self.crop = config, crop
        self.images = [clip for clip in clips if clip["media"] == "image"]
        self.videos = [clip for clip in clips if clip["media"] == "video"] or self.images
        self.sandbox = Sandbox(time_limit_s=120.0)

    def crops(self, *key: object) -> list[np.ndarray]:
        """`crops_per_read` crops, uint8 (T, H, W, 3), of a clip that the key draws. Unreadable clips are
        passed over for the next draw; ValueError after 20."""
        generator = np.random.default_rng(schema.stable_hash(self.config.seed, *key))
        for _ in range(20):
            image = self.images and generator.random() < self.config.image_share
            pool = self.images if image else self.videos
            clip = pool[generator.integers(len(pool))]
            frames = 1 if clip["media"] == "image" else self.crop.frames
            try:
                pixels = self._read(clip, int(generator.integers(clip["num_frames"] - frames + 1)), frames)
                return [self._cut(pixels, clip, generator) for _ in range(self.config.crops_per_read)]
            except (MediaError, ValueError, OSError) as error:
                print(f"passed over {clip['uri']}: {error}", flush=True)
        raise ValueError("data: 20 clips in a row could not be read")

    def _read(self, clip: dict[str, Any], first: int, frames: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(clip["uri"], folder) as path:
            return self.sandbox.call(media.read_frames, clip, path, first, frames)

    def _cut(self, pixels: np.ndarray, clip: dict[str, Any], generator: np.random.Generator) -> np.ndarray:
        top = generator.integers(pixels.shape[1] - self.crop.height + 1)
        left = generator.integers(pixels.shape[2] - self.crop.width + 1)
        cut = pixels[:, top : top + self.crop.height, left : left + self.crop.width]
        if generator.random() < self.config.degraded_share:
            seed = int(generator.integers(2**62))
            cut = np.ascontiguousarray(cut)
            fps, shape = clip["fps"] or 25.0, (cut.shape[0], cut.shape[1], cut.shape[2])
            cut = apply(draw(self.config.degraded_recipe, seed, shape, fps), cut).lq
        return cut

    def close(self) -> None:
        self.sandbox.close()


def crop_batches(reader: CropReader, config: VaeStageConfig, first_step: int, stage_index: int) -> Iterator:
    """A rank's batches from a step on: lists of crops, videos and images of one size mixed."""
    step = first_step
    while True:
        batch: list[np.ndarray] = []
        reads = -(-config.crops_per_worker // reader.config.crops_per_read)
        for number in range(reads):
            slot = number * training.world_size() + training.rank()
            batch += reader.crops("crop", stage_index, step, slot)
        yield batch[: config.crops_per_worker]
        step += 1


def by_length(crops: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Crops of equal length as one tensor each, (B, 3, T, H, W) in [-1, 1]."""
    lengths = sorted({len(crop) for crop in crops})
    groups = [[crop for crop in crops if len(crop) == length] for length in lengths]
    return [torch.cat([precompute.to_network(crop, device) for crop in group]) for group in groups]


def reconstruct(vae: CausalVideoAutoencoder, video: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Encode, sample the posterior with the given noise, decode: the reconstruction and both moments."""
    mean, log_variance = vae.encode(video)
    z = mean + torch.exp(0.5 * log_variance) * noise
    return {"video": vae.decode_unscaled(z), "mean": mean, "log_variance": log_variance}


class _Pass(torch.nn.Module):
    """`reconstruct` as a module's forward, so that an engine or functional_call can run it."""

    def __init__(self, vae: CausalVideoAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return reconstruct(self.vae, video, noise)


def latent_noise(config: AutoencoderConfig, video: Tensor, generator: torch.Generator) -> Tensor:
    batch, _, frames, height, width = video.shape
    shape = (batch, config.latent_channels, *config.latent_shape(frames, height, width))
    return torch.randn(shape, generator=generator).to(video)


def reconstruction_loss(
    output: dict[str, Tensor], video: Tensor, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + weighted KL of one batch, and its terms. The KL is a sum over latents, divided by the pixels."""
    l1 = (output["video"] - video).abs().mean()
    kl = losses.kl_divergence(output["mean"], output["log_variance"]).sum() / video.numel()
    spread = (output["mean"].square() + output["log_variance"].exp()).mean()  # about zero
    return l1 + kl_weight * kl, {
        "l1": l1.detach(),
        "kl": kl.detach(),
        "latent_variance": spread.detach(),
    }


class Run:
    """One rank's training: the engine, the moving average and the state that a checkpoint keeps."""

    def __init__(self, config: TrainVaeConfig) -> None:
        self.config = config
        self.device = training.setup_worker(config.scale)
        torch.manual_seed(config.seed)  # equal weights on every rank
        vae = CausalVideoAutoencoder(config.model)
        if config.initial_weights is not None:
            vae.load_state_dict(weights.load_vae(config.initial_weights).state_dict())
        model = _Pass(vae).to(self.device)
        self.average = training.MovingAverage(model, config.optimiser.ema_decay)
        self.engine = training.make_engine(model, config.scale, config.optimiser, accumulation=1)
        self.dtype = next(self.engine.module.parameters()).dtype
        fresh: dict[str, Any] = {"step": 0, "stage": 0, "stage_step": 0, "history": [], "held_out": []}
        self.state = training.resumed({NAME: self.engine}, {NAME: self.average}, fresh)
        self.log = training.Log(config.output, NAME, config.total_steps, self.state["history"])

    def train(self) -> None:
        while self.state["stage"] < len(self.config.stages):
            self.train_stage(self.config.stages[self.state["stage"]])
        self.finish()

    def train_stage(self, config: VaeStageConfig) -> None:
        held_out = self.held_out_crops(config)
        set_hash = schema.stable_id(*[crop.tobytes() for crop in held_out])
        if len(self.state["held_out"]) == self.state["stage"]:
            before = self.measure(held_out)
            self.state["held_out"].append(
                {"stage": config.crop.name, "before": before, "crops": len(held_out), "set_hash": set_hash}
            )
        clips = fitting(kept_clips(self.config.data, "train"), config.crop, "training")
        reader = CropReader(self.config, clips, config.crop)
        first = self.state["stage_step"]
        steps = training.prefetched(crop_batches(reader, config, first, self.state["stage"]), ahead=4)
        while self.state["stage_step"] < config.steps:
            self.train_step(config, steps)
            if self.state["step"] % self.config.checkpoint_every == 0:
                self.save()
        reader.close()
        self.state["held_out"][-1]["after"] = self.measure(held_out)
        self.state |= {"stage": self.state["stage"] + 1, "stage_step": 0}
        self.save()

    def train_step(self, config: VaeStageConfig, steps: Iterator[list[np.ndarray]]) -> None:
        start = time.monotonic()
        rate = training.warmed_up(
            config.learning_rate, self.state["stage_step"], self.config.optimiser.warmup_steps
        )
        training.set_learning_rate(self.engine, rate)
        crops = next(steps)
        waited_s = time.monotonic() - start
        generator = torch.Generator().manual_seed(
            schema.stable_hash(self.config.seed, "posterior", self.state["step"], training.rank())
        )
        total = torch.zeros((), device=self.device)
        terms = torch.zeros(3, device=self.device)
        for video in by_length(crops, self.device):
            video = video.to(self.dtype)
            output = self.engine(video, latent_noise(self.config.model, video, generator))
            loss, parts = reconstruction_loss(output, video, self.config.kl_weight)
            share = len(video) / len(crops)
            total = total + share * loss
            terms += share * torch.stack([parts["l1"], parts["kl"], parts["latent_variance"]])
        self.engine.backward(total)
        self.engine.step()
        self.average.update(self.engine.module, self.state["step"])
        l1, kl, latent_variance = (training.all_reduced(terms) / training.world_size()).tolist()
        seconds = time.monotonic() - start
        self.log.step(
            self.state["step"],
            config.crop.name,
            {
                "loss": l1 + self.config.kl_weight * kl,
                "l1": l1,
                "kl": kl,
                "latent_std": latent_variance**0.5,
                "seconds": seconds,
                "crops_per_second": len(crops) * training.world_size() / seconds,
                "learning_rate": rate,
                "wait_share": waited_s / seconds,
                "samples": len(crops) * training.world_size(),
            },
        )
        self.state["step"] += 1
        self.state["stage_step"] += 1

    def held_out_crops(self, config: VaeStageConfig) -> list[np.ndarray]:
        """The fixed crops of held-out clips, undegraded."""
        clean = dataclasses.replace(self.config, degraded_share=0.0)
        clips = fitting(kept_clips(self.config.data, "held_out"), config.crop, "held-out")
        reader = CropReader(clean, clips, config.crop)
        crops: list[np.ndarray] = []
        while len(crops) < self.config.heldout_crops:
            crops += reader.crops("held out", len(crops))
        reader.close()
        return crops[: self.config.heldout_crops]

    @torch.no_grad()
    def measure(self, crops: list[np.ndarray]) -> float:
        """Mean L1 (in [-1, 1] units) of the moving average's reconstruction from the posterior's mode."""
        whole = self.average.gathered(self.engine.module)
        average = {name: tensor.to(self.dtype) for name, tensor in whole.items()}
        total = torch.zeros(1, device=self.device)
        for crop in crops[training.rank() :: training.world_size()]:
            video = precompute.to_network(crop, self.device).to(self.dtype)
            noise = torch.zeros_like(latent_noise(self.config.model, video, torch.Generator()))
            output = functional_call(self.engine.module, average, (video, noise))
            total += (output["video"] - video).abs().mean()
        return float(training.all_reduced(total)) / len(crops)

    def save(self) -> None:
        self.log.flush()
        training.save_checkpoint({NAME: self.engine}, {NAME: self.average}, self.state)

    def latent_scale(self) -> float:
        """The configured scale, or, where it is to be measured, one that gives latents unit spread."""
        if not self.config.measure_latent_scale:
            return self.config.model.latent_scale
        last = [step["latent_std"] for step in self.state["history"][-50:]]
        return round(len(last) / sum(last), 6)

    def finish(self) -> None:
        """Rank 0 writes the moving average and the history to weights/vae."""
        average = self.average.gathered(self.engine.module)
        if training.rank() == 0:
            url = storage.join(self.config.output, training.WEIGHTS, NAME)
            plain = {name.removeprefix("vae."): tensor for name, tensor in average.items()}
            about = {"steps": self.state["step"], "held_out": self.state["held_out"]}
            model = dataclasses.replace(self.config.model, latent_scale=self.latent_scale())
            weights.save_weights(url, weights.VAE, model, plain, about=about)
            history = {"steps": self.state["history"], "held_out": self.state["held_out"]}
            storage.write_json(storage.join(url, training.HISTORY), history)


def loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    Run(config["config"]).train()


def run(config: TrainVaeConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    for split, where in (("train", "training"), ("held_out", "held-out")):
        for stage_config in config.stages:
            fitting(kept_clips(config.data, split), stage_config.crop, where)

    def work(summary: stage.Summary) -> None:
        training.start_trainer(loop, {"config": config}, config.scale, config.output, NAME)
        training.summarise(summary, storage.join(config.output, training.WEIGHTS, NAME))

    return stage.run_stage("train_vae", storage.join(config.output, training.WEIGHTS, NAME), work)
