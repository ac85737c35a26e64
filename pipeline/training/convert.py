"""Conversion of weights, with a model card, between released files, our folders and checkpoints.

Input: a released file (.pth, .safetensors), a weights folder, or a checkpoint of train_dit (its moving
average or its raw weights). Output: one file with the released names, or a weights folder, which restore and
train_dit take as `kind: own`. Tensors of files are mapped, not copied.
"""

import dataclasses
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model import checkpoints
from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder
from pipeline.data import text_embeddings
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.training.state import checkpoint
from pipeline.weights import backbones, weights_folder

ReleasedKind = Literal["vae", "seedvr-3b", "seedvr-7b", "seedvr2-3b", "seedvr2-7b"]
CARD = "MODEL_CARD.md"
RELEASED_LICENSE = "Apache-2.0, as the released SeedVR weights"


@dataclass(frozen=True)
class ConvertConfig:
    """What `jobs.convert` reads."""

    source: Url
    """URL of the weights to convert: a released file (.pth or .safetensors), a weights folder, or one
    checkpoint of `jobs.train_dit` (<output>/checkpoints/dit/checkpoint_...)."""
    output: Url
    """URL of the result: a name that ends in .pth or .safetensors makes a single file with the released
    names, any other a weights folder."""
    kind: ReleasedKind | None = None
    """Which released model a source file holds; null for folders, which say so themselves."""
    which: Literal["average", "raw"] = "average"
    """Which weights to take from a checkpoint: the moving average, or the raw weights as they are trained."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision of the converted weights; keep leaves it as it is."""
    positive: Url | None = None
    """URL of the released positive prompt, pos_emb.pt, which a weights folder of a released transformer
    needs; give it together with `negative`."""
    negative: Url | None = None
    """URL of the released negative prompt, neg_emb.pt, which a weights folder of a released transformer
    needs; give it together with `positive`."""
    data: Url | None = None
    """URL of the data root on which a checkpoint was trained and which holds its prompts, needed to make a
    weights folder of a checkpoint."""
    license: str | None = None
    """Licence named on the model card; null names that of the released weights, for them and for what was
    fine-tuned from them."""

    def __post_init__(self) -> None:
        check_urls(self)
        if weights_folder.is_released_file(self.source) != (self.kind is not None):
            raise ValueError(f"kind: it says what a single file holds; {self.source} goes {self._without}it")
        if (self.positive is None) != (self.negative is None):
            raise ValueError("positive, negative: give both prompts or none")

    @property
    def _without(self) -> str:
        return "with" if self.kind is None else "without "


@dataclass(frozen=True)
class Loaded:
    """Weights with everything known about them; `shape` is the model's config."""

    kind: str
    shape: Any
    state: dict[str, Tensor]
    prompts: weights_folder.Prompts | None
    facts: dict[str, Any]


@contextmanager
def opened(config: ConvertConfig) -> Iterator[Loaded]:
    """Open the source; its tensors are mapped from files that exist until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        if config.kind is not None:
            with storage.local_copy(config.source, folder) as path:
                yield read_file(config, config.kind, path)
        elif storage.exists(storage.join(config.source, weights_folder.CONFIG_FILE)):
            kind, shape, state, prompts = weights_folder.read_folder(config.source)
            about = weights_folder.describe(config.source)["about"]
            yield Loaded(kind, shape, state, prompts, {"training": about})
        else:
            yield read_checkpoint(config)


def read_file(config: ConvertConfig, kind: ReleasedKind, path: str) -> Loaded:
    """A released file."""
    state = checkpoints.read_tensors(path)
    facts = {"sha256 of the source": weights_folder.weights_hash(config.source)}
    if kind == "vae":
        stated = checkpoints.read_header(path).get("autoencoder")
        shape = checkpoints.config_from_header(AutoencoderConfig, stated, path) if stated else FULL_CONFIG
        with torch.device("meta"):
            checkpoints.check_fits(CausalVideoAutoencoder(shape), state, path)
        return Loaded(weights_folder.VAE, shape, state, None, facts)
    backbone = checkpoints.load_nadit(path, backbones.RELEASED[kind].config)
    prompts = None
    if config.positive and config.negative:
        positive, negative = (backbones.read_prompt(url).text for url in (config.positive, config.negative))
        prompts = weights_folder.Prompts(null=negative, positive=positive)
    return Loaded(weights_folder.NADIT, backbone.config, state, prompts, {"model": kind, **facts})


def read_checkpoint(config: ConvertConfig) -> Loaded:
    """A checkpoint of train_dit."""
    state, tensors = checkpoint.read_checkpoint(config.source, "dit", average=config.which == "average")
    network = state.get("network")
    if network is None:
        raise ValueError(f"source: {config.source} is not a checkpoint of train_dit")
    prompts = None if config.data is None else text_embeddings.read_texts(config.data).prompts()
    facts = {"training": {"step": state["step"], "initial": state["initial"], "weights": config.which}}
    return Loaded(network["kind"], weights_folder.shape_from_json(network), tensors, prompts, facts)


def write(config: ConvertConfig, loaded: Loaded) -> None:
    """The weights in their new form."""
    state = loaded.state
    if config.dtype != "keep":
        state = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in state.items()}
    if not weights_folder.is_released_file(config.output):
        if loaded.kind != weights_folder.VAE and loaded.prompts is None:
            raise ValueError(
                "output: a weights folder carries its prompts; give `positive` and `negative` for a released "
                "file, `data` for a checkpoint"
            )
        weights_folder.save_weights(
            config.output, loaded.kind, loaded.shape, state, loaded.prompts, {"converted": loaded.facts}
        )
        return
    if loaded.kind == weights_folder.SWIN_MMDIT:
        raise ValueError("output: only released models have single files; give the URL of a folder")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, posixpath.basename(config.output))
        if path.endswith(".safetensors"):
            name = "autoencoder" if loaded.kind == weights_folder.VAE else "backbone"
            checkpoints.write_tensors(path, state, {name: dataclasses.asdict(loaded.shape)})
        else:
            torch.save(state, path)
        storage.put_file(path, config.output)


def card(config: ConvertConfig, loaded: Loaded) -> str:
    """The model card, in Markdown."""
    initial = loaded.facts.get("training", {}).get("initial") or {}
    released = config.kind is not None or initial.get("kind", "own") != "own"
    licence = config.license or (RELEASED_LICENSE if released else "not stated")
    parameters = sum(tensor.numel() for tensor in loaded.state.values())
    lines = [
        f"# {posixpath.basename(config.output.rstrip('/'))}",
        "",
        f"- licence: {licence}",
        f"- source: {posixpath.basename(config.source.rstrip('/'))}",
        *[f"- {name}: {json.dumps(value)}" for name, value in loaded.facts.items()],
        f"- network: {loaded.kind}, {parameters:,} values in {len(loaded.state)} tensors",
        f"- precision: {config.dtype}",
        "- made by OpenSeedVR's `jobs.convert`",
        "",
        "Shape:",
        "",
        *[f"- `{name}`: {value}" for name, value in dataclasses.asdict(loaded.shape).items()],
    ]
    return "\n".join(lines) + "\n"


def run(config: ConvertConfig) -> None:
    """Convert, and write the card into the folder or next to the file."""
    with opened(config) as loaded:
        write(config, loaded)
        beside = (
            f"{config.output}.md"
            if weights_folder.is_released_file(config.output)
            else storage.join(config.output, CARD)
        )
        storage.write_bytes(beside, card(config, loaded).encode())
        print(
            f"{len(loaded.state)} tensors of a {loaded.kind} -> {config.output}\ncard: {beside}", flush=True
        )
