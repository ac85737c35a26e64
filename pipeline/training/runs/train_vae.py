"""Train the causal video autoencoder on crops of the kept clips (paper section 3.2: L1, LPIPS and a GAN).

clips/ + selection/ -> checkpoints/vae/ (to resume) and weights/vae/ (the moving average). Pixels are
decoded and cropped by a thread of each worker; which crops a step sees is a function of (seed, step).
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from degradations.recipe import LIGHT, RecipeConfig, apply, draw
from model import checkpoints
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from model.vae.discriminator import VideoDiscriminator
from model.vae.wavelet_start import check_wavelet_start, start_as_wavelets
from pipeline.data import cropping
from pipeline.metrics.psnr_ssim import psnr
from pipeline.runtime import stage
from pipeline.store import hashing, schema, source_cache, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.objectives import vae_loss
from pipeline.training.objectives.vae_loss import AdversarialConfig, Group, Objective
from pipeline.training.runs import run_log, trainer
from pipeline.training.state import ranks
from pipeline.training.state.checkpoint import Checkpoints
from pipeline.training.state.control import Orders, StoppedError, outcome
from pipeline.training.state.zero_fragments import MovingAverage
from pipeline.video import decoding, pixel_range
from pipeline.video.sandbox import MediaError, Sandbox
from pipeline.weights import weights_folder
from pipeline.weights.lpips_weights import check_perceptual, load_perceptual

NAME, DISCRIMINATOR = "vae", "discriminator"
EQUAL_PSNR_DB = 100.0
"""Counted for a crop that is reconstructed exactly (black frames), where PSNR is infinite."""


@dataclasses.dataclass(frozen=True)
class VaeStageConfig:
    """One stage of growing length."""

    crop: cropping.Bucket
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

    data: Url
    """absolute URL of the data root that holds clips/ and selection/"""
    output: Url
    """absolute URL; checkpoints/vae, weights/vae and tensorboard/vae are written there"""
    model: AutoencoderConfig
    """the network's shape"""
    stages: list[VaeStageConfig]
    """in order; the run moves on by itself"""
    perceptual: Url | Literal["none", "hub"]
    """absolute URL of a folder with LPIPS's published files vgg16-397923af.pth and vgg.pth; or the word hub
    (each node downloads them); or the word none, which is other training than the paper's"""
    optimiser: trainer.OptimiserConfig = dataclasses.field(default_factory=trainer.OptimiserConfig)
    """AdamW, clipping, warm-up, moving average"""
    scale: trainer.ScaleConfig = dataclasses.field(default_factory=trainer.ScaleConfig)
    """workers and ZeRO"""
    measure_latent_scale: bool = True
    """write 1 / (spread of the last steps' latents) as the weights' latent_scale instead of model's"""
    kl_weight: float = 1e-6
    """of the KL divergence, a sum over a crop's latent divided by the crop's pixel values"""
    perceptual_weight: float = 1.0
    """of LPIPS, where there is one, beside L1"""
    adversarial: AdversarialConfig | None = None
    """the discriminator (null: none)"""
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
    keep_last: int = 2
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """steps: checkpoints at their multiples are kept for good (0: none)"""
    start: Literal["random", "wavelets"] = "random"
    """where no weights are given: random, or a wavelet codec, which suits narrow models"""
    initial_weights: Url | None = None
    """URL of a weights folder to start from, as a run without a discriminator leaves (null: see `start`)"""
    initial_image_weights: Url | None = None
    """URL of a 2D image autoencoder's file to start from instead (diffusers' AutoencoderKL, such as SD3's)"""
    seed: int = 0
    """of crops, posterior samples and initial weights"""

    def __post_init__(self) -> None:
        check_urls(self)
        if not self.stages:
            raise ValueError("stages: give at least one")
        if self.scale.zero_stage not in (1, 2):
            raise ValueError(
                f"scale.zero_stage: {self.scale.zero_stage}; the autoencoder trains with 1 or 2, since the "
                "discriminator's loss needs whole weights on every worker"
            )
        if self.scale.workers[0] != self.scale.workers[1]:
            raise ValueError(
                "scale.num_workers: the autoencoder's batch is a number of crops a worker: give one"
            )
        if self.initial_weights is not None and self.initial_image_weights is not None:
            raise ValueError("initial_image_weights: initial_weights is given too; give one of them")
        if self.start == "wavelets":
            check_wavelet_start(self.model)

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


