"""The denoising loop against the same steps written plainly, at each condition level and guidance."""

import pytest
import torch

from model import flow
from model.denoise import Prompt, Schedule, denoise
from model.dit.swin_mmdit import SwinMMDiT
from tests.helpers.tiny_models import DIT

SHAPE = (2, 4, 6)


@pytest.fixture(scope="module")
def network() -> SwinMMDiT:
    torch.manual_seed(0)
    dit = SwinMMDiT(DIT).requires_grad_(False).eval()
    for parameter in dit.parameters():  # its zero-initialised layers too
        parameter += 0.1 * torch.randn_like(parameter)
    return dit


def prompt(seed: int, tokens: int, dtype: torch.dtype) -> Prompt:
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(tokens, DIT.text_dim, generator=draw)
    return Prompt(text, torch.randn(DIT.pooled_dim, generator=draw)).to(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("schedule", "quirk"),
    [
        (Schedule(steps=3, guidance_scale=1.0, condition_noise=100.0), False),
        (Schedule(steps=2, guidance_scale=6.5, condition_noise=100.0), True),
        (Schedule(steps=1, guidance_scale=1.0, condition_noise=0.0), True),
    ],
)
def test_it_is_the_plain_loop(network, schedule, quirk, dtype):
    dit = network.to(dtype)
    torch.manual_seed(1)
    low_quality, noise, condition_noise = torch.randn(3, *SHAPE, 16)
    positive, negative = prompt(2, 5, dtype), prompt(3, 7, dtype)

    level = flow.shift_time(
        torch.tensor(schedule.condition_noise),
        flow.time_shift_factor((SHAPE[1], SHAPE[2], 16) if quirk else SHAPE),
    )
    condition = (1 - level / 1000) * low_quality + level / 1000 * condition_noise
    x = noise
    for number in range(schedule.steps):
        time = torch.tensor(1000.0) * (1 - number / schedule.steps)
        rows = torch.cat([x, condition, torch.ones_like(x[..., :1])], dim=-1).flatten(0, 2).to(dtype)
        velocities = [
            dit(rows, p.text, [SHAPE], [len(p.text)], time[None], p.pooled[None]).float().unflatten(0, SHAPE)
            for p in (positive, negative)
        ]
        velocity = velocities[1] + schedule.guidance_scale * (velocities[0] - velocities[1])
        if schedule.guidance_scale == 1:
            velocity = velocities[0]
        x = x - velocity / schedule.steps

    restored = denoise(dit, low_quality, noise, condition_noise, schedule, positive, negative, quirk)
    assert restored.dtype == torch.float32 and restored.shape == (*SHAPE, 16)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(restored, x, rtol=0, atol=tolerance)


def test_without_noise_the_condition_is_the_input_itself():
    """As the network sees it, in every step, and the prompt that has no pooled part is told as None."""
    seen = []

    def network(video, text, shapes, lengths, time, pooled):
        assert pooled is None and lengths == [4] and shapes == [SHAPE]
        seen.append(video[:, 16:])
        return torch.zeros(len(video), 16)

    low_quality, noise, condition_noise = torch.randn(3, *SHAPE, 16)
    restored = denoise(
        network, low_quality, noise, condition_noise, Schedule(2, 1.0, 0.0), Prompt(torch.zeros(4, 8), None)
    )
    assert torch.equal(restored, noise)
    for condition in seen:
        assert torch.equal(condition[:, :16], low_quality.flatten(0, 2)) and (condition[:, 16] == 1).all()
    assert len(seen) == 2
