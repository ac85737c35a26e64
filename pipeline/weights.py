"""Trained weights as a folder: what training leaves behind and what restore, evaluate and precompute load.

    <url>/weights.safetensors    parameters and buffers (training saves its moving average here)
    <url>/<extra>.safetensors    further tensors: for a transformer `null_text` (the joined '' prompt)
    <url>/config.json            kind, the model's config, the sha256 of every file; written last

A folder without `config.json` is unfinished. A file that does not match its hash is refused: weights of
one run never mix with the config of another.
"""

import dataclasses
import hashlib
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pipeline import storage

if TYPE_CHECKING:
    from model.swin_mmdit import SwinMMDiT
    from model.vae.autoencoder import CausalVideoAutoencoder

VAE, SWIN_MMDIT = "vae", "swin_mmdit"
WEIGHTS_FILE = "weights.safetensors"
NULL_TEXT_FILE = "null_text.safetensors"
CONFIG_FILE = "config.json"

C = TypeVar("C")
M = TypeVar("M", bound=torch.nn.Module)


def save_weights(
    url: str,
    kind: str,
    config: Any,
    state_dict: Mapping[str, Tensor],
    extra: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write a weights folder; returns the sha256 of its `weights.safetensors`.

    kind: "vae" | "swin_mmdit". config: the model's frozen dataclass. extra: for a transformer `text`
    (L, D) and `pooled` (P,), fp32, of the '' prompt: kept in `null_text.safetensors`, so that restoring
    needs no text encoder. about: anything worth knowing (steps, stage), kept in `config.json`.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    files = {WEIGHTS_FILE: _bytes_of(state_dict)}
    if extra:
        files[NULL_TEXT_FILE] = _bytes_of(extra)
    for name, data in files.items():
        storage.write_bytes(storage.join(url, name), data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    description = {"kind": kind, "config": dataclasses.asdict(config), "sha256": hashes, "about": about or {}}
    storage.write_json(storage.join(url, CONFIG_FILE), description)
    return hashes[WEIGHTS_FILE]


def describe(url: str) -> dict[str, Any]:
    """`config.json` of a weights folder; ValueError if the folder is none or unfinished."""
    config_url = storage.join(url, CONFIG_FILE)
    if not storage.exists(config_url):
        raise ValueError(f"{url}: no {CONFIG_FILE} here; give the folder that training wrote its weights to")
    return storage.read_json(config_url)


def weights_hash(url: str) -> str:
    """The sha256 of the folder's weights, as written in its config."""
    return describe(url)["sha256"][WEIGHTS_FILE]


def load_vae(url: str) -> "CausalVideoAutoencoder":
    """The trained autoencoder of a folder, on the CPU, in fp32, ready to run (eval, no gradients)."""
    from model.vae.autoencoder import AutoencoderConfig, CausalVideoAutoencoder

    description = _of_kind(url, VAE)
    vae = CausalVideoAutoencoder(config_from_json(AutoencoderConfig, description["config"]))
    return _filled(vae, url, description)


def load_dit(url: str) -> tuple["SwinMMDiT", Tensor, Tensor | None]:
    """The trained transformer of a folder, on the CPU, in fp32, ready to run, and its null text.

    Returns (model, text (L, D), pooled (P,) or None), the text being the joined '' prompt.
    """
    from model.swin_mmdit import SwinMMDiT, SwinMMDiTConfig

    description = _of_kind(url, SWIN_MMDIT)
    model = SwinMMDiT(config_from_json(SwinMMDiTConfig, description["config"]))
    null = _read_tensors(url, NULL_TEXT_FILE, description)
    return _filled(model, url, description), null["text"], null.get("pooled")


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


def _bytes_of(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies: safetensors refuses tensors that share memory.
    return to_safetensors({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})


def _of_kind(url: str, kind: str) -> dict[str, Any]:
    description = describe(url)
    if description["kind"] != kind:
        raise ValueError(f"{url}: holds weights of kind {description['kind']!r}, wanted {kind!r}")
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


def _filled(model: M, url: str, description: Mapping[str, Any]) -> M:
    model.load_state_dict(_read_tensors(url, WEIGHTS_FILE, description))
    return model.float().eval().requires_grad_(False)
