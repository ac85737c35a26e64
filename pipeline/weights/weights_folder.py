"""Trained weights as a folder: what training leaves behind and what restore, evaluate and precompute load.

    <url>/weights.safetensors    parameters and buffers (training saves its moving average here)
    <url>/<extra>.safetensors    further tensors: for a transformer `null_text` (the joined '' prompt)
    <url>/config.json            kind, the model's config, the sha256 of every file; written last

A folder without `config.json` is unfinished. A file that does not match its hash is refused: weights of
one run never mix with the config of another. Where a folder is expected, the URL of a released file
(.pth, .safetensors) works too: `backbones.py` says which transformer such a file holds.
"""

import dataclasses
import functools
import hashlib
import os
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoints
from model.dit.nadit import NaDiT, NaDiTConfig, config_values
from model.dit.swin_mmdit import SwinMMDiT, SwinMMDiTConfig
from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder
from pipeline.store import storage

VAE, SWIN_MMDIT, NADIT = "vae", "swin_mmdit", "nadit"
WEIGHTS_FILE = "weights.safetensors"
NULL_TEXT_FILE = "null_text.safetensors"
CONFIG_FILE = "config.json"
RELEASED_ENDINGS = (".safetensors", ".pth", ".pt")

Transformer = SwinMMDiT | NaDiT
Shape = SwinMMDiTConfig | NaDiTConfig | AutoencoderConfig
C = TypeVar("C")
M = TypeVar("M", bound=torch.nn.Module)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The text embeddings that a transformer was trained with and is used with; fp32, on the CPU."""

    null: Tensor
    """(L, D) what it sees without a prompt: the joined '' prompt, or the released negative one"""
    pooled: Tensor | None = None
    """(P,) of the '' prompt"""
    positive: Tensor | None = None
    """(L, D) the fixed prompt of a released backbone"""


def transformer_kind(model: Transformer) -> str:
    """How `config.json` names a transformer."""
    return NADIT if isinstance(model, NaDiT) else SWIN_MMDIT


def shape_from_json(description: Mapping[str, Any]) -> Shape:
    """The shape that `config.json`, or any JSON with `kind` and `config`, states."""
    classes = {SWIN_MMDIT: SwinMMDiTConfig, NADIT: NaDiTConfig, VAE: AutoencoderConfig}
    values = description["config"]
    if description["kind"] == NADIT:
        values = config_values(values)
    return config_from_json(classes[description["kind"]], values)


def save_weights(
    url: str,
    kind: str,
    config: Any,
    state_dict: Mapping[str, Tensor],
    prompts: Prompts | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write a weights folder; returns the sha256 of its `weights.safetensors`.

    kind: "vae" | "swin_mmdit" | "nadit". config: the model's frozen dataclass. prompts: of a transformer,
    kept in `null_text.safetensors`, so that restoring needs no text encoder. about: anything worth
    knowing (steps, stage), kept in `config.json`.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    files = {WEIGHTS_FILE: dict(state_dict)}
    if prompts is not None:
        named = {"text": prompts.null, "pooled": prompts.pooled, "positive": prompts.positive}
        files[NULL_TEXT_FILE] = {name: tensor for name, tensor in named.items() if tensor is not None}
    hashes = {name: _write_tensors(storage.join(url, name), tensors) for name, tensors in files.items()}
    description = {"kind": kind, "config": dataclasses.asdict(config), "sha256": hashes, "about": about or {}}
    storage.write_json(storage.join(url, CONFIG_FILE), description)
    return hashes[WEIGHTS_FILE]


def describe(url: str) -> dict[str, Any]:
    """`config.json` of a weights folder; ValueError if the folder is none or unfinished."""
    config_url = storage.join(url, CONFIG_FILE)
    if not storage.exists(config_url):
        raise ValueError(f"{url}: no {CONFIG_FILE} here; give the folder that training wrote its weights to")
    return storage.read_json(config_url)


def is_released_file(url: str) -> bool:
    """Whether the URL names a single file of weights rather than a folder."""
    return url.endswith(RELEASED_ENDINGS)


def weights_hash(url: str) -> str:
    """The sha256 of the weights: as a folder's config states it, or of a released file's own bytes."""
    if not is_released_file(url):
        return describe(url)["sha256"][WEIGHTS_FILE]
    if not storage.exists(url):
        raise ValueError(f"{url}: no such checkpoint file")
    return _file_hash(url, storage.version(url))


@functools.lru_cache(maxsize=16)
def _file_hash(url: str, version: str) -> str:
    """Gigabytes are read once per file and process; `version` changes when the file does."""
    found = storage.sha256(url)
    assert found is not None  # weights_hash has looked
    return found


def load_vae(url: str) -> CausalVideoAutoencoder:
    """The trained autoencoder of a folder, or a released file, on the CPU, in fp32, ready to run."""
    if is_released_file(url):
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
            return checkpoints.load_autoencoder(path).eval().requires_grad_(False)
    _of_kind(url, VAE)
    _, shape, state, _ = read_folder(url)
    return _filled(CausalVideoAutoencoder, shape, state, url)


def load_dit(url: str) -> tuple[Transformer, Prompts]:
    """The trained transformer of a folder, on the CPU, in fp32, ready to run, and its prompts."""
    kind = _of_kind(url, SWIN_MMDIT, NADIT)["kind"]
    _, shape, state, prompts = read_folder(url)
    assert prompts is not None  # read_folder gives them with every transformer
    if kind == NADIT:
        return _filled(NaDiT, shape, state, url), prompts
    return _filled(SwinMMDiT, shape, state, url), prompts


def read_folder(url: str) -> tuple[str, Shape, dict[str, Tensor], Prompts | None]:
    """A weights folder as it is: kind, shape, tensors (mapped from disk) and a transformer's prompts."""
    description = describe(url)
    prompts = None
    if description["kind"] != VAE:
        texts = _read_tensors(url, NULL_TEXT_FILE, description)
        prompts = Prompts(texts["text"], texts.get("pooled"), texts.get("positive"))
    state = _read_tensors(url, WEIGHTS_FILE, description)
    return description["kind"], shape_from_json(description), state, prompts


