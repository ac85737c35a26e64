"""Train the diffusion transformer on precomputed latents, in the paper's progressive stages (section 3.3).

latents/ + text/ -> checkpoints/dit/ (to resume) and weights/dit/ (the moving average, what restore loads).
A run that is started again with the same output goes on from its newest checkpoint.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from model import text
from model.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from pipeline import batches, schema, stage, storage, training, weights

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


@dataclasses.dataclass(frozen=True)
class TrainDitConfig:
    """What `jobs.train_dit` reads."""

    data: str
    """absolute URL of the data root that holds latents/ and text/"""
    output: str
    """absolute URL; checkpoints/dit, weights/dit and tensorboard/dit are written there"""
    model: SwinMMDiTConfig
    """the network's shape"""
    stages: list[StageConfig]
    """in order; the run moves on by itself"""
    optimiser: training.OptimiserConfig = dataclasses.field(default_factory=training.OptimiserConfig)
    """AdamW, clipping, warm-up, moving average"""
    scale: training.ScaleConfig = dataclasses.field(default_factory=training.ScaleConfig)
    """workers and ZeRO"""
    packs_per_step: int = 1
    """packs in a step over all workers; a multiple of num_workers (the rest is gradient accumulation)"""
    checkpoint_every: int = 100
    """steps between checkpoints"""
    checkpoint_activations: bool = False
    """recompute activations in the backward pass (less memory, about a third more time)"""
    heldout_triples: int = 64
    """fixed (sample, time, noise) triples of the held-out loss, before and after each stage"""
    initial_weights: str | None = None
    """URL of a weights folder to start from (null: random weights)"""
    seed: int = 0
    """of the order of samples, noise, times and initial weights"""

    def __post_init__(self) -> None:
        storage.check_url(self.data, "data")
        storage.check_url(self.output, "output")
        if self.packs_per_step % self.scale.num_workers:
            raise ValueError(
                f"packs_per_step: {self.packs_per_step} is no multiple of scale.num_workers "
                f"({self.scale.num_workers})"
            )
        if not self.stages:
            raise ValueError("stages: give at least one")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def rows_of(index: Sequence[dict[str, Any]], config: StageConfig, split: str) -> list[dict[str, Any]]:
    """The index rows of a stage's buckets; ValueError, with what there is, if there are none."""
    rows = [row for row in index if row["bucket"] in config.buckets and row["split"] == split]
    if not rows:
        there = sorted({row["bucket"] for row in index if row["split"] == split})
        raise ValueError(
            f"stages.{config.name}: no {split} sample in buckets {config.buckets}; latents/ has {there}"
        )
    return rows


