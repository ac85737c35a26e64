"""Train the diffusion transformer on precomputed latents, in the paper's progressive stages (section 3.3).

latents/ + text/ -> checkpoints/dit/ (to resume) and weights/dit/ (the moving average, what restore loads).
A run that is started again with the same output goes on from its newest checkpoint.
"""

import dataclasses
import json
import tempfile
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.func import functional_call

from model import checkpoints, flops
from model.dit.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from pipeline.data import text_embeddings
from pipeline.runtime import stage
from pipeline.store import hashing, schema, storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.objectives.one_step_loss import OneStepConfig, PixelLoss
from pipeline.training.runs import run_log, trainer
from pipeline.training.runs.validation import Validation, ValidationConfig
from pipeline.training.samples import latent_reader, online_latents, sample_order
from pipeline.training.samples.online_latents import OnlineConfig, OnlineReader
from pipeline.training.state import ranks
from pipeline.training.state.checkpoint import Checkpoints
from pipeline.training.state.control import (
    FaultConfig,
    Orders,
    StepGuard,
    StoppedError,
    outcome,
)
from pipeline.training.state.zero_fragments import MovingAverage
from pipeline.weights import backbones, weights_folder

NAME = "dit"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One progressive stage."""

    name: str
    """shown in logs, e.g. 5x256x256"""
    buckets: list[str]
    """buckets of latents/ that this stage trains on, images and videos together"""
    steps: int
    """optimiser steps"""
    learning_rate: float
    """after warm-up"""
    tokens_per_pack: int
    """video tokens in one pack: what one forward pass holds (the paper's GPU: about 151,000)"""
    one_step: OneStepConfig | None = None
    """fine-tune for restoring in one step (null: the paper's objective alone)"""

    @property
    def one_step_share(self) -> float:
        return self.one_step.share if self.one_step else 0.0


@dataclasses.dataclass(frozen=True)
class TrainDitConfig:
    """What `jobs.train_dit` reads."""

    data: Url
    """absolute URL of the data root that holds latents/ and text/ (with `online`: clips/ and selection/)"""
    output: Url
    """absolute URL; checkpoints/dit, weights/dit and tensorboard/dit are written there"""
    stages: list[StageConfig]
    """in order; the run moves on by itself"""
    model: SwinMMDiTConfig | None = None
    """the shape of a network with random weights; exactly one of model and initial"""
    initial: backbones.BackboneConfig | None = None
    """the network to go on from, ours or a released one"""
    sd3: Url | None = None
    """with `model`: start from SD3's transformer; URL of its safetensors file or of diffusers' folder"""
    optimiser: trainer.OptimiserConfig = dataclasses.field(default_factory=trainer.OptimiserConfig)
    """AdamW, clipping, warm-up, moving average"""
    scale: trainer.ScaleConfig = dataclasses.field(default_factory=trainer.ScaleConfig)
    """workers and ZeRO"""
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    """steps that are skipped"""
    packs_per_step: int = 1
    """packs in a step over all workers; a multiple of num_workers (the rest is gradient accumulation)"""
    checkpoint_every: int = 100
    """steps between checkpoints"""
    keep_last: int = 2
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """steps: checkpoints at their multiples are kept for good (0: none)"""
    checkpoint_activations: bool = False
    """recompute activations in the backward pass (less memory, about a third more time)"""
    compile_mlps: bool = False
    """compile the MLPs of the paper's network: the first steps take longer, all others less"""
    heldout_triples: int = 64
    """fixed (sample, time, noise) triples of the held-out loss, before and after each stage"""
    online: OnlineConfig | None = None
    """make latents while training instead of reading them, for small data (null: read latents/)"""
    validation: ValidationConfig | None = None
    """restore held-out clips every now and then, as pictures and with scores (null: do not)"""
    peak_tflops: float | None = None
    """operations per second, in 10^12, that one worker could reach, to tell the utilisation (an H100 in bf16:
    989; null: measured on CPUs, not told on GPUs)"""
    wandb: str | None = None
    """project of Weights & Biases to log to as well: its package must be installed, its key set in the
    environment"""
    seed: int = 0
    """of the order of samples, noise, times and initial weights"""

    def __post_init__(self) -> None:
        check_urls(self)
        for workers in range(self.scale.workers[0], self.scale.workers[1] + 1):
            if self.packs_per_step % workers:
                raise ValueError(
                    f"packs_per_step: {self.packs_per_step} is no multiple of {workers}, which "
                    f"scale.num_workers ({self.scale.num_workers}) allows"
                )
        run_log.check_wandb(self.wandb)
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
    return online_latents.index_of(online_latents.planned_samples(config.online, config.data, config.seed))


def check_data(config: TrainDitConfig) -> None:
    """Stop before any worker starts if the latents do not fit the config."""
    index = index_of(config)
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
        weights_folder.weights_hash(config.validation.vae)  # says what is wrong with it
    for stage_config in config.stages:
        rows = rows_of(index, stage_config, "train")
        sample_order.check_budget(rows, stage_config.tokens_per_pack, stage_config.name)
        rows_of(index, stage_config, "held_out")
        if stage_config.one_step is not None and stage_config.one_step.vae is not None:
            weights_folder.weights_hash(stage_config.one_step.vae)  # says what is wrong with it


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The fixed set on which a stage is measured before and after."""

    packs: list[latent_reader.Batch]
    triples: int
    set_hash: str


def held_out_set(
    reader: latent_reader.Reader,
    rows: pa.Table,
    config: TrainDitConfig,
    stage_config: StageConfig,
) -> HeldOut:
    """Triples (sample, time, noise): samples in turn, times at even quantiles of the training law."""
    count = config.heldout_triples
    quantiles = (torch.arange(count) + 0.5) / count
    times = (1000 * torch.sigmoid(torch.special.ndtri(quantiles))).tolist()
    ordered = rows.sort_by("sample_id").slice(0, count).to_pylist()
    # Epoch -1-i: draws that no training step uses.
    drawn = [sample_order.Drawn(ordered[i % len(ordered)], -1 - i) for i in range(count)]
    packs: list[list[dict[str, Any]]] = [[]]
    load = 0
    for one, timestep in zip(drawn, times, strict=True):
        if packs[-1] and load + one.tokens > stage_config.tokens_per_pack:
            packs.append([])
            load = 0
        packs[-1].append(latent_reader.training_sample(reader, one, config.seed, False, timestep))
        load += one.tokens
    names = [(one.row["sample_id"], one.epoch, timestep) for one, timestep in zip(drawn, times, strict=True)]
    set_hash = hashing.stable_id(json.dumps(names), config.seed)
    return HeldOut([latent_reader.collate(pack) for pack in packs], count, set_hash)


def forward(
    model: torch.nn.Module, batch: latent_reader.Batch, parameters: dict[str, Tensor] | None = None
) -> Tensor:
    """Velocity of a batch, with the given parameters in place of the model's own if there are any."""
    arguments = (
        batch.video,
        batch.text,
        batch.video_shapes,
        batch.text_lengths,
        batch.timestep,
        batch.pooled,
    )
    return model(*arguments) if parameters is None else functional_call(model, parameters, arguments)


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, average: dict[str, Tensor], held_out: HeldOut, device: torch.device
) -> float:
    """Mean over the triples of the moving average's loss; ranks share the packs."""
    dtype = next(iter(average.values())).dtype
    total = torch.zeros(1, device=device)
    for pack in held_out.packs[ranks.rank() :: ranks.world_size()]:
        batch = pack.to(device, dtype)
        total += batch.sample_losses(forward(model, batch, average)).sum()
    return float(ranks.all_reduced(total)) / held_out.triples


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


