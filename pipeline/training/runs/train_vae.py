"""Train the causal video autoencoder on crops of the kept clips (paper section 3.2: L1, LPIPS and a GAN).

clips/ + selection/ -> checkpoints/vae/ (to resume) and weights/vae/ (the moving average). Pixels are
decoded and cropped by a thread of each worker.
"""

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from degradations.recipe import LIGHT, RecipeConfig
from model import checkpoints
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from model.vae.discriminator import VideoDiscriminator
from model.vae.wavelet_start import check_wavelet_start, start_as_wavelets
from pipeline.data import cropping
from pipeline.metrics.psnr_ssim import psnr
from pipeline.runtime import stage
from pipeline.store import hashing, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.objectives import vae_loss
from pipeline.training.objectives.vae_loss import AdversarialConfig, LengthGroup, Objective
from pipeline.training.runs import loggers, loop, trainer
from pipeline.training.samples import vae_crops
from pipeline.training.samples.vae_crops import CropPlan, CropReader, fitting_clips
from pipeline.training.state import ranks
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.step_guard import FaultConfig
from pipeline.video import pixel_range
from pipeline.weights import weights_folder
from pipeline.weights.lpips_weights import check_perceptual, load_perceptual

NAME, DISCRIMINATOR = "vae", "discriminator"
EQUAL_PSNR_DB = 100.0
"""Counted for a crop that is reconstructed exactly (black frames), where PSNR is infinite."""
VALIDATION_PICTURES = 4


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
    validate_every: int = 0
    """steps of the run between two looks at the held-out crops: their L1, PSNR and pictures (0: none)"""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """steps that are skipped"""
    wandb: str | None = None
    """project of Weights & Biases to log to as well: its package must be installed, its key set in the
    environment"""
    seed: int = 0
    """of crops, posterior samples and initial weights"""

    def __post_init__(self) -> None:
        check_urls(self)
        loggers.check_wandb(self.wandb)
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


def crop_plan(config: TrainVaeConfig, crop: cropping.Bucket) -> CropPlan:
    """What a stage's crops are drawn by."""
    return CropPlan(
        crop,
        config.image_share,
        config.degraded_share,
        config.degraded_recipe,
        config.crops_per_read,
        config.seed,
    )


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a rank holds from the first stage to the last."""

    config: TrainVaeConfig
    device: torch.device
    engines: dict[str, Any]
    """the autoencoder's, and the discriminator's if there is one"""
    average: MovingAverage
    objective: Objective

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they train."""
        return self.objective.dtype


def build(config: TrainVaeConfig) -> loop.Training:
    """One rank's part of the training."""
    device = trainer.setup_worker(config.scale)
    model = vae_loss.AutoencoderPass(initial_autoencoder(config)).to(device)
    engine = trainer.make_engine(model, config.scale, config.optimiser, accumulation=1)
    average = MovingAverage(engine, config.optimiser.ema_decay)
    dtype = next(engine.module.parameters()).dtype
    engines = {NAME: engine}
    if config.adversarial is not None:
        engines[DISCRIMINATOR] = make_discriminator(config, config.adversarial, device)
    perceptual = load_perceptual(config.perceptual)
    objective = Objective(
        engine,
        None if perceptual is None else perceptual.to(device, dtype),
        engines.get(DISCRIMINATOR),
        config.kl_weight,
        config.perceptual_weight,
        config.adversarial,
    )
    worker = Worker(config, device, engines, average, objective)
    return loop.Training(
        name=NAME,
        device=device,
        engines=engines,
        averages={NAME: average},
        fresh={},
        open_stage=functools.partial(open_stage, worker),
        save_weights=functools.partial(save_weights, worker),
    )


def make_discriminator(config: TrainVaeConfig, adversarial: AdversarialConfig, device: torch.device) -> Any:
    """The discriminator's engine; its weights depend on the seed alone."""
    torch.manual_seed(hashing.stable_hash(config.seed, DISCRIMINATOR))
    model = VideoDiscriminator(adversarial.discriminator).to(device)
    optimiser = dataclasses.replace(config.optimiser, betas=adversarial.betas, weight_decay=0.0)
    return trainer.make_engine(model, config.scale, optimiser, accumulation=1)


def open_stage(worker: Worker, state: loop.State) -> loop.Stage:
    """The stage that the state is in: its crops from the state's step on."""
    config = worker.config
    stage_config = config.stages[state["stage"]]
    plan = crop_plan(config, stage_config.crop)
    held_out_clips = fitting_clips(config.data, "held_out", plan.crop)
    fixed = vae_crops.held_out_crops(plan, held_out_clips, config.heldout_crops)
    reader = CropReader(plan, fitting_clips(config.data, "train", plan.crop))
    batches = trainer.prefetched(
        vae_crops.crop_batches(
            reader, stage_config.crops_per_worker, state["stage"], state["stage_step"], stage_config.steps
        ),
        ahead=4,
    )
    return loop.Stage(
        name=plan.crop.name,
        steps=stage_config.steps,
        step=lambda: train_step(worker, stage_config, state, batches),
        held_out=lambda: measure(worker, fixed),
        held_out_set={
            "crops": len(fixed),
            "set_hash": hashing.stable_id(*[crop.tobytes() for crop in fixed]),
        },
        validate=lambda: (measure(worker, fixed), pictures(worker, fixed)),
        validate_every=config.validate_every,
        close=reader.close,
    )


