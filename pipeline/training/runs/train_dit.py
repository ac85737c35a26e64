"""Train the diffusion transformer on precomputed latents, in the paper's progressive stages (section 3.3).

latents/ + text/ -> checkpoints/dit/ (to resume) and weights/dit/ (the moving average, which restore loads).
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.func import functional_call

from model import checkpoints
from model.denoise import Network
from model.dit.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from pipeline.data import text_embeddings
from pipeline.data.precompute import SampleConfig
from pipeline.runtime import stage
from pipeline.store import schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.objectives.one_step_loss import OneStepConfig, PixelLoss
from pipeline.training.runs import loggers, loop, run_log, trainer, utilisation
from pipeline.training.runs.held_out import held_out_loss, held_out_set
from pipeline.training.runs.validation import Validation, ValidationConfig
from pipeline.training.samples import latent_reader, online_latents, sample_order, selected
from pipeline.training.samples.batch import Batch, Step, rank_steps
from pipeline.training.samples.online_latents import OnlineReader
from pipeline.training.state import ranks
from pipeline.training.state.ema import MovingAverage
from pipeline.training.state.step_guard import FaultConfig
from pipeline.weights import backbones, weights_folder

NAME = "dit"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One progressive stage."""

    name: str
    """Name of the stage, shown in logs, such as 5x256x256."""
    buckets: list[str]
    """Buckets of latents/ on which the stage trains, of images and videos together."""
    steps: int
    """Number of optimiser steps in the stage."""
    learning_rate: float
    """Learning rate after the warm-up."""
    tokens_per_pack: int
    """Video tokens in one pack, on which memory depends; the paper has about 151,000 on each GPU."""
    one_step: OneStepConfig | None = None
    """Fine-tuning of the stage for restoring in one step; null trains with the paper's objective alone."""

    @property
    def one_step_share(self) -> float:
        return self.one_step.share if self.one_step else 0.0


@dataclasses.dataclass(frozen=True)
class TrainDitConfig:
    """What `jobs.train_dit` reads."""

    data: Url
    """Absolute URL of the data root: latents/, text/ and selection/; with `online` clips/ for latents/."""
    output: Url
    """Absolute URL of the folder for checkpoints/dit, weights/dit and tensorboard/dit; runs resume there."""
    stages: list[StageConfig]
    """Training stages in their order; the run moves from one to the next by itself."""
    model: SwinMMDiTConfig | None = None
    """Shape of a network that starts with random weights; give exactly one of `model` and `initial`."""
    initial: backbones.BackboneConfig | None = None
    """Network to continue from, ours or a released one; give exactly one of `model` and `initial`."""
    sd3: Url | None = None
    """URL of SD3's transformer, a safetensors file or diffusers' folder, to start `model` from, or null."""
    optimiser: trainer.OptimiserConfig = dataclasses.field(default_factory=trainer.OptimiserConfig)
    """Settings of AdamW, gradient clipping, the learning rate's warm-up and the moving average."""
    scale: trainer.ScaleConfig = dataclasses.field(default_factory=trainer.ScaleConfig)
    """Number of workers and how DeepSpeed ZeRO divides the model among them."""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """When a step with a bad gradient is skipped, and when the run gives up."""
    packs_per_step: int = 1
    """Packs per step over all workers, a multiple of their number; several per worker are accumulated."""
    checkpoint_every: int = 100
    """Number of steps between two checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none."""
    checkpoint_activations: bool = False
    """Whether to recompute activations in the backward pass: less memory, about a third more time."""
    compile_mlps: bool = False
    """Whether to compile the MLPs of the paper's network: slower first steps, all others faster."""
    heldout_triples: int = 64
    """Fixed triples (sample, time, noise) of the held-out loss, measured before and after each stage."""
    online: SampleConfig | None = None
    """Settings for making latents in training, at two encodings per sample; null reads latents/."""
    validation: ValidationConfig | None = None
    """Settings for restoring held-out clips at intervals, with pictures and scores; null does none of it."""
    peak_tflops: float | None = None
    """Peak of one worker in 10^12 FLOP/s, for utilisation; null measures it on CPUs, omits it on GPUs."""
    wandb: str | None = None
    """Weights & Biases project to log to as well, which needs its package and key; null logs to none."""
    seed: int = 0
    """Seed of the order of samples, the noise, the times and the initial weights."""

    def __post_init__(self) -> None:
        check_urls(self)
        for workers in range(self.scale.workers[0], self.scale.workers[1] + 1):
            if self.packs_per_step % workers:
                raise ValueError(
                    f"packs_per_step: {self.packs_per_step} is no multiple of {workers}, which "
                    f"scale.num_workers ({self.scale.num_workers}) allows"
                )
        loggers.check_wandb(self.wandb)
        if not self.stages:
            raise ValueError("stages: give at least one")
        if (self.model is None) == (self.initial is None):
            raise ValueError("model, initial: give exactly one of them")
        if self.sd3 is not None and self.model is None:
            raise ValueError("sd3: it goes with model, not with initial; give one of the two")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def rows_of(index: pa.Table, config: StageConfig, split: str) -> pa.Table:
    """The index rows of a stage's buckets; ValueError, with what there is, if there are none."""
    own = index.filter(pc.equal(index["split"], split))
    rows = own.filter(pc.is_in(own["bucket"], pa.array(config.buckets)))
    if not rows.num_rows:
        there = sorted(own["bucket"].unique().to_pylist())
        raise ValueError(
            f"stages.{config.name}: no {split} sample in buckets {config.buckets}; latents/ has {there}"
        )
    return rows


