"""Estimate of what a training will take before it starts: GPU memory by part, FLOPs, hours and cost.

Everything is counted from the config: no data, no weights, no Ray. FLOPs are those of matrix products
(model/flops.py), memory is counted in memory_cost.py; packs are filled by the same code as in training, from
a mix of samples that the config assumes. The machine's speed is the one thing that cannot be counted; the
config states a utilisation.
"""

import dataclasses
import math
from typing import Any

import pyarrow as pa
import torch

from model.dit.nadit import NaDiT
from model.dit.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from model.flops import (
    TRAINING_OVER_FORWARD,
    Config,
    forward_flops,
    linear_per_token,
)
from pipeline.data import cropping
from pipeline.store import schema, storage
from pipeline.training.memory_cost import Memory, Sample, activation_bytes, fixed_memory
from pipeline.training.runs import train_dit
from pipeline.training.samples import sample_order
from pipeline.weights import backbones

PAPER_GPUS, PAPER_GPU_HOURS = 256, 30_000
"""Section 4: "256 NVIDIA H100-80G GPUs", "about 30K H100-80G GPU hours"."""
_SIMULATED_ROWS = 4096
_NATIVE = "native"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(train_dit.TrainDitConfig):
    """What `jobs.plan` reads: the config of a training, and what is assumed of machines and samples."""

    peak_tflops: float = 989.4
    """Peak speed of one GPU in bf16 without sparsity, in 10^12 operations per second; the default is an H100
    SXM's."""
    utilisation: float = 0.35
    """Share of the peak speed, from 0 to 1, that the counted operations are assumed to reach; recomputed
    activations do not count as work."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU in GB."""
    price_per_gpu_hour: float = 4.0
    """Price of one GPU for one hour, in your currency."""
    text_tokens: int = 154
    """Text tokens of a sample; the released prompt has 58."""
    image_share: float = 2 / 3
    """Assumed share of images among the samples of a stage that has both images and videos; the default is
    the paper's, 10 million images to 5 million videos."""
    native_shapes: list[cropping.Bucket] = dataclasses.field(
        default_factory=lambda: [cropping.Bucket(1, 1024, 1024), cropping.Bucket(21, 720, 1280)]
    )
    """Sizes that samples of the bucket `native` are assumed to have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("utilisation", "image_share"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it is a share, above 0 and up to 1")


def shape_of(config: train_dit.TrainDitConfig) -> Config:
    """The network's shape; for a released model without reading its file."""
    if config.initial is None:
        assert config.model is not None  # TrainDitConfig has checked
        return config.model
    url = config.initial.weights
    if config.initial.kind != "own" and (url.startswith("s3://") or not storage.exists(url)):
        return backbones.RELEASED[config.initial.kind].config
    return backbones.shape_of(config.initial)


def parameter_count(model: Config) -> int:
    """Parameters of a network of this shape; no memory is taken for them."""
    with torch.device("meta"):
        network = SwinMMDiT(model) if isinstance(model, SwinMMDiTConfig) else NaDiT(model)
    return sum(parameter.numel() for parameter in network.parameters())


# --- samples and steps ---


def kinds_of(config: PlanConfig, stage: train_dit.StageConfig) -> list[tuple[Sample, float]]:
    """The kinds of samples of a stage and the share of each."""
    buckets = [
        b for name in stage.buckets for b in ([*config.native_shapes] if name == _NATIVE else [_bucket(name)])
    ]
    images = sum(b.frames == 1 for b in buckets)
    videos = len(buckets) - images
    kinds = []
    for b in buckets:
        group, share = (images, config.image_share) if b.frames == 1 else (videos, 1 - config.image_share)
        whole = share if images and videos else 1.0
        shape = (
            (b.frames - 1) // schema.TEMPORAL_FACTOR + 1,
            b.height // schema.SPATIAL_FACTOR,
            b.width // schema.SPATIAL_FACTOR,
        )
        tokens = schema.video_tokens(b.frames, b.height, b.width)
        kinds.append((Sample(shape, tokens, config.text_tokens), whole / group))
    return kinds