def check_data(config: TrainDitConfig) -> None:
    """Stop before any worker starts if the latents do not fit the config."""
    index = batches.read_index(config.data)
    for stage_config in config.stages:
        rows = rows_of(index, stage_config, "train")
        batches.check_budget(rows, stage_config.tokens_per_pack, stage_config.name)
        rows_of(index, stage_config, "held_out")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The fixed set on which a stage is measured before and after."""

    packs: list[batches.Batch]
    triples: int
    set_hash: str


def held_out_set(
    reader: batches.LatentReader,
    rows: list[dict[str, Any]],
    config: TrainDitConfig,
    stage_config: StageConfig,
) -> HeldOut:
    """Triples (sample, time, noise): samples in turn, times at even quantiles of the training law."""
    count = config.heldout_triples
    quantiles = (torch.arange(count) + 0.5) / count
    times = (1000 * torch.sigmoid(torch.special.ndtri(quantiles))).tolist()
    ordered = sorted(rows, key=lambda row: row["sample_id"])
    # Epoch -1-i: draws that no training step uses.
    drawn = [batches.Drawn(ordered[i % len(ordered)], -1 - i) for i in range(count)]
    packs: list[list[dict[str, Any]]] = [[]]
    load = 0
    for one, timestep in zip(drawn, times, strict=True):
        if packs[-1] and load + one.tokens > stage_config.tokens_per_pack:
            packs.append([])
            load = 0
        packs[-1].append(batches.training_sample(reader, one, config.seed, False, timestep))
        load += one.tokens
    names = [(one.row["sample_id"], one.epoch, timestep) for one, timestep in zip(drawn, times, strict=True)]
    set_hash = schema.stable_id(json.dumps(names), config.seed)
    return HeldOut([batches.collate(pack) for pack in packs], count, set_hash)


def forward(
    model: torch.nn.Module, batch: batches.Batch, parameters: dict[str, Tensor] | None = None
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
    dtype = next(model.parameters()).dtype
    parameters = {name: tensor.to(dtype) for name, tensor in average.items()}
    total = torch.zeros(1, device=device)
    for pack in held_out.packs[training.rank() :: training.world_size()]:
        batch = pack.to(device, dtype)
        total += batch.sample_losses(forward(model, batch, parameters)).sum()
    return float(training.all_reduced(total)) / held_out.triples


class Run:
    """One rank's training: the engine, the moving average and the state that a checkpoint keeps."""

    def __init__(self, config: TrainDitConfig) -> None:
        self.config = config
        self.device = training.setup_worker(config.scale)
        self.reader = batches.LatentReader(config.data)
        self.index = batches.read_index(config.data)
        torch.manual_seed(config.seed)  # equal weights on every rank
        model = SwinMMDiT(config.model)
        if config.initial_weights is not None:
            started, _, _ = weights.load_dit(config.initial_weights)
            model.load_state_dict(started.state_dict())
        if config.checkpoint_activations:
            model.checkpoint_activations(range(config.model.num_layers))
        accumulation = config.packs_per_step // training.world_size()
        self.average = training.MovingAverage(model.to(self.device), config.optimiser.ema_decay)
        self.engine = training.make_engine(model, config.scale, config.optimiser, accumulation)
        self.dtype = next(self.engine.module.parameters()).dtype
        fresh: dict[str, Any] = {
            "step": 0,
            "stage": 0,
            "stage_step": 0,
            "position": 0,
            "history": [],
            "held_out": [],
        }
        self.state = training.resumed({NAME: self.engine}, {NAME: self.average}, fresh)
        self.log = training.Log(config.output, NAME, config.total_steps, self.state["history"])

    def train(self) -> None:
        while self.state["stage"] < len(self.config.stages):
            self.train_stage(self.config.stages[self.state["stage"]])
        self.finish()

    def train_stage(self, config: StageConfig) -> None:
        held_out = held_out_set(self.reader, rows_of(self.index, config, "held_out"), self.config, config)
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
        stream = batches.SampleStream(rows_of(self.index, config, "train"), self.config.seed)
        steps = training.prefetched(
            batches.rank_steps(
                self.reader,
                stream,
                self.state["position"],
                self.config.packs_per_step,
                config.tokens_per_pack,
                training.rank(),
                training.world_size(),
            )
        )
        while self.state["stage_step"] < config.steps:
            self.train_step(config, steps)
            if self.state["step"] % self.config.checkpoint_every == 0:
                self.save()
        self.state["held_out"][-1]["after"] = self.measure(held_out)
        self.state |= {"stage": self.state["stage"] + 1, "stage_step": 0, "position": 0}
        self.save()

    def train_step(self, config: StageConfig, steps: Any) -> None:
        start = time.monotonic()
        rate = training.warmed_up(
            config.learning_rate, self.state["stage_step"], self.config.optimiser.warmup_steps
        )
        training.set_learning_rate(self.engine, rate)
        step: batches.Step = next(steps)
        waited_s = time.monotonic() - start
        summed = torch.zeros(2, device=self.device)  # losses, tokens
        for batch in step.batches:
            batch = batch.to(self.device, self.dtype)
            losses = batch.sample_losses(forward(self.engine, batch))
            # Engines average over packs; so the mean over the step's samples is n K / N of each pack's mean.
            self.engine.backward(losses.sum() * (self.config.packs_per_step / step.samples))
            self.engine.step()
            tokens = torch.full((), len(batch.video) / schema.PATCH**2, device=self.device)
            summed += torch.stack([losses.detach().sum(), tokens])
        self.average.update(self.engine.module, self.state["step"])
        loss, token_count = training.all_reduced(summed).tolist()
        seconds = time.monotonic() - start
        self.log.step(
            self.state["step"],
            config.name,
            {
                "loss": loss / step.samples,
                "seconds": seconds,
                "tokens_per_second": token_count / seconds,
                "learning_rate": rate,
                "samples": step.samples,
                "wait_share": waited_s / seconds,
                "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            },
        )
        self.state["step"] += 1
        self.state["stage_step"] += 1
        self.state["position"] = step.next_position

    def measure(self, held_out: HeldOut) -> float:
        average = self.average.gathered(self.engine.module)
        return held_out_loss(self.engine.module, average, held_out, self.device)

    def save(self) -> None:
        self.log.flush()
        training.save_checkpoint({NAME: self.engine}, {NAME: self.average}, self.state)

    def finish(self) -> None:
        """Rank 0 writes the moving average and the history to weights/dit."""
        average = self.average.gathered(self.engine.module)
        if training.rank() == 0:
            url = storage.join(self.config.output, training.WEIGHTS, NAME)
            tokens, pooled = text.join(self.reader.null, self.reader.null, False, False, False)
            about = {"steps": self.state["step"], "held_out": self.state["held_out"]}
            weights.save_weights(
                url, weights.SWIN_MMDIT, self.config.model, average, {"text": tokens, "pooled": pooled}, about
            )
            history = {"steps": self.state["history"], "held_out": self.state["held_out"]}
            storage.write_json(storage.join(url, training.HISTORY), history)


def loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    Run(config["config"]).train()


def run(config: TrainDitConfig) -> stage.Summary:
    """Train all stages, resuming where a run with this output stopped."""
    check_data(config)

    def work(summary: stage.Summary) -> None:
        training.start_trainer(loop, {"config": config}, config.scale, config.output, NAME)
        training.summarise(summary, storage.join(config.output, training.WEIGHTS, NAME))

    return stage.run_stage("train_dit", storage.join(config.output, training.WEIGHTS, NAME), work)
