"""Cases of the quality models: from pixels to scores, with the features on the way."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from model.checkpoints.files import build_network, load_strict
from model.checkpoints.parity.comparison import Case, Comparison, compare, exact, relative
from model.checkpoints.scorers import load_aesthetic_head
from model.quality import aesthetic, clip_iqa, dover, fast_vqa, fragments
from model.quality.video_swin import SwinLayer, VideoSwin, VideoSwinConfig, fragment_gate, shift_mask


def _swin_config(recorded: Mapping[str, Any], base_size: tuple[int, int, int] | None) -> VideoSwinConfig:
    return VideoSwinConfig(
        embed_dim=recorded["embed_dim"],
        depths=tuple(recorded["depths"]),
        num_heads=tuple(recorded["num_heads"]),
        window_size=tuple(recorded["window_size"]),
        fragment_bias=tuple(recorded.get("frag_biases", fast_vqa.SWIN_TINY.fragment_bias)),
        base_size=base_size,
    )


def _fragment_size(recorded: Mapping[str, Any]) -> fragments.FragmentSize:
    return fragments.FragmentSize(
        grid=(recorded["fragments_h"], recorded["fragments_w"]),
        patch=(recorded["fsize_h"], recorded["fsize_w"]),
        aligned=recorded["aligned"],
    )


def _from_pixels(sampling: Mapping[str, Any], case: Case) -> Tensor:
    """The network's input from the recorded bytes and offsets."""
    offsets = case.tensors["raw.offset_h"], case.tensors["raw.offset_w"]
    mosaic = fragments.spatial_fragments(case.tensors["raw.video_u8"], _fragment_size(sampling), offsets)
    return fragments.normalise(mosaic, sampling["num_clips"])


