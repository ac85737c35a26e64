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
from pipeline.training.samples import selected, vae_crops
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
    """One stage; stages usually grow in clip length."""

    crop: cropping.Bucket
    """Frames, height and width of a video crop; images give crops of 1 frame with the same height and
    width."""
    steps: int
    """Number of optimiser steps in the stage."""
    learning_rate: float
    """Learning rate after the warm-up."""
    crops_per_worker: int
    """Crops in each worker's batch, which bound its memory; the paper has 5 of 17x256x256."""


@dataclasses.dataclass(frozen=True)
class TrainVaeConfig:
    """What `jobs.train_vae` reads."""

    data: Url
    """Absolute URL of the data root that holds clips/ and selection/."""
    output: Url
    """Absolute URL of the folder for checkpoints/vae, weights/vae and tensorboard/vae; runs resume there."""
    model: AutoencoderConfig
    """Shape of the autoencoder."""
    stages: list[VaeStageConfig]
    """Training stages in their order; the run moves from one to the next by itself."""
    perceptual: Url | Literal["none", "hub"]
    """Source of LPIPS's weights: the absolute URL of a folder with the published files vgg16-397923af.pth
    (torchvision) and vgg.pth (lpips 0.1), the word hub to have each node download them, or the word none to
    train without LPIPS, which departs from the paper."""
    optimiser: trainer.OptimiserConfig = dataclasses.field(default_factory=trainer.OptimiserConfig)
    """Settings of AdamW, gradient clipping, the learning rate's warm-up and the moving average."""
    scale: trainer.ScaleConfig = dataclasses.field(default_factory=trainer.ScaleConfig)
    """Number of workers and how DeepSpeed ZeRO divides the model among them."""
    measure_latent_scale: bool = True
    """Whether the written weights get a latent_scale measured from the last steps (1 divided by the latents'
    spread) instead of the model's."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, which is summed over a crop's latent and divided by the number of its
    pixel values."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS relative to L1; it has no effect where `perceptual` is none."""
    adversarial: AdversarialConfig | None = None
    """The discriminator and how much its loss counts; null trains without one."""
    image_share: float = 0.2
    """Share of a batch's crops, from 0 to 1, that are single images, if the data has any."""
    degraded_share: float = 0.25
    """Share of the crops, from 0 to 1, that are degraded first, since the autoencoder has to encode
    low-quality video too."""
    degraded_recipe: RecipeConfig = LIGHT
    """Recipe that degrades the crops which `degraded_share` selects; the default is the light one."""
    crops_per_read: int = 4
    """Number of crops cut from each decoded piece of a clip: more crops save decoding, which is slow, and
    make a batch less varied."""
    heldout_crops: int = 16
    """Number of fixed crops of held-out clips that are measured before and after each stage."""
    checkpoint_every: int = 200
    """Number of steps between two checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none."""
    start: Literal["random", "wavelets"] = "random"
    """Initial weights where no file gives them: random ones, or those of a wavelet codec, which suits narrow
    models."""
    initial_weights: Url | None = None
    """URL of a weights folder to start from, such as a run without a discriminator leaves; null starts as
    `start` says."""
    initial_image_weights: Url | None = None
    """URL of a 2D image autoencoder's file to start from (diffusers' AutoencoderKL, such as SD3's); null
    starts from `initial_weights` or as `start` says."""
    validate_every: int = 0
    """Number of steps between two validations on the held-out crops, which log L1, PSNR and pictures; 0 makes
    none."""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """When a step with a bad gradient is skipped, and when the run gives up."""
    wandb: str | None = None
    """Weights & Biases project to log to as well, which needs its package and key; null logs to none."""
    seed: int = 0
    """Seed of the crops, the posterior samples and the initial weights."""

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
    """Initialise the autoencoder as the config says, on the CPU; ValueError if given weights do not fit."""
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
    version = state["selection_version"] = selected.newest_version(config.data)
    held_out_clips = fitting_clips(config.data, "held_out", plan.crop, version)
    fixed = vae_crops.held_out_crops(plan, held_out_clips, config.heldout_crops)
    reader = CropReader(plan, fitting_clips(config.data, "train", plan.crop, version))
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
    """Pass the rank's crops through both networks, and make one optimiser step of each."""
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
    """Measure the moving average's reconstructions, as means over the crops, which ranks share.

    L1 (in units of [-1, 1]) is the loss; PSNR is in dB of 8-bit frames.
    """
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
    """The configured latent scale, or the measured one, which gives latents unit spread."""
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
    """Raise ValueError, before Ray starts, if the config's weights files are missing or do not fit."""
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
