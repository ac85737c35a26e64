"""Starting Swin-MMDiT from SD3-Medium: its transformer's weights in the diffusers layout.

What has a counterpart is copied (SD3's separate q, k, v become one projection; the patch convolution becomes
a linear layer), the new input channels (LQ latent, mask) start at zero, so that the first outputs are those
of SD3 on the noisy latent. The position table has no counterpart, nor has the last block's query projection
of the text, which SD3 itself never uses.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from model.swin_mmdit import SwinMMDiT


@dataclass(frozen=True)
class SD3Report:
    """What `load_sd3_transformer` did."""

    taken: tuple[str, ...]
    """Names in the file that were copied."""
    left: tuple[str, ...]
    """Names in the file that have no place in Swin-MMDiT."""
    new: tuple[str, ...]
    """Parts of Swin-MMDiT that the file does not have; all start at zero."""

    def __str__(self) -> str:
        return (
            f"SD3: took {len(self.taken)} tensors; left {', '.join(self.left) or 'none'}; "
            f"new (zero): {', '.join(self.new) or 'none'}"
        )


def load_sd3_transformer(model: SwinMMDiT, path: str | Path) -> SD3Report:
    """Copies SD3 transformer weights into `model`, in place, tensor by tensor.

    path: a safetensors file, a sharded checkpoint's index (.safetensors.index.json), or the folder of either
    (`transformer/` of a diffusers SD3 repository). Raises ValueError where names or shapes do not fit.
    """
    tensors = _open_tensors(Path(path))
    taken: list[str] = []
    for name, parameter in model.named_parameters():
        sources, combine = _source(name, model)
        for source in sources:
            if source not in tensors:
                raise ValueError(
                    f"{path}: no tensor {source!r} (for {name}): not an SD3 transformer as diffusers has it"
                )
        value = combine([tensors[source].get_tensor(source) for source in sources])
        if value.shape != parameter.shape:
            raise ValueError(
                f"{path}: {sources[0]!r} makes {tuple(value.shape)}, but {name} is {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
        taken += sources
    file_channels = tensors["pos_embed.proj.weight"].get_slice("pos_embed.proj.weight").get_shape()[1]
    return SD3Report(
        taken=tuple(taken),
        left=tuple(sorted(set(tensors) - set(taken))),
        new=(
            f"video_in, input channels {file_channels} to {model.config.in_channels - 1}",
            f"blocks.{model.config.num_layers - 1}.text.qkv, query rows",
        ),
    )


Combine = Callable[[list[Tensor]], Tensor]


def _source(name: str, model: SwinMMDiT) -> tuple[list[str], Combine]:
    """SD3 names that make up our parameter `name`, and how they are put together."""
    module, kind = name.rsplit(".", 1)
    if module == "video_in":
        if kind == "bias":
            return ["pos_embed.proj.bias"], _only
        return ["pos_embed.proj.weight"], lambda tensors: _patch_weight(tensors[0], model.config.in_channels)
    if module.startswith("blocks."):
        _, index, stream, part = module.split(".", 3)
        block = f"transformer_blocks.{index}"
        if part == "qkv" and stream == "text" and int(index) == model.config.num_layers - 1:
            names = [f"{block}.attn.{projection}.{kind}" for projection in ("add_k_proj", "add_v_proj")]
            return names, lambda tensors: torch.cat([torch.zeros_like(tensors[0]), *tensors])
        if part == "qkv":
            parts = (
                ("to_q", "to_k", "to_v") if stream == "video" else ("add_q_proj", "add_k_proj", "add_v_proj")
            )
            return [f"{block}.attn.{projection}.{kind}" for projection in parts], torch.cat
        return [f"{block}.{_BLOCK_PARTS[stream, part]}.{kind}"], _only
    return [f"{_TOP_PARTS[module]}.{kind}"], _only


_BLOCK_PARTS = {
    ("video", "modulation"): "norm1.linear",
    ("video", "out"): "attn.to_out.0",
    ("video", "mlp.hidden"): "ff.net.0.proj",
    ("video", "mlp.out"): "ff.net.2",
    ("text", "modulation"): "norm1_context.linear",
    ("text", "out"): "attn.to_add_out",
    ("text", "mlp.hidden"): "ff_context.net.0.proj",
    ("text", "mlp.out"): "ff_context.net.2",
}

_TOP_PARTS = {
    "text_in": "context_embedder",
    "time_in.hidden": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out": "time_text_embed.timestep_embedder.linear_2",
    "pooled_in.hidden": "time_text_embed.text_embedder.linear_1",
    "pooled_in.out": "time_text_embed.text_embedder.linear_2",
    "modulation_out": "norm_out.linear",
    "video_out": "proj_out",
}


def _only(tensors: list[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _patch_weight(weight: Tensor, in_channels: int) -> Tensor:
    """A convolution's (width, channels, p, p) as a linear layer over (p, p, channels), new channels zero."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, in_channels - weight.shape[1]))
    return rearrange(padded, "d c p q -> d (p q c)")


def _open_tensors(path: Path) -> dict[str, Any]:
    """Every tensor's name -> the open, memory-mapped file that holds it."""
    if path.is_dir():
        found = [*sorted(path.glob("*.safetensors.index.json")), *sorted(path.glob("*.safetensors"))]
        if not found:
            raise ValueError(f"{path}: no .safetensors file in this folder")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not path.name.endswith(".index.json"):
        file = safe_open(path, framework="pt")
        return dict.fromkeys(file.keys(), file)
    shards = json.loads(path.read_text())["weight_map"]
    files = {shard: safe_open(path.parent / shard, framework="pt") for shard in set(shards.values())}
    return {name: files[shard] for name, shard in shards.items()}