def _inner(
    network: nn.Module, pixels: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's outputs for the pixels, and those of the named modules within it."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: seen.update({name: output})

    hooks = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    result = network(pixels)
    for hook in hooks:
        hook.remove()
    return result, seen


def _swin_parts(swin: VideoSwin) -> dict[str, nn.Module]:
    """By the names of the recorded features."""
    named: dict[str, nn.Module] = {"patch_embed": swin.patch_embed}
    for i, layer in enumerate(swin.layers):
        assert isinstance(layer, SwinLayer)
        named |= {f"layer{i}": layer, **{f"layer{i}_block{j}": block for j, block in enumerate(layer.blocks)}}
    return named


def _convnext_parts(convnext: dover.ConvNeXt3d) -> dict[str, nn.Module]:
    stages = {f"stage{i}": stage for i, stage in enumerate(convnext.stages)}
    return {"stem": convnext.downsample_layers[0], **stages}


def _check_inner(seen: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """Inner features; ours are channels last, most of the recorded ones are channels first."""
    for name, tensor in recorded.items():
        ours = seen[name]
        yield compare(name, ours if ours.shape == tensor.shape else ours.movedim(-1, 1), tensor)


def _check_masks(swin: VideoSwin, pixels: Tensor, first: Tensor, case: Case) -> Iterator[Comparison]:
    """Gate and shift mask of the first layer; first: its input (B, D, H, W, C)."""
    tokens, configured, wanted = first.shape[1:4], swin.config.window_size, swin.window_for(pixels.shape[2:])
    axes = [
        (min(n, w), n + -n % min(n, w), full // 2 if n > w else 0)
        for n, full, w in zip(tokens, configured, wanted, strict=True)
    ]
    window, grid, half = ((x, y, z) for x, y, z in zip(*axes, strict=True))
    for name, shift in (("noshift", (0, 0, 0)), ("shift", half)):
        if (recorded := case.tensors.get(f"aux.gate_layer0_{name}")) is not None:
            yield compare(f"gate, {name}", fragment_gate(grid, window, shift), recorded)
    if (recorded := case.tensors.get("aux.attn_mask_layer0_shift")) is not None:
        yield compare("shift mask", shift_mask(grid, window, half), recorded)


@torch.no_grad()
def check_fast_vqa(case: Case) -> Iterator[Comparison]:
    """From pixels to the rescaled scores; every input that the case has."""
    base = case.header["backbone"].get("base_x_size", fast_vqa.SWIN_TINY.base_size)
    config = dataclasses.replace(
        fast_vqa.PUBLISHED,
        backbone=_swin_config(case.header["backbone"], tuple(base)),
        head_hidden=case.header["vqa_head"]["hidden_channels"],
    )
    network = build_network(lambda: fast_vqa.FastVQA(config), case.part("state"), case.source)
    if "raw.video_u8" in case.tensors:
        yield compare(
            "input.fragments", _from_pixels(case.header["sampling"], case), case.tensors["input.fragments"]
        )
    swin = network.fragments_backbone
    for name, pixels in case.part("input").items():
        prefix = "out" if name == "fragments" else f"out.{name}"
        feature, seen = _inner(swin, pixels, _swin_parts(swin))
        if name == "fragments":
            yield from _check_inner(seen, case.part("mid"))
            yield from _check_masks(swin, pixels, seen["patch_embed"], case)
        scores = network.vqa_head(feature)
        yield compare(f"{prefix}.feature", feature, case.tensors[f"{prefix}.feature"])
        yield compare(f"{prefix}.score_map", scores, case.tensors[f"{prefix}.score_map"])
        result = case.header["results"]["main" if name == "fragments" else name]
        yield relative(f"{prefix}.score", scores.mean(), result["score"])
        published = {"FAST-VQA": fast_vqa.PUBLISHED, "FasterVQA": fast_vqa.PUBLISHED_FASTER}
        for model, of in {**published, "FAST-VQA-M": fast_vqa.PUBLISHED_M}.items():
            scaled = fast_vqa.rescale(scores.mean().item(), of)
            yield relative(f"{prefix}: as {model}", scaled, result["sigmoid_rescaled"][model])


@torch.no_grad()
def check_dover(case: Case) -> Iterator[Comparison]:
    """Both branches from pixels to the fused scores; every further input of the technical one."""
    branch = case.header["aesthetic_backbone"]
    config = dataclasses.replace(
        dover.PUBLISHED,
        technical=_swin_config(case.header["technical_backbone"], None),
        aesthetic=dover.ConvNeXtConfig(tuple(branch["dims"]), tuple(branch["depths"]), version=1, classes=0),
        head_hidden=case.header["vqa_head"]["hidden_channels"],
    )
    network = build_network(lambda: dover.Dover(config), case.part("state"), case.source)
    swin, convnext = network.technical_backbone, network.aesthetic_backbone
    assert isinstance(swin, VideoSwin) and isinstance(convnext, dover.ConvNeXt3d)
    if "raw.video_u8" in case.tensors:
        technical = _from_pixels(case.header["technical_sampling"], case)
        yield compare("input.technical", technical, case.tensors["input.technical"])
        whole = fragments.normalise(case.tensors["raw.aesthetic_resized_u8"], 1)
        yield compare("input.aesthetic", whole, case.tensors["input.aesthetic"])
    raw: dict[str, float] = {}
    for name, pixels in case.part("input").items():
        if name == "aesthetic":
            feature, seen = _inner(convnext, pixels, _convnext_parts(convnext))
            scores = network.aesthetic_head(feature)
            yield from _check_inner(seen, case.part("mid.aesthetic"))
        else:
            feature, seen = _inner(swin, pixels, _swin_parts(swin))
            scores = network.technical_head(feature)
        if name == "technical":
            yield from _check_inner(seen, case.part("mid.technical"))
            yield from _check_masks(swin, pixels, seen["patch_embed"], case)
        raw[name] = scores.mean().item()
        yield compare(f"out.{name}_feature", feature, case.tensors[f"out.{name}_feature"])
        yield compare(f"out.{name}_score_map", scores, case.tensors[f"out.{name}_score_map"])
    for name, value in dover.fuse(raw["technical"], raw["aesthetic"]).items():
        yield relative(f"fused {name}", value, case.header["results"]["fused"][name])


@torch.no_grad()
def check_clip_iqa(case: Case) -> Iterator[Comparison]:
    """Features of pictures and prompts, their scaled cosines, the probability of the first prompt."""
    shape = case.header["model"]
    clip = open_clip.CLIP(
        shape["embed_dim"],
        open_clip.CLIPVisionCfg(
            layers=tuple(shape["vision_layers"]),  # type: ignore[arg-type]
            width=shape["vision_width"],
            image_size=shape["image_resolution"],
        ),
        open_clip.CLIPTextCfg(
            context_length=shape["context_length"],
            vocab_size=shape["vocab_size"],
            width=shape["transformer_width"],
            heads=shape["transformer_heads"],
            layers=shape["transformer_layers"],
        ),
        quick_gelu=case.header["quick_gelu"],
    )
    load_strict(clip, case.part("state"), case.source).eval()
    pictures, tokens = case.tensors["input.image01"], case.tensors["input.tokens"]
    logits = clip_iqa.similarities(clip, pictures, tokens)
    features = clip_iqa.picture_features(clip.visual, pictures)
    yield compare("image features", features, case.tensors["out.image_features"])
    yield compare("text features", clip.encode_text(tokens), case.tensors["out.text_features"])
    yield relative("logits", logits, case.tensors["out.logits_per_image"])
    yield compare("CLIP-IQA", logits.softmax(dim=-1)[:, :1], case.tensors["out.clipiqa"])


@torch.no_grad()
def check_aesthetic(case: Case) -> Iterator[Comparison]:
    """The published heads of this package on recorded embeddings."""
    linear, mlp = (
        load_aesthetic_head(aesthetic.WEIGHTS / name) for name in (aesthetic.LINEAR_FILE, aesthetic.MLP_FILE)
    )
    embedding = case.tensors["embedding"]
    for name, head in (("linear_score", linear), ("mlp_score", mlp)):
        yield relative(name, aesthetic.aesthetic_score(head, embedding), case.tensors[name])
    yield relative("mlp_score_without_l2", mlp(embedding), case.tensors["mlp_score_without_l2"])
    drawn = load_strict(nn.Linear(aesthetic.EMBEDDING, 1), case.part("random_linear"), "random_linear")
    yield relative(
        "random_linear_score",
        aesthetic.aesthetic_score(drawn, embedding),
        case.tensors["random_linear_score"],
    )


def check_sampling(case: Case) -> Iterator[Comparison]:
    """Compare fragments and frame numbers, which must be equal, and resized frames, equal to the byte.

    A case that is JSON alone has no pictures.
    """
    for row in case.header["spatial"] if case.tensors else []:
        name, size = row["name"], _fragment_size(row["kwargs"])
        video = case.tensors[f"{name}.video"]
        offsets = case.tensors[f"{name}.offset_h"], case.tensors[f"{name}.offset_w"]
        if f"{name}.upsampled" in case.tensors:
            yield compare(f"{name}.upsampled", fragments.fit(video, size), case.tensors[f"{name}.upsampled"])
        mosaic = fragments.spatial_fragments(video, size, offsets)
        yield compare(name, mosaic, case.tensors[f"{name}.fragments"])
    for row in case.header["temporal"]:
        total = row["total_frames"]
        if "offsets" in row:
            shape = row["fsize_t"], row["fragments_t"], row["frame_interval"]
            ours = [
                frame
                for offsets in row["offsets"]
                for frame in fragments.segment_frames(total, *shape, torch.tensor(offsets))
            ]
            name = f"{shape} of {total} frames"
        else:
            shape = row["clip_len"], row["frame_interval"], row["num_clips"]
            ours, name = fragments.window_frames(total, *shape), f"windows {shape} of {total} frames"
        yield exact(name, ours, row["indices"])
    for row in case.header["resize"] if case.tensors else []:
        name, (height, width) = f"resize_{row['name']}", row["size"]
        for kind, antialias in (("default", True), ("false", False)):
            ours_resized = fragments.resize_frames(case.tensors[f"{name}.video"], height, width, antialias)
            yield Comparison(
                f"{name}, antialias {antialias}",
                compare(name, ours_resized, case.tensors[f"{name}.out_antialias_{kind}"]).error,
                0.0,
            )
