"""Starting Swin-MMDiT from SD3-Medium: its transformer's weights in the diffusers layout.

What has a counterpart is copied (SD3's separate q, k, v become one projection; the patch convolution becomes
a linear layer), the new input channels (LQ latent, mask) start at zero, so that the first outputs are those
of SD3 on the noisy latent. The position table has no counterpart, nor has the last block's query projection
of the text, which SD3 itself never uses.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from model.dit.swin_mmdit import SwinMMDiT

Combine = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class SD3Report:
    """What `copy_sd3_weights` did."""

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


def copy_sd3_weights(
    model: SwinMMDiT, names: Collection[str], read: Callable[[str], Tensor], source: str
) -> SD3Report:
    """Copies the tensors `names` of an SD3 transformer into `model`, in place, one of its tensors at a time.

    read: a tensor by its name; source: where they are from, for messages. ValueError, before anything is
    copied, where names do not fit (SD3.5 and other sizes have more or fewer), and where a shape does not.
    """
    last = model.config.num_layers - 1
    sources = {name: _source(name, model) for name, _ in model.named_parameters()}
    taken = [name for parts, _ in sources.values() for name in parts]
    left = sorted(set(names) - set(taken))
    unused = {"pos_embed.pos_embed", *(f"{_block(last)}.attn.add_q_proj.{kind}" for kind in _KINDS)}
    wrong = sorted(set(taken) - set(names)) or sorted(set(left) - unused)
    if wrong:
        what = "no tensor" if wrong[0] in taken else "has no place for"
        raise ValueError(
            f"{source}: {what} {wrong[0]!r}: not an SD3 transformer of {last + 1} layers as diffusers has it"
        )
    file_channels = read("pos_embed.proj.weight").shape[1]
    for name, parameter in model.named_parameters():
        parts, combine = sources[name]
        value = combine([read(part) for part in parts])
        if value.shape != parameter.shape:
            raise ValueError(
                f"{source}: {parts[0]!r} makes {tuple(value.shape)}, but {name} is {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
    new = (
        f"video_in, input channels {file_channels} to {model.config.in_channels - 1}",
        f"blocks.{last}.text.qkv, query rows",
    )
    return SD3Report(tuple(taken), tuple(left), new)


def _source(name: str, model: SwinMMDiT) -> tuple[list[str], Combine]:
    """SD3 names that make up our parameter `name`, and how they are put together."""
    module, kind = name.rsplit(".", 1)
    if module == "video_in":
        if kind == "bias":
            return ["pos_embed.proj.bias"], _only
        return ["pos_embed.proj.weight"], lambda tensors: _patch_weight(tensors[0], model.config.in_channels)
    if module.startswith("blocks."):
        _, index, stream, part = module.split(".", 3)
        block = _block(int(index))
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


def _block(index: int) -> str:
    return f"transformer_blocks.{index}"


_KINDS = ("weight", "bias")

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
    new_channels = max(0, in_channels - weight.shape[1])
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, new_channels))
    return rearrange(padded, "d c p q -> d (p q c)")