def index_of(config: TrainDitConfig) -> pa.Table:
    """Every sample there is."""
    if config.online is None:
        return latent_reader.read_index(config.data)
    return online_latents.sample_table(
        online_latents.planned_samples(config.online, config.data, config.seed)
    )


def check_data(config: TrainDitConfig) -> None:
    """Stop before any worker starts if the latents do not fit the config."""
    index = index_of(config)
    selected.open_selection(config.data)
    model = config.model if config.initial is None else backbones.shape_of(config.initial)
    assert model is not None  # TrainDitConfig has checked
    if config.compile_mlps and not isinstance(model, SwinMMDiTConfig):
        raise ValueError("compile_mlps: it is for the paper's network, not for a released one")
    if config.sd3 is not None and not storage.exists(config.sd3):
        raise ValueError(f"sd3: {config.sd3}: no such file or folder")
    width = text_embeddings.read_texts(config.data).prompts().null.shape[1]
    if width != model.text_dim:
        raise ValueError(
            f"data: text/ is {width} wide, the network takes {model.text_dim}; precompute with other "
            "encoders, or with `fixed_text` for a released backbone"
        )
    if config.validation is not None:
        weights_folder.weights_hash(config.validation.vae)  # raises ValueError for a bad one
    for stage_config in config.stages:
        rows = rows_of(index, stage_config, "train")
        sample_order.check_budget(rows, stage_config.tokens_per_pack, stage_config.name)
        rows_of(index, stage_config, "held_out")
        if stage_config.one_step is not None and stage_config.one_step.vae is not None:
            weights_folder.weights_hash(stage_config.one_step.vae)  # raises ValueError for a bad one


def forward(network: Network, batch: Batch) -> Tensor:
    """Velocity of a batch, (rows, 16)."""
    lengths = batch.video_shapes, batch.text_lengths
    return network(batch.video, batch.text, *lengths, batch.timestep, batch.pooled)


def network(config: TrainDitConfig) -> weights_folder.Transformer:
    """The network as training begins, fp32 on the CPU."""
    if config.initial is not None:
        return backbones.load_transformer(config.initial, torch.float32)[0]
    assert config.model is not None  # TrainDitConfig has checked
    model = SwinMMDiT(config.model)
    if config.sd3 is not None:
        local = storage.local_copy if weights_folder.is_released_file(config.sd3) else storage.local_folder
        with tempfile.TemporaryDirectory() as folder, local(config.sd3, folder) as path:
            report = checkpoints.load_sd3_transformer(model, path)
        if ranks.rank() == 0:
            print(report, flush=True)
    return model


