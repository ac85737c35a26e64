"""The one denoising loop, from noise to a restored latent, used for whole videos and in validation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import flow
from model.dit.windows import Grid

Network = Callable[[Tensor, Tensor, list[Grid], list[int], Tensor, Tensor | None], Tensor]
"""Maps (video, text, latent shapes, text lengths, times, pooled) to velocity, like both transformers."""


@dataclass(frozen=True)
class Prompt:
    """A text as the network takes it: `text` (L, D) and `pooled` (P,) or None."""

    text: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Prompt":
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Prompt(self.text.to(device, dtype), pooled)


@dataclass(frozen=True)
class Schedule:
    """How a model is sampled."""

    steps: int
    guidance_scale: float
    condition_noise: float
    """0..1000, before the shift by the video's size"""


def denoise(  # noqa: PLR0913 - one call, all of it tensors
    network: Network,
    low_quality: Tensor,
    noise: Tensor,
    condition_noise: Tensor,
    schedule: Schedule,
    prompt: Prompt,
    negative: Prompt | None = None,
    released_quirk: bool = False,
) -> Tensor:
    """The restored latent, fp32 (T, H, W, 16).

    low_quality, noise, condition_noise: fp32 (T, H, W, 16) on the network's device, scaled as the network
    knows them; the prompts there too and in its precision. negative: what guidance leads away from, needed
    where the scale is not 1. released_quirk: see `flow.condition_time`.
    """
    shape = (low_quality.shape[0], low_quality.shape[1], low_quality.shape[2])
    level = flow.condition_time(schedule.condition_noise, shape, released_quirk)
    time = torch.tensor(level, device=low_quality.device)
    condition = flow.interpolate(low_quality, condition_noise, time).flatten(0, 2)

    def velocity_for(prompt: Prompt) -> flow.Velocity:
        pooled = None if prompt.pooled is None else prompt.pooled[None]

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            video = flow.network_input(x, condition).to(prompt.text.dtype)
            return network(video, prompt.text, [shape], [len(prompt.text)], time[None], pooled)

        return velocity

    velocity = flow.guided_velocity(
        velocity_for(prompt), velocity_for(negative or prompt), schedule.guidance_scale
    )
    return flow.sample(velocity, noise.flatten(0, 2), flow.sampling_times(schedule.steps)).unflatten(0, shape)