def fitting(clips: list[dict[str, Any]], crop: cropping.Bucket, where: str) -> list[dict[str, Any]]:
    """The clips that are large enough for a crop; images need one frame only."""
    image = dataclasses.replace(crop, frames=1)
    found = [clip for clip in clips if cropping.fits(clip, image if clip["media"] == "image" else crop)]
    if not found:
        raise ValueError(f"stages: no kept {where} clip is as large as {crop.name}")
    return found


class CropReader:
    """Decodes pieces of clips and cuts crops from them, in a child process that may die."""

    def __init__(self, config: TrainVaeConfig, clips: list[dict[str, Any]], crop: cropping.Bucket) -> None:
        self.config, self.crop = config, crop
        self.images = [clip for clip in clips if clip["media"] == "image"]
        self.videos = [clip for clip in clips if clip["media"] == "video"] or self.images
        self.sandbox = Sandbox(time_limit_s=120.0)

    def crops(self, *key: object) -> list[np.ndarray]:
        """`crops_per_read` crops, uint8 (T, H, W, 3), of a clip that the key draws. Unreadable clips are
        passed over for the next draw; ValueError after 20."""
        generator = np.random.default_rng(hashing.stable_hash(self.config.seed, *key))
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
        with source_cache.local_file(clip["uri"], clip.get("source_etag")) as path:
            return self.sandbox.call(decoding.read_frames, clip, path, first, frames)

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
    """A rank's batches of a stage from a step on: lists of crops, videos and images of one size mixed."""
    for step in range(first_step, config.steps):
        batch: list[np.ndarray] = []
        reads = -(-config.crops_per_worker // reader.config.crops_per_read)
        for number in range(reads):
            slot = number * ranks.world_size() + ranks.rank()
            batch += reader.crops("crop", stage_index, step, slot)
        yield batch[: config.crops_per_worker]


def by_length(crops: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Crops of equal length as one tensor each, (B, 3, T, H, W) in [-1, 1]."""
    lengths = sorted({len(crop) for crop in crops})
    groups = [[crop for crop in crops if len(crop) == length] for length in lengths]
    return [torch.cat([pixel_range.to_network(crop, device) for crop in group]) for group in groups]


def initial_autoencoder(config: TrainVaeConfig) -> CausalVideoAutoencoder:
    """With the weights that the config says, on the CPU; ValueError if given ones do not fit the model."""
    torch.manual_seed(config.seed)  # equal weights on every rank
    if config.initial_image_weights is not None:
        url = config.initial_image_weights
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
            return checkpoints.load_inflated_autoencoder(path, config.model).requires_grad_(True)
    vae = CausalVideoAutoencoder(config.model)
    if config.initial_weights is not None:
        state = weights_folder.load_vae(config.initial_weights).state_dict()
        checkpoints.load_strict(vae, state, f"initial_weights: {config.initial_weights}")
    elif config.start == "wavelets":
        start_as_wavelets(vae)
    return vae.requires_grad_(True)


class Run:
    """One rank's training: the engine, the moving average and the state that a checkpoint keeps."""

    def __init__(self, config: TrainVaeConfig, desk: Any) -> None:
        self.config = config
        self.device = trainer.setup_worker(config.scale)
        model = vae_loss.Pass(initial_autoencoder(config)).to(self.device)
        self.engine = trainer.make_engine(model, config.scale, config.optimiser, accumulation=1)
        self.average = MovingAverage(self.engine, config.optimiser.ema_decay)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.engines = {NAME: self.engine}
        if config.adversarial is not None:
            self.engines[DISCRIMINATOR] = self.make_discriminator(config.adversarial)
        perceptual = load_perceptual(config.perceptual)
        self.objective = Objective(
            self.engine,
            None if perceptual is None else perceptual.to(self.device, self.dtype),
            self.engines.get(DISCRIMINATOR),
            config.kl_weight,
            config.perceptual_weight,
            config.adversarial,
        )
        fresh: dict[str, Any] = {"step": 0, "stage": 0, "stage_step": 0, "history": [], "held_out": []}
        averages = {NAME: self.average}
        keep = config.keep_last, config.keep_every
        self.checkpoints = Checkpoints(config.output, NAME, self.engines, averages, *keep)
        self.state = self.checkpoints.resume(fresh)
        self.orders = Orders(desk)
        self.log = run_log.Log(config.output, NAME, config.total_steps, self.state["history"])

    def make_discriminator(self, adversarial: AdversarialConfig) -> Any:
        """The discriminator's engine; its weights depend on the seed alone."""
        torch.manual_seed(hashing.stable_hash(self.config.seed, DISCRIMINATOR))
        model = VideoDiscriminator(adversarial.discriminator).to(self.device)
        optimiser = dataclasses.replace(self.config.optimiser, betas=adversarial.betas, weight_decay=0.0)
        return trainer.make_engine(model, self.config.scale, optimiser, accumulation=1)

    def train(self) -> None:
        while self.state["stage"] < len(self.config.stages):
            self.train_stage(self.config.stages[self.state["stage"]])
        self.finish()

    def train_stage(self, config: VaeStageConfig) -> None:
        held_out = self.held_out_crops(config)
        set_hash = hashing.stable_id(*[crop.tobytes() for crop in held_out])
        if len(self.state["held_out"]) == self.state["stage"]:
            self.state["held_out"].append(
                {
                    "stage": config.crop.name,
                    **self.measure(held_out, "before"),
                    "crops": len(held_out),
                    "set_hash": set_hash,
                }
            )
        clips = fitting(kept_clips(self.config.data, "train"), config.crop, "training")
        reader = CropReader(self.config, clips, config.crop)
        first = self.state["stage_step"]
        steps = trainer.prefetched(crop_batches(reader, config, first, self.state["stage"]), ahead=4)
        while self.state["stage_step"] < config.steps:
            self.train_step(config, steps)
            save, stop = self.orders.now(self.device)
            if save or self.state["step"] % self.config.checkpoint_every == 0:
                self.save()
            if stop:
                raise StoppedError(
                    f"saved at step {self.state['step']} and left; started again, it goes on", False
                )
        reader.close()
        self.state["held_out"][-1] |= self.measure(held_out, "after")
        self.state |= {"stage": self.state["stage"] + 1, "stage_step": 0}
        self.save()

    def train_step(self, config: VaeStageConfig, steps: Iterator[list[np.ndarray]]) -> None:
        start = time.monotonic()
        step = self.state["step"]
        rate = self.set_learning_rates(config)
        crops = next(steps)
        waited_s = time.monotonic() - start
        seed = hashing.stable_hash(self.config.seed, "posterior", step, ranks.rank())
        generator = torch.Generator().manual_seed(seed)
        groups = [
            Group(
                video,
                vae_loss.latent_noise(self.config.model, video, generator),
                share=len(video) / len(crops),
            )
            for video in by_length(crops, self.device)
        ]
        terms = self.objective.step(step, groups)
        self.average.update(step)
        latent_variance = terms.pop("latent_variance")
        seconds = time.monotonic() - start
        self.log.step(
            step,
            config.crop.name,
            {
                "loss": terms.pop("loss"),
                **terms,
                "latent_std": latent_variance**0.5,
                "seconds": seconds,
                "crops_per_second": len(crops) * ranks.world_size() / seconds,
                "learning_rate": rate,
                "wait_share": waited_s / seconds,
                "samples": len(crops) * ranks.world_size(),
            },
        )
        self.state["step"] += 1
        self.state["stage_step"] += 1

    def set_learning_rates(self, config: VaeStageConfig) -> float:
        """Both optimisers' rates for this step; returns the autoencoder's."""
        optimiser = self.config.optimiser
        rate = trainer.scheduled(config.learning_rate, self.state["stage_step"], config.steps, optimiser)
        trainer.set_learning_rate(self.engine, rate)
        adversarial = self.config.adversarial
        if adversarial is not None and adversarial.trains(self.state["step"]):
            trained = self.state["step"] - adversarial.start_step
            own_rate = trainer.warmed_up(adversarial.learning_rate, trained, optimiser.warmup_steps)
            trainer.set_learning_rate(self.engines[DISCRIMINATOR], own_rate)
        return rate

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
    def measure(self, crops: list[np.ndarray], when: str) -> dict[str, float]:
        """Of the moving average's reconstruction from the posterior's mode: `when` L1 (in [-1, 1] units) and
        `psnr_<when>` (dB of 8-bit frames), means over the crops."""
        average = self.average.gathered(self.dtype)
        total = torch.zeros(2, device=self.device)
        for crop in crops[ranks.rank() :: ranks.world_size()]:
            video = pixel_range.to_network(crop, self.device)
            noise = torch.zeros_like(vae_loss.latent_noise(self.config.model, video, torch.Generator()))
            inputs = video.to(self.dtype), noise.to(self.dtype)
            found = functional_call(self.engine.module, average, inputs)["video"].float()
            decibels = min(psnr(pixel_range.to_pixels(found), crop), EQUAL_PSNR_DB)
            total += torch.tensor([(found - video).abs().mean(), decibels], device=self.device)
        l1, decibels = (ranks.all_reduced(total) / len(crops)).tolist()
        if ranks.rank() == 0:
            print(f"held out, {when} this stage: l1 {l1:.4f}, PSNR {decibels:.2f} dB", flush=True)
        return {when: l1, f"psnr_{when}": decibels}

    def save(self) -> None:
        self.log.flush()
        self.checkpoints.save(self.state)
        self.orders.saved()

    def latent_scale(self) -> float:
        """The configured scale, or, where it is to be measured, one that gives latents unit spread."""
        if not self.config.measure_latent_scale:
            return self.config.model.latent_scale
        last = [step["latent_std"] for step in self.state["history"][-50:]]
        return round(len(last) / sum(last), 6)

    def finish(self) -> None:
        """Rank 0 writes the moving average and the history to weights/vae."""
        self.orders.saved(over=True)
        average = self.average.collected()
        if ranks.rank() == 0:
            url = storage.join(self.config.output, trainer.WEIGHTS, NAME)
            plain = {name.removeprefix("vae."): tensor for name, tensor in average.items()}
            about = {"steps": self.state["step"], "held_out": self.state["held_out"]}
            model = dataclasses.replace(self.config.model, latent_scale=self.latent_scale())
            weights_folder.save_weights(url, weights_folder.VAE, model, plain, about=about)
            history = {"steps": self.state["history"], "held_out": self.state["held_out"]}
            storage.write_json(storage.join(url, trainer.HISTORY), history)


def check_start(config: TrainVaeConfig) -> None:
    """ValueError, before Ray starts, if files that the config names are missing or of another model."""
    check_perceptual(config.perceptual)
    if config.initial_image_weights is not None and not storage.exists(config.initial_image_weights):
        raise ValueError(f"initial_image_weights: {config.initial_image_weights} does not exist")
    if config.initial_weights is not None:
        found = weights_folder.config_from_json(
            AutoencoderConfig, weights_folder.describe(config.initial_weights)["config"]
        )
        scale, shift = config.model.latent_scale, config.model.latent_shift  # may differ
        if dataclasses.replace(found, latent_scale=scale, latent_shift=shift) != config.model:
            raise ValueError(f"model: {config.model} is not that of initial_weights, {found}")


def loop(given: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray Train worker runs."""
    return outcome(lambda: Run(given["config"], given["desk"]).train())


def run(config: TrainVaeConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    check_start(config)
    for split, where in (("train", "training"), ("held_out", "held-out")):
        for stage_config in config.stages:
            fitting(kept_clips(config.data, split), stage_config.crop, where)

    def work(summary: stage.Summary) -> None:
        trainer.start_trainer(loop, config, config.scale, config.output, NAME)
        trainer.summarise(summary, storage.join(config.output, trainer.WEIGHTS, NAME))

    return stage.run_stage("train_vae", storage.join(config.output, trainer.WEIGHTS, NAME), work)