def hollow(model: weights_folder.Transformer) -> torch.nn.Module:
    """The network without values, for `forward` with given ones: ZeRO 3 takes the weights out of `model`."""
    kind: Any = type(model)
    with torch.device("meta"):
        return kind(model.config).requires_grad_(False)


class Run:
    """One rank's training: the engine, the moving average and the state that a checkpoint keeps."""

    def __init__(self, config: TrainDitConfig, desk: Any) -> None:
        self.config = config
        self.device = trainer.setup_worker(config.scale)
        self.reader = self.make_reader()
        torch.manual_seed(config.seed)  # equal weights on every rank
        model = network(config).train().requires_grad_(True)
        if config.checkpoint_activations:
            model.checkpoint_activations(range(model.config.num_layers))
        if config.compile_mlps:
            assert isinstance(model, SwinMMDiT)  # check_data has checked
            model.compile_mlps()
        accumulation = config.packs_per_step // ranks.world_size()
        self.hollow = hollow(model)
        self.engine = trainer.make_engine(model.to(self.device), config.scale, config.optimiser, accumulation)
        self.average = MovingAverage(self.engine, config.optimiser.ema_decay)
        self.dtype = next(self.engine.module.parameters()).dtype
        fresh: dict[str, Any] = {
            "step": 0,
            "stage": 0,
            "stage_step": 0,
            "position": 0,
            "history": [],
            "held_out": [],
            "network": {
                "kind": weights_folder.transformer_kind(model),
                "config": dataclasses.asdict(model.config),
            },
            "initial": config.initial and dataclasses.asdict(config.initial),
        }
        engines, averages = {NAME: self.engine}, {NAME: self.average}
        keep = config.keep_last, config.keep_every
        self.checkpoints = Checkpoints(config.output, NAME, engines, averages, *keep)
        self.state = self.checkpoints.resume(fresh)
        self.guard = StepGuard(self.engine, config.faults, self.state)
        self.orders = Orders(desk)
        self.pixel_loss: PixelLoss | None = None
        self.log = run_log.Log(
            config.output,
            NAME,
            config.total_steps,
            self.state["history"],
            config.wandb,
            dataclasses.asdict(config),
        )
        self.peak = self.measured_peak()

    def make_reader(self) -> latent_reader.Reader:
        if self.config.online is None:
            return latent_reader.LatentReader(self.config.data)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return OnlineReader(self.config.online, self.config.data, self.config.seed, self.device, dtype)

    def train(self) -> None:
        while self.state["stage"] < len(self.config.stages):
            self.train_stage(self.config.stages[self.state["stage"]])
        self.finish()

    def train_stage(self, config: StageConfig) -> None:
        index = self.samples_of_stage()
        held_out_rows = rows_of(index, config, "held_out")
        held_out = held_out_set(self.reader, held_out_rows, self.config, config)
        if len(self.state["held_out"]) == self.state["stage"]:
            before = self.measure(held_out)
            self.state["held_out"].append(
                {
                    "stage": config.name,
                    "before": before,
                    "triples": held_out.triples,
                    "set_hash": held_out.set_hash,
                }
            )
        rows = rows_of(index, config, "train")
        stream = sample_order.SampleStream(rows, self.config.seed, self.engine.module.config)
        steps = trainer.prefetched(
            latent_reader.rank_steps(
                self.reader,
                stream,
                self.state["position"],
                self.config.packs_per_step,
                config.tokens_per_pack,
                ranks.rank(),
                ranks.world_size(),
                config.one_step_share,
            )
        )
        one_step = config.one_step
        self.pixel_loss = PixelLoss(one_step, self.device, self.dtype) if one_step and one_step.vae else None
        shown = self.config.validation
        validation = shown and Validation(
            shown, self.reader, held_out_rows, self.device, self.dtype, self.config.seed
        )
        while self.state["stage_step"] < config.steps:
            self.train_step(config, steps)
            if validation and self.state["step"] % validation.config.every == 0:
                self.validate(validation)
            save, stop = self.orders.now(self.device)
            if save or self.state["step"] % self.config.checkpoint_every == 0:
                self.save()
            if stop:
                raise StoppedError(
                    f"saved at step {self.state['step']} and left; started again, it goes on", False
                )
        self.state["held_out"][-1]["after"] = self.measure(held_out)
        self.state |= {"stage": self.state["stage"] + 1, "stage_step": 0, "position": 0}
        self.save()

    def samples_of_stage(self) -> pa.Table:
        """The index as rank 0 found it when the stage began. Files that precompute adds later wait for the
        next stage: they would change the order of all samples, on a resume or between ranks."""
        index = index_of(self.config) if ranks.rank() == 0 else None
        if self.state["stage_step"] == 0:
            own = None if index is None else index["file"].unique().to_pylist()
            self.state["files"] = ranks.from_rank_0(own)
        if index is None:  # read after rank 0's: it holds all that rank 0 found
            index = index_of(self.config)
        return sample_order.of_files(index, self.state["files"])

    def train_step(self, config: StageConfig, steps: Any) -> None:
        start = time.monotonic()
        rate = trainer.scheduled(
            config.learning_rate, self.state["stage_step"], config.steps, self.config.optimiser
        )
        trainer.set_learning_rate(self.engine, rate)
        step: latent_reader.Step = next(steps)
        waited_s = time.monotonic() - start
        summed = torch.zeros(3, device=self.device)  # losses, tokens, operations / 10^12
        breakdown = run_log.Breakdown(config.buckets, self.device)
        for batch in step.batches:
            batch = batch.to(self.device, self.dtype)
            velocity = forward(self.engine, batch)
            losses = batch.sample_losses(velocity)
            if self.pixel_loss is not None:
                losses = losses + self.pixel_loss(batch, velocity)
            # Engines average over packs; so the mean over the step's samples is n K / N of each pack's mean.
            self.engine.backward(losses.sum() * (self.config.packs_per_step / step.samples))
            self.engine.step()
            breakdown.add(losses, batch.timestep, batch.buckets)
            counts = torch.tensor([len(batch.video) / schema.PATCH**2, self.tera_operations(batch)])
            summed += torch.cat([losses.detach().sum()[None], counts.to(self.device)])
        if self.guard.took_step():
            self.average.update(self.state["step"])
        loss, token_count, tera_operations = ranks.all_reduced(summed).tolist()
        details = breakdown.means()
        seconds = time.monotonic() - start
        values = {
            "loss": loss / step.samples,
            "gradient_norm": self.guard.norm,
            "learning_rate": rate,
            "samples": step.samples,
            "seconds": seconds,
            "tokens_per_second": token_count / seconds,
            "wait_share": waited_s / seconds,
            "imbalance": step.imbalance,
            "skipped": self.state["skipped"],
        }
        if self.peak is not None:
            values["utilisation"] = tera_operations / seconds / self.peak
        self.log.step(self.state["step"], config.name, values, details)
        self.state["step"] += 1
        self.state["stage_step"] += 1
        self.state["position"] = step.next_position

    def measured_peak(self) -> float | None:
        """10^12 operations a second of all workers; None: unknown."""
        one = self.config.peak_tflops
        if one is None and self.device.type != "cpu":
            return None
        own = one or run_log.measured_peak() / 1e12
        return float(ranks.all_reduced(torch.tensor([own], device=self.device)))

    def tera_operations(self, batch: latent_reader.Batch) -> float:
        """Counted 10^12 operations of a pack's forward and backward passes; nothing recomputed counts."""
        model: Any = self.engine.module.config
        samples = zip(batch.video_shapes, batch.text_lengths, strict=True)
        counted = sum(flops.forward_operations(model, shape, n).total for shape, n in samples)
        return flops.TRAINING_OVER_FORWARD * counted / 1e12

    def measure(self, held_out: HeldOut) -> float:
        return held_out_loss(self.hollow, self.averaged(), held_out, self.device)

    def averaged(self) -> dict[str, Tensor]:
        """All tensors of the network with averaged weights, for `forward(self.hollow, batch, ...)`."""
        return {**dict(self.engine.module.named_buffers()), **self.average.gathered(self.dtype)}

    def validate(self, validation: Validation) -> None:
        """Restore the chosen clips with the moving average; log how well."""
        average, step = self.averaged(), self.state["step"]
        means, pictures = validation.run(
            lambda batch: forward(self.hollow, batch, average), self.config.output, step
        )
        self.state.setdefault("validation", []).append({"step": step, **means})
        self.log.validation(step, means, pictures)

    def save(self) -> None:
        self.log.flush()
        self.checkpoints.save(self.state)
        self.orders.saved()

    def finish(self) -> None:
        """Rank 0 writes the moving average and the history to weights/dit."""
        self.log.close()
        self.orders.saved(over=True)
        average = self.average.collected()
        if ranks.rank() == 0:
            url = storage.join(self.config.output, trainer.WEIGHTS, NAME)
            about = {key: self.state[key] for key in ("step", "initial", "held_out")}
            model = self.engine.module
            whole = {**dict(model.named_buffers()), **average}
            prompts = self.reader.texts.prompts()
            weights_folder.save_weights(
                url, weights_folder.transformer_kind(model), model.config, whole, prompts, about
            )
            history = {"steps": self.state["history"], "held_out": self.state["held_out"]}
            history["validation"] = self.state.get("validation", [])
            storage.write_json(storage.join(url, trainer.HISTORY), history)


def loop(given: dict[str, Any]) -> dict[str, Any] | None:
    """What each Ray Train worker runs."""
    return outcome(lambda: Run(given["config"], given["desk"]).train())


def run(config: TrainDitConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    if config.online is None:
        check_data(config)

    def work(summary: stage.Summary) -> None:
        if config.online is not None:
            online_latents.write_texts(config.online, config.data, config.seed)
            check_data(config)
        trainer.start_trainer(loop, config, config.scale, config.output, NAME)
        trainer.summarise(summary, storage.join(config.output, trainer.WEIGHTS, NAME))

    return stage.run_stage("train_dit", storage.join(config.output, trainer.WEIGHTS, NAME), work)
