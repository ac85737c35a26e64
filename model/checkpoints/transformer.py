"""The transformers' weights: SeedVR's backbones, released or ours, and SD3 for Swin-MMDiT to start from."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.checkpoints.files import (
    build_network,
    check_fits,
    config_from_header,
    read_header,
    read_tensors,
    write_tensors,
)
from model.dit.nadit import NaDiT, NaDiTConfig, config_values
from model.dit.sd3_weights import SD3Report, copy_sd3_weights
from model.dit.swin_mmdit import SwinMMDiT
from model.dit.windows import RELEASED_WINDOW


def build_backbone(config: NaDiTConfig, state: Mapping[str, Tensor], source: str | Path) -> NaDiT:
    """The released backbone of `config` holding `state`, in evaluation mode."""
    return build_network(lambda: NaDiT(config), state, source)


def stated_backbone(path: str | Path) -> NaDiTConfig | None:
    """The shape that a file of `save_backbone` states; the released files state none."""
    header = read_header(path)
    if "backbone" not in header:
        return None
    return config_from_header(NaDiTConfig, config_values(header["backbone"]), path)


def load_nadit(
    path: str | Path,
    config: NaDiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> NaDiT:
    """A released backbone (.pth or .safetensors, also the community's fp16 files).

    config: `nadit.SEEDVR_3B` or `SEEDVR_7B` for files that do not state theirs. dtype: None keeps the file's
    own, mapped from disk and never copied; else each tensor is cast on its way to `device`.
    """
    device, state = torch.device(device), read_tensors(path)
    config = stated_backbone(path) or config
    if config is None:
        raise ValueError(f"{path}: states no configuration; say which model it is (3B or 7B)")
    with torch.device("meta"):
        check_fits(NaDiT(config), state, path)  # before the work of casting
    kept = device.type == "cpu" and (dtype is None or {t.dtype for t in state.values()} == {dtype})
    return build_backbone(config, state if kept else _cast(path, state, dtype, device), path)


def save_backbone(path: str | Path, backbone: NaDiT, header: Mapping[str, Any]) -> None:
    """Write weights and configuration; `header` holds further facts to store (step, source)."""
    write_tensors(path, backbone.state_dict(), {**header, "backbone": dataclasses.asdict(backbone.config)})


def _cast(
    path: str | Path, mapped: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """Cast or move the file's tensors; the peak memory is the result plus the file's largest tensor.

    Reading a mapped tensor keeps its pages in memory until the file is unmapped, so the file is reopened for
    each group of tensors, none larger in bytes than the largest one. Empties `mapped`.
    """
    sizes = {name: tensor.nbytes for name, tensor in mapped.items()}
    mapped.clear()
    limit, used = max(sizes.values(), default=0), 0
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    state: dict[str, Tensor] = {}
    for group in groups:
        tensors = read_tensors(path)
        state |= {name: tensors[name].to(device, dtype, copy=True) for name in group}
        del tensors
    return state


def released_backbone_config(released: Mapping[str, Any]) -> NaDiTConfig:
    """Our configuration from the released code's (`mm_layers` and `rope_dim` are only in the 3B's)."""
    is_3b = "mm_layers" in released
    return NaDiTConfig(
        rotary_dim=released.get("rope_dim", released["head_dim"] // 2),
        num_layers=released["num_layers"],
        num_heads=released["heads"],
        head_dim=released["head_dim"],
        width=released["vid_dim"],
        patch=tuple(released["patch_size"]),
        in_channels=released["vid_in_channels"],
        out_channels=released["vid_out_channels"],
        text_dim=released["txt_in_dim"],
        mlp_ratio=released["expand_ratio"],
        separate_layers=released.get("mm_layers", released["num_layers"]),
        windows=tuple(released["window"][0]) if "window" in released else RELEASED_WINDOW,
        swiglu=is_3b,
        multimodal_rotary=is_3b,
        modulated_head=is_3b,
        text_ends_at_last_attention=is_3b,
    )


def load_sd3_transformer(model: SwinMMDiT, path: str | Path) -> SD3Report:
    """Start `model` from SD3's transformer, in place; the report says what was copied, left out and new.

    path: a safetensors file, a sharded checkpoint's index (.safetensors.index.json), or the folder of either
    (`transformer/` of a diffusers SD3 repository). Raises ValueError if there is no such file, or its content
    does not fit.
    """
    files = _tensor_files(Path(path))

    def read(name: str) -> Tensor:
        # Mapped pages stay in memory until the file is closed; reopening it keeps the peak at one tensor.
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    return copy_sd3_weights(model, files, read, str(path))


def _tensor_files(path: Path) -> dict[str, Path]:
    """Every tensor's name -> the file that holds it."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"{path}: wanted one .safetensors or index file in this folder, found {names}")
        path = files[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    shards = json.loads(path.read_text())["weight_map"]
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise ValueError(f"{path}: its shard {shard} is missing")
    return {name: path.parent / shard for name, shard in shards.items()}