def train_step(
    worker: Worker, stage_config: VaeStageConfig, state: loop.State, batches: Iterator[list[np.ndarray]]
) -> loop.StepResult:
    """This rank's crops through both networks, and one optimiser step of each."""
    config, step = worker.config, state["step"]
    rate = set_learning_rates(worker, stage_config, state)
    start = time.monotonic()
    crops = next(batches)
    waited_s = time.monotonic() - start
    generator = torch.Generator().manual_seed(
        hashing.stable_hash(config.seed, "posterior", step, ranks.rank())
    )
    groups = [
        LengthGroup(
            video, vae_loss.latent_noise(config.model, video, generator), share=len(video) / len(crops)
        )
        for video in vae_crops.by_length(crops, worker.device)
    ]
    terms = worker.objective.step(step, groups)
    latent_variance, loss = terms.pop("latent_variance"), terms.pop("loss")
    samples = len(crops) * ranks.world_size()
    return loop.StepResult(
        loss=loss,
        samples=samples,
        learning_rate=rate,
        waited_s=waited_s,
        terms={**terms, "latent_std": latent_variance**0.5},
        per_second={"crops_per_second": samples},
    )


def set_learning_rates(worker: Worker, stage_config: VaeStageConfig, state: loop.State) -> float:
    """Both optimisers' rates for this step; returns the autoencoder's."""
    optimiser, adversarial = worker.config.optimiser, worker.config.adversarial
    rate = trainer.scheduled(stage_config.learning_rate, state["stage_step"], stage_config.steps, optimiser)
    trainer.set_learning_rate(worker.engines[NAME], rate)
    if adversarial is not None and adversarial.trains(state["step"]):
        trained = state["step"] - adversarial.start_step
        own_rate = trainer.warmed_up(adversarial.learning_rate, trained, optimiser.warmup_steps)
        trainer.set_learning_rate(worker.engines[DISCRIMINATOR], own_rate)
    return rate


@torch.no_grad()
def reconstruct(worker: Worker, weights: Mapping[str, Tensor], crop: np.ndarray) -> tuple[Tensor, Tensor]:
    """A crop (T, H, W, 3) and what the given weights make of its posterior's mode, each (1, 3, T, H, W)."""
    video = pixel_range.to_network(crop, worker.device)
    noise = torch.zeros_like(vae_loss.latent_noise(worker.config.model, video, torch.Generator()))
    inputs = video.to(worker.dtype), noise.to(worker.dtype)
    output = functional_call(worker.engines[NAME].module, dict(weights), inputs)
    return video, output["video"].float()


def measure(worker: Worker, crops: Sequence[np.ndarray]) -> dict[str, float]:
    """Of the moving average's reconstructions: L1 (in [-1, 1] units) as the loss, PSNR (dB of 8-bit frames);
    means over the crops, which ranks share."""
    weights = worker.average.gathered(worker.dtype)
    total = torch.zeros(2, device=worker.device)
    for crop in crops[ranks.rank() :: ranks.world_size()]:
        video, restored = reconstruct(worker, weights, crop)
        decibels = min(psnr(pixel_range.to_pixels(restored), crop), EQUAL_PSNR_DB)
        total += torch.tensor([(restored - video).abs().mean(), decibels], device=worker.device)
    l1, decibels = (ranks.all_reduced(total) / len(crops)).tolist()
    return {"loss": l1, "psnr": decibels}


def pictures(worker: Worker, crops: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The middle frames of the first crops, reconstructed and true side by side."""
    weights = worker.average.gathered(worker.dtype)
    found = {}
    for number, crop in enumerate(crops[:VALIDATION_PICTURES]):
        _, restored = reconstruct(worker, weights, crop)
        frames = pixel_range.to_pixels(restored)[len(crop) // 2], crop[len(crop) // 2]
        found[f"crop_{number}"] = np.concatenate(frames, axis=1)
    return found


def latent_scale(config: TrainVaeConfig, history: Sequence[Mapping[str, Any]]) -> float:
    """The configured scale, or, where it is to be measured, one that gives latents unit spread."""
    if not config.measure_latent_scale:
        return config.model.latent_scale
    spreads = [step["latent_std"] for step in history if math.isfinite(step["latent_std"])][-50:]
    return round(len(spreads) / sum(spreads), 6)


def save_weights(worker: Worker, url: str, state: loop.State) -> None:
    """Rank 0 writes the moving average."""
    average = worker.average.collected()
    if ranks.rank() == 0:
        weights = {name.removeprefix("vae."): tensor for name, tensor in average.items()}
        about = {"steps": state["step"], "held_out": state["held_out"]}
        scale = latent_scale(worker.config, state["history"])
        model = dataclasses.replace(worker.config.model, latent_scale=scale)
        weights_folder.save_weights(url, weights_folder.VAE, model, weights, about=about)


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


def run(config: TrainVaeConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    check_start(config)
    for split in ("train", "held_out"):
        for stage_config in config.stages:
            fitting_clips(config.data, split, stage_config.crop)
    weights_url = storage.join(config.output, trainer.WEIGHTS, NAME)

    def work(summary: stage.Summary) -> None:
        loop.start(build, config, NAME)
        trainer.summarise(summary, weights_url)

    return stage.run_stage("train_vae", weights_url, work)