def _bucket(name: str) -> cropping.Bucket:
    try:
        frames, height, width = (int(part) for part in name.split("x"))
    except ValueError:
        raise ValueError(f"stages: bucket {name}; write it as 5x256x256, or native") from None
    return cropping.Bucket(frames, height, width)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What one stage will take."""

    name: str
    steps: int
    samples_per_step: float
    tokens_per_step: float
    """video tokens"""
    flops_per_step: float
    """forward and backward, all GPUs"""
    attention_share: float
    """of the FLOPs"""
    over_six_parameters: float
    """counted FLOPs over 6 x parameters x video tokens, the usual rule"""
    seconds_per_step: float
    memory: Memory
    without_checkpoints: float
    """bytes of activations if nothing were recomputed"""
    with_checkpoints: float
    """bytes of activations if every block were recomputed"""

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600


def plan_stage(config: PlanConfig, stage: train_dit.StageConfig, parameters: int) -> StagePlan:
    """Fill some steps' packs as training does, and count them."""
    model, cuda = shape_of(config), config.scale.use_gpu
    kinds = kinds_of(config, stage)
    packs = simulated_packs(model, kinds, stage)
    samples = [sample for pack in packs for sample in pack]
    scale = config.packs_per_step / len(packs)
    counted = {kind: forward_flops(model, kind.shape, kind.text_tokens) for kind, _ in kinds}
    total = sum(counted[sample].total for sample in samples) * TRAINING_OVER_FORWARD * scale
    attention = sum(counted[sample].attention for sample in samples) * TRAINING_OVER_FORWARD * scale
    tokens = sum(sample.video_tokens for sample in samples) * scale
    speed = config.scale.workers[1] * config.peak_tflops * 1e12 * config.utilisation
    # The largest pack counts, not the mean.
    heaviest = max(packs, key=lambda pack: activation_bytes(model, pack, cuda, config.checkpoint_activations))
    activations = [activation_bytes(model, heaviest, cuda, checkpointed) for checkpointed in (False, True)]
    chosen = activations[config.checkpoint_activations]
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        samples_per_step=len(samples) * scale,
        tokens_per_step=tokens,
        flops_per_step=total,
        attention_share=attention / total,
        over_six_parameters=total / (6 * parameters * tokens),
        seconds_per_step=total / speed,
        memory=dataclasses.replace(fixed_memory(config.scale, parameters), activations=chosen),
        without_checkpoints=activations[False],
        with_checkpoints=activations[True],
    )


def simulated_packs(
    model: Config, kinds: list[tuple[Sample, float]], stage: train_dit.StageConfig
) -> list[list[Sample]]:
    """Eight packs as training fills them."""
    rows: list[dict[str, Any]] = []
    for index, (sample, share) in enumerate(kinds):
        frames, height, width = sample.shape
        for _ in range(max(1, round(share * _SIMULATED_ROWS))):
            rows.append(
                {
                    "reference": index,
                    "locality": len(rows),
                    "num_frames": (frames - 1) * schema.TEMPORAL_FACTOR + 1,
                    "height": height * schema.SPATIAL_FACTOR,
                    "width": width * schema.SPATIAL_FACTOR,
                    "video_tokens": sample.video_tokens,
                    "text_tokens": sample.text_tokens,
                    "bucket": str(sample.shape),
                }
            )
    table = pa.Table.from_pylist(rows)
    sample_order.check_budget(table, stage.tokens_per_pack, stage.name)
    stream = sample_order.SampleStream(table, 0, model)
    packed = sample_order.pack_step(stream, 0, 8, stage.tokens_per_pack)
    return [[kinds[stream[position].row["reference"]][0] for position in pack] for pack in packed.packs]


# --- the report ---


def describe(config: PlanConfig) -> str:
    """The whole plan as text."""
    model = shape_of(config)
    parameters = parameter_count(model)
    plans = [plan_stage(config, stage, parameters) for stage in config.stages]
    parts = [
        _network_lines(model, parameters),
        _memory_lines(config, plans),
        _budget_lines(config, model, parameters),
        _stage_lines(config, plans),
        _total_lines(config, plans),
    ]
    decoding = [stage.name for stage in config.stages if stage.one_step and stage.one_step.vae]
    if decoding:
        parts.append([f"not counted: the decoder of one_step's pixels, its memory and its work ({decoding})"])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _network_lines(model: Config, parameters: int) -> list[str]:
    video = sum(linear_per_token(model, layer)[0] for layer in range(model.num_layers))
    return [
        f"network: {parameters:,} parameters; the layers' linear parts multiply a video token with "
        f"{video / 2 / parameters:.0%} of them",
    ]


