"""Which transformer a job uses, and everything that depends on that choice, in one place.

Covers our own weights folders (`kind: own`) and the four released models: their shapes, prompts, sampling
schedules and the size that their scripts restore to. `restore` and `train_dit` get all of it from here and
name no model themselves. Facts on the released models are from SeedVR commit 673b563, its inference scripts
and configs.
"""

import tempfile
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model import checkpoints, flow
from model.denoise import Prompt, Schedule
from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiTConfig
from model.dit.swin_mmdit import SwinMMDiTConfig
from model.vae.autoencoder import AutoencoderConfig
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.weights import weights_folder

Kind = Literal["own", "seedvr-3b", "seedvr-7b", "seedvr2-3b", "seedvr2-7b"]
RELEASED_AREA = (720, 1280)
"""Area, in pixels, to which the released scripts restore everything by default."""


OWN = Schedule(steps=50, guidance_scale=1.0, condition_noise=flow.INFERENCE_CONDITION_LEVEL)
SEEDVR = replace(OWN, guidance_scale=6.5)
SEEDVR2 = Schedule(steps=1, guidance_scale=1.0, condition_noise=0.0)


@dataclass(frozen=True)
class Released:
    """One released model."""

    config: NaDiTConfig
    schedule: Schedule


RELEASED: dict[str, Released] = {
    "seedvr-3b": Released(SEEDVR_3B, SEEDVR),
    "seedvr-7b": Released(SEEDVR_7B, SEEDVR),
    "seedvr2-3b": Released(SEEDVR_3B, SEEDVR2),
    "seedvr2-7b": Released(SEEDVR_7B, SEEDVR2),
}


@dataclass(frozen=True)
class BackboneConfig:
    """A transformer to start training from."""

    weights: Url
    """URL of a folder that `jobs.train_dit` wrote, or of a released file (.pth or .safetensors)."""
    kind: Kind = "own"
    """Which model the weights are: own for a folder of ours, otherwise the released model that the file
    holds."""

    def __post_init__(self) -> None:
        check_urls(self, "initial.")
        _check_weights(self.weights, self.kind, "initial")


@dataclass(frozen=True)
class ModelConfig:
    """The models for restoring: transformer, autoencoder and prompts."""

    weights: Url
    """URL of a folder that `jobs.train_dit` wrote, or of a released file (.pth or .safetensors)."""
    vae: Url
    """URL of a folder that `jobs.train_vae` wrote, or of the released autoencoder's file."""
    kind: Kind = "own"
    """Which model the weights are: own for a folder of ours, otherwise the released model that the file
    holds."""
    positive: Url | None = None
    """URL of the positive prompt: pos_emb.pt for released models, which need it, or for ours a .safetensors
    file with `text` and `pooled`, which only guidance needs."""
    negative: Url | None = None
    """URL of the released negative prompt, neg_emb.pt, which guidance needs; our weights folders carry their
    own."""
    shape_quirk: bool = True
    """Whether a released model's condition noise is shifted by (height, width, 16), as the released
    scripts do, rather than by (frames, height, width), as they were meant to; our own models always use
    the latter."""

    def __post_init__(self) -> None:
        check_urls(self, "model.")
        _check_weights(self.weights, self.kind, "model")
        if self.kind == "own" and self.negative is not None:
            raise ValueError("model.negative: a folder of ours carries its own negative prompt; leave it out")
        if self.kind != "own" and self.positive is None:
            raise ValueError(f"model.positive: {self.kind} needs the prompt of its release, pos_emb.pt")

    @property
    def schedule(self) -> Schedule:
        """How the model is sampled unless the user says otherwise."""
        return OWN if self.kind == "own" else RELEASED[self.kind].schedule

    @property
    def can_guide(self) -> bool:
        """Whether both prompts that guidance needs are known."""
        return self.positive is not None and (self.kind == "own" or self.negative is not None)

    def hashes(self) -> dict[str, str | None]:
        """The sha256 of every file that this config loads."""
        urls = {"vae": self.vae, "dit": self.weights, "positive": self.positive, "negative": self.negative}
        return {f"{name}_sha256": url and weights_folder.weights_hash(url) for name, url in urls.items()}


def _check_weights(url: str, kind: Kind, key: str) -> None:
    if kind == "own" and weights_folder.is_released_file(url):
        raise ValueError(
            f"{key}.kind: {url} is a single file; say which released model it holds, or give a folder of ours"
        )
    if kind != "own" and not weights_folder.is_released_file(url):
        raise ValueError(f"{key}.weights: {kind} is a file (.pth or .safetensors), not the folder {url}")


@dataclass(frozen=True)
class Backbone:
    """A loaded transformer, ready to sample with."""

    network: torch.nn.Module
    prompt: Prompt
    negative: Prompt | None
    """what guidance leads away from; None: no guidance"""
    schedule: Schedule
    shape_quirk: bool


def shape_of(config: BackboneConfig) -> SwinMMDiTConfig | NaDiTConfig:
    """The network's shape, without its weights."""
    if config.kind == "own":
        shape = weights_folder.shape_from_json(weights_folder.describe(config.weights))
        if isinstance(shape, AutoencoderConfig):
            raise ValueError(f"initial.weights: {config.weights} holds an autoencoder")
        return shape
    if not storage.exists(config.weights):
        raise ValueError(f"initial.weights: there is no file {config.weights}")
    stated = None
    if not config.weights.startswith("s3://"):
        stated = checkpoints.stated_backbone(storage.path_of(config.weights))
    return stated or RELEASED[config.kind].config


def load_transformer(
    config: BackboneConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[weights_folder.Transformer, weights_folder.Prompts | None]:
    """The network in `dtype` on `device`, and the prompts that it carries (a released file has none)."""
    if config.kind == "own":
        model, prompts = weights_folder.load_dit(config.weights)
        return model.to(device, dtype), prompts
    with tempfile.TemporaryDirectory() as folder, storage.local_copy(config.weights, folder) as path:
        shape = RELEASED[config.kind].config
        return checkpoints.load_nadit(path, shape, dtype, device).requires_grad_(False), None


def load_with_prompts(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Backbone:
    """The transformer of a restoration with its prompts."""
    network, carried = load_transformer(BackboneConfig(config.weights, config.kind), dtype, device)
    positive = read_prompt(config.positive) if config.positive else None
    if carried is None:
        assert positive is not None  # ModelConfig has checked
        negative = read_prompt(config.negative) if config.negative else None
        return Backbone(network, positive, negative, config.schedule, config.shape_quirk)
    null = Prompt(carried.null, carried.pooled)
    if positive is not None:
        return Backbone(network, positive, null, config.schedule, shape_quirk=False)
    fixed = null if carried.positive is None else Prompt(carried.positive, carried.pooled)
    return Backbone(network, fixed, None, config.schedule, shape_quirk=False)


def read_prompt(url: str) -> Prompt:
    """A released prompt tensor (.pt), or a .safetensors file with `text` and perhaps `pooled`."""
    with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
        text = checkpoints.read_tensor(path, "text").float()
        if text.ndim != 2:
            raise ValueError(f"{url}: a prompt is (tokens, channels), this is {tuple(text.shape)}")
        others = checkpoints.read_tensors(path) if path.endswith(".safetensors") else {}
        return Prompt(text, others.get("pooled"))
