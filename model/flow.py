"""Rectified flow between data (time 0) and noise (time 1000), its training and its Euler sampler.

x_t = (1 - t/1000) data + (t/1000) noise; the network predicts the velocity, noise - data. All functions work
on packed rows, one row a latent pixel, and are pure: noise is an argument, or drawn from a given generator.

The paper says "SD3's settings" (logit-normal times) and gives no numbers for the time shift or the noise on
the condition; those here are the released code's (SeedVR commit 673b563) where it has them. Ours, since
nobody gives one: the level of the condition's noise in training, uniform in 0..250 before its shift.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.dit.windows import Grid

MAX_TIME = 1000.0
TRAINING_CONDITION_LEVEL = 250.0
"""Upper end of the condition's noise level in training, before the shift."""
INFERENCE_CONDITION_LEVEL = 100.0
"""The condition's noise level at inference, before the shift (released SeedVR; SeedVR2 uses 0)."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> velocity; x: (rows, C), t: () time in 0..1000."""


# --- the path ---


def spread(per_sample: Tensor, rows: Sequence[int]) -> Tensor:
    """(B,) -> (sum of rows, 1): each sample's value on all of its rows."""
    repeats = torch.tensor(list(rows), device=per_sample.device)
    return per_sample.repeat_interleave(repeats)[:, None]


def interpolate(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t; time in 0..1000, broadcast against the rows (see `spread`)."""
    fraction = time / MAX_TIME
    return (1 - fraction) * data + fraction * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The network's target."""
    return noise - data


def data_from_velocity(x: Tensor, v: Tensor, time: Tensor) -> Tensor:
    """The data end of the straight path through x with velocity v."""
    return x - time / MAX_TIME * v


def noise_from_velocity(x: Tensor, v: Tensor, time: Tensor) -> Tensor:
    """The noise end of that path."""
    return x + (1 - time / MAX_TIME) * v


# --- the time shift ---


def time_shift_factor(shape: Grid) -> float:
    """How much more noise a larger sample needs to be as corrupted: 1 leaves times as they are.

    shape: latent (T, H, W). Linear in the pixel count, without clamping: images from 1.0 at 256 x 256 to 3.2
    at 1024 x 1024; videos from 1.0 at 37 frames of 256 x 256 to 5.0 at 145 frames of 1280 x 720. So small
    samples get a factor a little below 1.
    """
    frames = (shape[0] - 1) * 4 + 1
    pixels = frames * 8 * shape[1] * 8 * shape[2]
    low, high, top = (256 * 256, 1024 * 1024, 3.2) if frames == 1 else (256 * 256 * 37, 1280 * 720 * 145, 5.0)
    return 1.0 + (top - 1.0) * (pixels - low) / (high - low)


def shift_time(time: Tensor, factor: Tensor | float) -> Tensor:
    """Shift t to k t / (1 + (k - 1) t) on the scale 0..1000, which leaves 0 and 1000 in place."""
    fraction = time / MAX_TIME
    return MAX_TIME * factor * fraction / (1 + (factor - 1) * fraction)


def _shift_factors(shapes: Sequence[Grid], device: torch.device) -> Tensor:
    return torch.tensor([time_shift_factor(shape) for shape in shapes], device=device)


# --- the condition ---


def condition_time(level: float, shape: Grid, released_quirk: bool) -> float:
    """The time whose noise the condition gets at inference: `level`, shifted by the sample's size.

    released_quirk: the released scripts take (H, W, 16) for (T, H, W) here; their weights were published with
    results made that way, so it is the default for them and for nothing else.
    """
    shape = (shape[1], shape[2], 16) if released_quirk else shape
    return shift_time(torch.tensor(level), time_shift_factor(shape)).item()


def network_input(noisy: Tensor, condition: Tensor) -> Tensor:
    """(rows, 33): noisy latent, condition latent, and the mask, which is 1 everywhere for restoration.

    There is no way to leave the condition out: with the LQ video dropped now and then the paper saw the
    generative prior grow at fidelity's expense (section 3.3).
    """
    return torch.cat([noisy, condition.to(noisy.dtype), torch.ones_like(noisy[:, :1])], dim=-1)


# --- training ---


@dataclass(frozen=True)
class TrainingDraws:
    """Everything drawn for one training step; with the data it gives the network's input and its target."""

    noise: Tensor
    """(rows, 16) the noise end of the path."""
    condition: Tensor
    """(rows, 16) the LQ latent with its own noise."""
    time: Tensor
    """(B,) in 0..1000."""
    condition_time: Tensor
    """(B,) noise level of the condition, which the network does not get."""


def training_times(shapes: Sequence[Grid], generator: torch.Generator) -> Tensor:
    """(B,) logit-normal times (location 0, scale 1), then the shift for each sample's latent (T, H, W)."""
    normal = torch.randn(len(shapes), generator=generator, device=generator.device)
    return shift_time(MAX_TIME * normal.sigmoid(), _shift_factors(shapes, generator.device))


def training_condition_times(shapes: Sequence[Grid], generator: torch.Generator) -> Tensor:
    """(B,) noise levels of the condition: uniform in 0..250, then the same shift."""
    uniform = torch.rand(len(shapes), generator=generator, device=generator.device)
    return shift_time(TRAINING_CONDITION_LEVEL * uniform, _shift_factors(shapes, generator.device))


def draw_training(lq: Tensor, shapes: Sequence[Grid], generator: torch.Generator) -> TrainingDraws:
    """Draws times and noises for packed latents.

    lq: (rows, 16), scaled, any float dtype, on the generator's device; shapes: latent (T, H, W) each.
    All is computed and returned in fp32.
    """
    rows = [t * h * w for t, h, w in shapes]
    time = training_times(shapes, generator)
    level = training_condition_times(shapes, generator)
    noise, lq_noise = (torch.randn(lq.shape, generator=generator, device=lq.device) for _ in range(2))
    condition = interpolate(lq.float(), lq_noise, spread(level, rows))
    return TrainingDraws(noise, condition, time, level)


# --- sampling ---


def sampling_times(steps: int, shift: float = 1.0) -> Tensor:
    """(steps,) fp32 times from 1000 down ("uniform trailing": 1, 1 - 1/N, ..., 1/N), then shifted.

    The released models sample unshifted (shift 1).
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    # Rounding decides whether arange ends before 0: for some N (49, 98, ...) it has N + 1 entries.
    fractions = torch.arange(1.0, 0.0, -1.0 / steps)[:steps]
    return shift_time(MAX_TIME * fractions, shift)


def guide(positive: Tensor, negative: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance on velocities (rows, C): negative + scale (positive - negative).

    rescale in 0..1 draws each row's standard deviation over its channels back to the positive's (Lin et al.
    2023, there per sample; per row here, as the released code does on packed rows).
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0.0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))


def guided_velocity(positive: Velocity, negative: Velocity, scale: float, rescale: float = 0.0) -> Velocity:
    """The velocity to sample with: two calls of the network per step, or one if scale is 1."""
    if scale == 1.0:
        return positive
    return lambda x, time: guide(positive(x, time), negative(x, time), scale, rescale)


def sample(velocity_at: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """Euler steps from noise (at times[0]) through `times` to 0; one velocity per entry of `times`.

    The state stays in fp32 whatever the network computes in.
    """
    x = noise.float()
    for time, following in pairwise([*times, torch.zeros(())]):
        x = x + (following - time) / MAX_TIME * velocity_at(x, time.to(x.device)).float()
    return x
