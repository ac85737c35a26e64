"""GPU memory while a transformer trains, counted from the shapes of the network and the samples."""

import dataclasses

from model.dit import nadit_layers
from model.dit.nadit import NaDiTConfig
from model.dit.packing import patch_grids
from model.dit.swin_mmdit import SwinMMDiTConfig
from model.flops import Config, window_sizes
from pipeline.training.runs.trainer import ScaleConfig

_REDUCE_BUCKET = 500_000_000
"""Values in DeepSpeed's bucket of gradients on their way to other ranks (its default)."""
_GATHERED_BY_ZERO_3 = 1_000_000_000
"""Values of gathered parameters that ZeRO-3 keeps at most (its default, stage3_max_live_parameters)."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A kind of sample: latent shape (T, H, W), patch tokens and text tokens."""

    shape: tuple[int, int, int]
    video_tokens: int
    text_tokens: int


def kept_values(model: Config, sample: Sample, cuda: bool) -> tuple[float, float]:
    """Values kept for the backward pass, of one layer: (with everything kept, with its input only).

    Per token, in widths: what autograd saves in `Block` (test_cost_plan.py counts it there). The
    CPU's attention keeps its result twice. Vectors of a sample and statistics of a token are left out.
    """
    grid = patch_grids([sample.shape], model.patch)[0]
    layers = model.layer_windows()[:2]
    windows = sum(n for layer in layers for _, n in window_sizes(layer, grid)) / len(layers)
    once_more = 0 if cuda else 1
    if isinstance(model, SwinMMDiTConfig):
        hidden, video, text = 2.0 * model.mlp_ratio, 10, 9
    else:
        hidden = 2.0 * model.mlp_ratio
        if model.swiglu:
            hidden = 4 * nadit_layers.swiglu_width(model.width, model.mlp_ratio) / model.width
        video, text = 21, 18
    widths = sample.video_tokens * (video + once_more + hidden)
    # Each window's keys, values, text queries and their result hold the text once more.
    widths += sample.text_tokens * (text + hidden + windows * (3 + once_more))
    return model.width * widths, model.width * (sample.video_tokens + sample.text_tokens)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while it trains, by part."""

    weights: float
    """as they are used: bf16 on GPUs, fp32 on CPUs"""
    gradients: float
    optimiser: float
    """fp32 weights and AdamW's two moments; 0 if they are kept on the host"""
    moving_average: float
    """fp32; where the optimiser's fp32 weights are"""
    buckets: float
    """Gradients in transit, and with ZeRO-3 gathered parameters."""
    activations: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def fixed_memory(scale: ScaleConfig, parameters: int) -> Memory:
    """Memory of everything that does not depend on the pack."""
    ranks = scale.workers[1]
    value = 2 if scale.use_gpu else 4
    zero = scale.zero_stage
    on_host = scale.offload_optimiser
    return Memory(
        weights=value * parameters / (ranks if zero == 3 else 1),
        gradients=value * parameters / (ranks if zero >= 2 else 1),
        optimiser=0.0 if on_host else 12 * parameters / ranks,
        moving_average=0.0 if on_host else 4 * parameters / ranks,
        buckets=value * min(parameters, _REDUCE_BUCKET)
        + (value * min(parameters, _GATHERED_BY_ZERO_3) if zero == 3 else 0),
        activations=0.0,
    )


def activation_bytes(model: Config, pack: list[Sample], cuda: bool, checkpointed: bool) -> float:
    """Memory at the peak, when the backward pass begins: what was kept, and the first gradients.

    With activation checkpoints that is every layer's input and one whole layer.
    """
    value = 2 if cuda else 4
    kept = [kept_values(model, sample, cuda) for sample in pack]
    whole, entering = (sum(parts) for parts in zip(*kept, strict=True))
    layers = model.num_layers
    stored = layers * entering + whole if checkpointed else layers * whole
    tokens = sum(sample.video_tokens for sample in pack)
    # The residual's gradient, that of the MLP's hidden values before and after its activation.
    gradients = tokens * model.width * (2 + 2 * _hidden_width(model) / model.width)
    ends = tokens * 4 * (model.in_channels + model.out_channels)
    return value * (stored + gradients + ends)


def _hidden_width(model: Config) -> int:
    if isinstance(model, NaDiTConfig) and model.swiglu:
        return nadit_layers.swiglu_width(model.width, model.mlp_ratio)
    return model.mlp_ratio * model.width