def _memory_lines(config: PlanConfig, plans: list[StagePlan]) -> list[str]:
    names = [field.name for field in dataclasses.fields(Memory)]
    recomputed = "recomputed" if config.checkpoint_activations else "kept"
    lines = [
        f"GB on one of {config.scale.workers[1]} {_device(config)}, ZeRO-{config.scale.zero_stage}, "
        f"activations {recomputed}",
        _row("stage", [name.replace("_", " ") for name in names] + ["total"]),
    ]
    for plan in plans:
        sizes = [getattr(plan.memory, name) for name in names]
        lines.append(_row(plan.name, [f"{size / 1e9:.2f}" for size in [*sizes, plan.memory.total]]))
        if config.scale.use_gpu and plan.memory.total > config.gpu_memory_gb * 1e9:
            lines.append(f"   {plan.name} does not fit into {config.gpu_memory_gb:g} GB: {_advice(config)}")
    return lines


def _advice(config: PlanConfig) -> str:
    if not config.checkpoint_activations:
        return "set checkpoint_activations: true"
    more = "" if config.scale.offload_optimiser else ", or set scale.offload_optimiser: true"
    return f"lower tokens_per_pack, or raise scale.zero_stage or scale.num_workers{more}"


def _budget_lines(config: PlanConfig, model: Config, parameters: int) -> list[str]:
    """Activations by token budget, for the last stage's largest kind of sample."""
    sample = max(
        (kind for kind, _ in kinds_of(config, config.stages[-1])), key=lambda kind: kind.video_tokens
    )
    cuda, budget = config.scale.use_gpu, config.stages[-1].tokens_per_pack
    per_sample = [activation_bytes(model, [sample], cuda, checkpointed) for checkpointed in (False, True)]
    per_token = [size / sample.video_tokens for size in per_sample]
    lines = [
        f"activations by tokens in a pack, a sample {sample.video_tokens} (stage {config.stages[-1].name})",
        _row("tokens", ["kept GB", "recomputed GB"]),
    ]
    for tokens in sorted({budget // 8, budget // 4, budget // 2, budget, 2 * budget}):
        lines.append(_row(f"{tokens}", [f"{tokens * size / 1e9:.2f}" for size in per_token]))
    if cuda:
        free = config.gpu_memory_gb * 1e9 - fixed_memory(config.scale, parameters).total
        fitting = [f"{max(0, math.floor(free / size)):,}" for size in per_token]
        lines.append(_row("most that fit", fitting))
    return lines


def _stage_lines(config: PlanConfig, plans: list[StagePlan]) -> list[str]:
    lines = [
        f"steps at {config.utilisation:.0%} of {config.peak_tflops:g} TFLOP/s a GPU (assumed, not measured)",
        _row(
            "stage",
            ["steps", "samples each", "Mtokens each", "PFLOP each", "attention", "of 6PD", "s each", "hours",
             "GPU hours", "cost", "Msamples"],
        ),
    ]  # fmt: skip
    for plan in plans:
        gpu_hours = plan.hours * config.scale.workers[1]
        values = [
            f"{plan.steps}", f"{plan.samples_per_step:.0f}", f"{plan.tokens_per_step / 1e6:.3g}",
            f"{plan.flops_per_step / 1e15:.4g}", f"{plan.attention_share:.0%}",
            f"{plan.over_six_parameters:.2f}", f"{plan.seconds_per_step:.3g}", f"{plan.hours:.1f}",
            f"{gpu_hours:.0f}", f"{gpu_hours * config.price_per_gpu_hour:.0f}",
            f"{plan.steps * plan.samples_per_step / 1e6:.1f}",
        ]  # fmt: skip
        lines.append(_row(plan.name, values))
    return lines


def _total_lines(config: PlanConfig, plans: list[StagePlan]) -> list[str]:
    hours = sum(plan.hours for plan in plans)
    gpus = config.scale.workers[1]
    paper_hours = PAPER_GPU_HOURS / PAPER_GPUS
    return [
        _row("", [_device(config), "hours", "GPU hours", "cost"]),
        _row("this plan", [f"{gpus}", f"{hours:.1f}", f"{hours * gpus:.0f}", _cost(config, hours * gpus)]),
        _row("the paper", [f"{PAPER_GPUS}", f"{paper_hours:.1f}", f"{PAPER_GPU_HOURS}",
                           _cost(config, PAPER_GPU_HOURS)]),
    ]  # fmt: skip


def _cost(config: PlanConfig, gpu_hours: float) -> str:
    return f"{gpu_hours * config.price_per_gpu_hour:.0f}"


def _device(config: PlanConfig) -> str:
    return "GPUs" if config.scale.use_gpu else "CPU workers"


def _row(name: str, values: list[str]) -> str:
    return f"   {name:<13}" + "".join(f"{value:>{max(10, len(value) + 2)}}" for value in values)