def meta_copy(model: weights_folder.Transformer) -> torch.nn.Module:
    """The network without values, for `forward` with given ones: ZeRO 3 takes the weights out of `model`."""
    kind: Any = type(model)
    with torch.device("meta"):
        return kind(model.config).requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a rank holds from the first stage to the last."""

    config: TrainDitConfig
    device: torch.device
    reader: latent_reader.Reader
    engine: Any
    average: MovingAverage
    meta_model: torch.nn.Module
    dtype: torch.dtype
    """of the weights as they train"""
    peak: float | None
    """10^12 FLOPs a second of all workers; None: unknown"""

    def averaged(self) -> Network:
        """The network with averaged weights, as they are now."""
        weights = {**dict(self.engine.module.named_buffers()), **self.average.gathered(self.dtype)}
        return lambda *inputs: functional_call(self.meta_model, weights, inputs)


def build(config: TrainDitConfig) -> loop.Training:
    """One rank's part of the training."""
    device = trainer.setup_worker(config.scale)
    reader = make_reader(config, device)
    torch.manual_seed(config.seed)  # equal weights on every rank
    model = network(config).train().requires_grad_(True)
    if config.checkpoint_activations:
        model.checkpoint_activations(range(model.config.num_layers))
    if config.compile_mlps:
        assert isinstance(model, SwinMMDiT)  # check_data has checked
        model.compile_mlps()
    accumulation = config.packs_per_step // ranks.world_size()
    meta_model = meta_copy(model)
    engine = trainer.make_engine(model.to(device), config.scale, config.optimiser, accumulation)
    average = MovingAverage(engine, config.optimiser.ema_decay)
    dtype = next(engine.module.parameters()).dtype
    peak = utilisation.peak_of_all_ranks(config.peak_tflops, device)
    worker = Worker(config, device, reader, engine, average, meta_model, dtype, peak)
    return loop.Training(
        name=NAME,
        device=device,
        engines={NAME: engine},
        averages={NAME: average},
        fresh={
            "position": 0,
            "network": {
                "kind": weights_folder.transformer_kind(model),
                "config": dataclasses.asdict(model.config),
            },
            "initial": config.initial and dataclasses.asdict(config.initial),
        },
        open_stage=functools.partial(open_stage, worker),
        save_weights=functools.partial(save_weights, worker),
    )


def make_reader(config: TrainDitConfig, device: torch.device) -> latent_reader.Reader:
    """Where samples come from: latents/, or clips encoded while training."""
    if config.online is None:
        return latent_reader.LatentReader(config.data)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return OnlineReader(config.online, config.data, config.seed, device, dtype)


def open_stage(worker: Worker, state: loop.State) -> loop.Stage:
    """The stage that the state is in: its samples from the state's position on."""
    config, reader, device, dtype = worker.config, worker.reader, worker.device, worker.dtype
    stage_config = config.stages[state["stage"]]
    if state["stage_step"] == 0:
        state["position"] = 0
    index = samples_of_stage(config, state)
    rows, held_out_rows = (rows_of(index, stage_config, split) for split in ("train", "held_out"))
    allowed = None
    if config.online is None:  # which plans its samples by the newest selection/
        version = state["selection_version"] = selected.newest_version(config.data)
        allowed, held_out_rows = selected.usable(rows, held_out_rows, config.data, version, stage_config.name)
    tokens_per_pack = stage_config.tokens_per_pack
    fixed = held_out_set(reader, held_out_rows, config.heldout_triples, tokens_per_pack, config.seed)
    stream = sample_order.SampleStream(rows, config.seed, worker.engine.module.config, allowed)
    place = state["position"], config.packs_per_step, tokens_per_pack, ranks.rank(), ranks.world_size()
    steps = trainer.prefetched(rank_steps(reader, stream, *place, stage_config.one_step_share))
    one_step = stage_config.one_step
    pixel_loss = PixelLoss(one_step, device, dtype) if one_step and one_step.vae else None
    opened = loop.Stage(
        name=stage_config.name,
        steps=stage_config.steps,
        step=lambda: train_step(worker, stage_config, state, steps, pixel_loss),
        held_out=lambda: {
            "loss": held_out_loss(functools.partial(forward, worker.averaged()), fixed, device, dtype)
        },
        held_out_set={"triples": fixed.triples, "set_hash": fixed.set_hash},
    )
    if config.validation is None:
        return opened
    validation = Validation(config.validation, reader, held_out_rows, device, dtype, config.seed)
    return dataclasses.replace(
        opened,
        validate=lambda: validation.run(worker.averaged(), config.output, state["step"]),
        validate_every=config.validation.every,
    )