def config_from_json(config_class: type[C], values: Mapping[str, Any]) -> C:
    """The dataclass of JSON values: lists become tuples, inner dataclasses are built from their fields."""
    hints = typing.get_type_hints(config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{CONFIG_FILE}: {config_class.__name__} knows no field {unknown[0]!r}")
    return config_class(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next((option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)), hint)
    if isinstance(value, dict) and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return config_from_json(hint, value)
    if isinstance(value, list):
        return tuple(_from_json(None, item) for item in value)
    return value


def _write_tensors(url: str, tensors: Mapping[str, Tensor]) -> str:
    """Write one file; returns its sha256."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tensors.safetensors")
        checkpoints.write_tensors(path, tensors, {})
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        storage.put_file(path, url)
    return digest


def _of_kind(url: str, *kinds: str) -> dict[str, Any]:
    description = describe(url)
    if description["kind"] not in kinds:
        raise ValueError(f"{url}: holds weights of kind {description['kind']!r}, wanted {' or '.join(kinds)}")
    return description


def _read_tensors(url: str, name: str, description: Mapping[str, Any]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder, storage.local_copy(storage.join(url, name), folder) as path:
        if not os.path.exists(path):
            raise ValueError(f"{url}: {name} is missing; copy the whole weights folder")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != description["sha256"].get(name):
            raise ValueError(f"{url}: {name} does not match the sha256 in {CONFIG_FILE}; copy it again")
        return load_file(path)


def _filled(model_class: Callable[[Any], M], shape: Shape, state: Mapping[str, Tensor], url: str) -> M:
    """The model: it takes the tensors themselves, without a copy of its own."""
    with torch.device("meta"):
        model = model_class(shape)
    return checkpoints.load_strict(model, state, url).float().eval().requires_grad_(False)
