"""Counted FLOPs equal those that torch counts while the networks run."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiT, NaDiTConfig
from model.dit.swin_mmdit import SD3_MEDIUM, TINY, SwinMMDiT, SwinMMDiTConfig
from model.dit.windows import Grid
from model.flops import TRAINING_OVER_FORWARD, Config, forward_flops

SMALL = {"num_heads": 2, "head_dim": 16, "width": 32, "text_dim": 24, "rotary_dim": 16}
CONFIGS: dict[str, Config] = {
    "swin_mmdit": replace(TINY, num_heads=2, head_dim=8),
    "3b": replace(SEEDVR_3B, num_layers=4, separate_layers=2, **SMALL),
    "7b": replace(SEEDVR_7B, num_layers=4, separate_layers=4, **{**SMALL, "width": 48}),
}
SAMPLES: list[tuple[Grid, int]] = [((1, 8, 8), 3), ((3, 10, 20), 7), ((2, 22, 6), 0)]
"""(latent shape, text tokens): an image, windows cut at every border, no text."""


def counted_by_torch(config: Config, samples: list[tuple[Grid, int]], backward: bool = False) -> int:
    model = SwinMMDiT(config) if isinstance(config, SwinMMDiTConfig) else NaDiT(config)
    shapes, lengths = [shape for shape, _ in samples], [text for _, text in samples]
    video = torch.randn(sum(t * h * w for t, h, w in shapes), config.in_channels)
    text = torch.randn(sum(lengths), config.text_dim)
    pooled = None if isinstance(config, NaDiTConfig) else torch.randn(len(shapes), config.pooled_dim)
    timestep = torch.full((len(shapes),), 500.0)
    # torch counts this kernel's two products; it has no formula for the CPU's fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = model(video, text, shapes, lengths, timestep, pooled)
        if backward:
            result.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_costs_what_torch_counts(name):
    config = CONFIGS[name]
    for sample in SAMPLES:
        assert forward_flops(config, *sample).total == counted_by_torch(config, [sample])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_samples_cost_what_they_cost_alone(name):
    config = CONFIGS[name]
    alone = sum(forward_flops(config, *sample).total for sample in SAMPLES)
    assert counted_by_torch(config, SAMPLES) == alone


def test_training_costs_three_times_that_less_the_gradient_of_the_inputs():
    config, sample = CONFIGS["swin_mmdit"], SAMPLES[1]
    assert isinstance(config, SwinMMDiTConfig)
    (t, h, w), text = sample
    entering = config.in_channels * t * h * w + config.text_dim * text + 256 + config.pooled_dim
    expected = TRAINING_OVER_FORWARD * forward_flops(config, *sample).total - 2 * config.width * entering
    assert counted_by_torch(config, [sample], backward=True) == expected


def test_the_parts_of_the_papers_model():
    """720p, 21 frames, by hand: 24 layers of 12 width^2 multiply-adds a token, and the windows."""
    counted = forward_flops(SD3_MEDIUM, (6, 90, 160), 154)
    ends = 2 * (33 + 16) * 4 * 1536
    assert counted.video_linear == 21600 * (24 * 24 * 1536**2 + ends)
    assert counted.text_linear == 154 * (23 * 24 * 1536**2 + 6 * 1536**2 + 2 * 4096 * 1536)
    regular = [(5, 32, 32), (5, 32, 32), (5, 32, 16), (5, 13, 32), (5, 13, 32), (5, 13, 16)]
    lengths = [t * h * w for _, h, w in regular for t in (5, 1)]
    assert sum(lengths) == 21600
    assert counted.video_attention[0] == sum(4 * 1536 * n * (n + 154) for n in lengths)
    assert counted.text_attention[-1] == 0 < counted.text_attention[-2]
    assert counted.total == counted.linear + counted.attention


def test_an_odd_side_is_refused():
    with pytest.raises(ValueError, match="patches"):
        forward_flops(SD3_MEDIUM, (1, 9, 8), 4)