def samples_of_stage(config: TrainDitConfig, state: loop.State) -> pa.Table:
    """The index as rank 0 found it when the stage began.

    Files that precompute adds later wait for the next stage, since they would change the order of all
    samples, on a resume or between ranks.
    """
    index = index_of(config) if ranks.rank() == 0 else None
    if state["stage_step"] == 0:
        files = None if index is None else latent_reader.files_of(index)
        state["files"] = ranks.from_rank_0(files)
    if index is None:  # read after rank 0's, so it holds everything that rank 0 found
        index = index_of(config)
    return latent_reader.of_files(index, state["files"])


def train_step(
    worker: Worker,
    stage_config: StageConfig,
    state: loop.State,
    steps: Iterator[Step],
    pixel_loss: PixelLoss | None,
) -> loop.StepResult:
    """Pass the rank's packs forward and backward, and make one optimiser step."""
    config, engine, device = worker.config, worker.engine, worker.device
    rate = trainer.scheduled(
        stage_config.learning_rate, state["stage_step"], stage_config.steps, config.optimiser
    )
    trainer.set_learning_rate(engine, rate)
    start = time.monotonic()
    step = next(steps)
    waited_s = time.monotonic() - start
    summed = torch.zeros(3, device=device)  # losses, tokens, FLOPs / 10^12
    breakdown = run_log.Breakdown(stage_config.buckets, device)
    for batch in step.batches:
        batch = batch.to(device, worker.dtype)
        velocity = forward(engine, batch)
        losses = batch.sample_losses(velocity)
        if pixel_loss is not None:
            losses = losses + pixel_loss(batch, velocity)
        # Engines average over packs; so the mean over the step's samples is n K / N of each pack's mean.
        engine.backward(losses.sum() * (config.packs_per_step / step.samples))
        engine.step()
        breakdown.add(losses, batch.timestep, batch.buckets)
        tera = utilisation.tera_flops(engine.module.config, batch)
        counts = torch.tensor([len(batch.data) / schema.PATCH**2, tera])
        summed += torch.cat([losses.detach().sum()[None], counts.to(device)])
    loss, token_count, tera = ranks.all_reduced(summed).tolist()
    state["position"] = step.next_position
    return loop.StepResult(
        loss=loss / step.samples,
        samples=step.samples,
        learning_rate=rate,
        waited_s=waited_s,
        terms={"imbalance": step.imbalance},
        per_second={
            "tokens_per_second": token_count,
            **({} if worker.peak is None else {"utilisation": tera / worker.peak}),
        },
        details=breakdown.means(),
    )


def save_weights(worker: Worker, url: str, state: loop.State) -> None:
    """Rank 0 writes the moving average, with the prompts that it was trained with."""
    average = worker.average.collected()
    if ranks.rank() == 0:
        about = {key: state[key] for key in ("step", "initial", "held_out")}
        model = worker.engine.module
        whole = {**dict(model.named_buffers()), **average}
        prompts = worker.reader.texts.prompts()
        kind = weights_folder.transformer_kind(model)
        weights_folder.save_weights(url, kind, model.config, whole, prompts, about)


def run(config: TrainDitConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    if config.online is None:
        check_data(config)

    def work(summary: stage.Summary) -> None:
        if config.online is not None:
            online_latents.write_texts(config.online, config.data)
            check_data(config)
        loop.start(build, config, NAME)
        trainer.summarise(summary, storage.join(config.output, trainer.WEIGHTS, NAME))

    return stage.run_stage("train_dit", storage.join(config.output, trainer.WEIGHTS, NAME), work)
