"""Numbers recorded from the released code, run again through ours: one function per kind of case.

A case is a header (`case`, `config`, notes) and tensors: `state.*` weights, `in.*` inputs, `out.*`
outputs. `model.checkpoints` opens the files and prints; here is only what to run and what to compare.
To add a kind: write its function, and let `check` tell it by what the case holds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from model import flow, preprocess
from model.checkpoints import (
    build_autoencoder,
    build_backbone,
    load_aesthetic_head,
    load_strict,
    released_autoencoder_config,
    released_backbone_config,
)
from model.dit.windows import Grid, released_windows
from model.quality import aesthetic, clip_iqa, dover, fast_vqa, fragments
from model.quality.video_swin import SwinLayer, VideoSwin, VideoSwinConfig, fragment_gate, shift_mask

PASS_LINE = 2e-5
"""Largest absolute error allowed for the networks; the reference's own fp32 noise is 7e-6."""
FLOW_PASS_LINE = 1e-5
"""Allowed for the sampler's numbers, relative to max(1, |recorded|)."""


@dataclass(frozen=True)
class Comparison:
    """One output against its record."""

    output: str
    error: float
    """Largest absolute difference; NaN never passes."""
    pass_line: float

    @property
    def passed(self) -> bool:
        """Whether the error is on or below the line."""
        return self.error <= self.pass_line

    def __str__(self) -> str:
        return f"{self.output:40s} {self.error:.2e}  {'ok' if self.passed else f'ABOVE {self.pass_line:.0e}'}"


def compare(output: str, ours: Tensor, recorded: Tensor, pass_line: float = PASS_LINE) -> Comparison:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != recorded.shape:
        shapes = f"{tuple(ours.shape)} for {tuple(recorded.shape)}"
        return Comparison(f"{output} {shapes}", float("inf"), pass_line)
    return Comparison(output, (ours.double() - recorded.double()).abs().max().item(), pass_line)


def check(case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Iterator[Comparison]:
    """Run the case whatever its kind; ValueError if it is none that we know."""
    config = case.get("config", {})
    if "latent_channels" in config and "block_out_channels" in config:
        return check_autoencoder(case, tensors, source)
    if "vid_dim" in config:
        return check_backbone(case, tensors, source)
    if "runs" in case and "timestep_transform" in case:
        return check_flow(case)
    if "window" in case and "cases" in case:
        return check_windows(case)
    if "resize_cases" in case:
        return check_preprocess(case, tensors)
    if "backbone" in case and "vqa_head" in case:
        return check_fast_vqa(case, tensors, source)
    if "technical_backbone" in case:
        return check_dover(case, tensors, source)
    if "vision_layers" in case.get("model", {}):
        return check_clip_iqa(case, tensors, source)
    if "heads" in case and "embedding" in tensors:
        return check_aesthetic(tensors)
    if "spatial" in case and "temporal" in case:
        return check_sampling(case, tensors)
    raise ValueError(f"{source}: not a parity case of a known kind")


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


@torch.no_grad()
def check_autoencoder(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """Moments of each clip and its decoded mean, in one pass and streamed in slices of one latent frame and
    of two (4 and 8 frames at full size).

    The decoder gets the recorded mean, so that its error is its own and not the encoder's made larger.
    """
    config = released_autoencoder_config(case["config"])
    autoencoder = build_autoencoder(config, part(tensors, "state"), source)
    inputs, recorded = part(tensors, "in"), part(tensors, "out")
    for clip in sorted({name.split(".")[0] for name in inputs}):
        video = inputs[f"{clip}.x"]
        recorded_mean = recorded[f"{clip}.mean"]
        mean, log_variance = autoencoder.encode(video)
        yield compare(f"{clip}.mean", mean, recorded_mean)
        yield compare(f"{clip}.logvar", log_variance, recorded[f"{clip}.logvar"])
        yield compare(f"{clip}.dec", autoencoder.decode_unscaled(recorded_mean), recorded[f"{clip}.dec"])
        for slice_frames in (config.time_factor, 2 * config.time_factor):
            moments = list(autoencoder.encode_stream([video], slice_frames))
            means = torch.cat([m for m, _ in moments], dim=2)
            log_variances = torch.cat([v for _, v in moments], dim=2)
            latent = autoencoder.to_latent(recorded_mean, log_variances, noise=None)
            frames, height, width = video.shape[2:]
            decoded = autoencoder.decode_stream([latent], frames, height, width, slice_frames)
            streamed = f"slices of {slice_frames}: {clip}"
            yield compare(f"{streamed}.mean", means, recorded_mean)
            yield compare(f"{streamed}.logvar", log_variances, recorded[f"{clip}.logvar"])
            yield compare(f"{streamed}.dec", torch.cat(list(decoded), dim=2), recorded[f"{clip}.dec"])


@torch.no_grad()
def check_backbone(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """Velocities of all videos, one call each and then packed into one call."""
    backbone = build_backbone(released_backbone_config(case["config"]), part(tensors, "state"), source)
    inputs, recorded = part(tensors, "in"), part(tensors, "out")["vid"]
    grids: list[Grid] = [(t, h, w) for t, h, w in inputs["vid_shape"].tolist()]
    text_lengths: list[int] = inputs["txt_shape"].flatten().tolist()
    rows = [t * h * w for t, h, w in grids]
    packed = backbone(inputs["vid"], inputs["txt"], grids, text_lengths, inputs["timestep"])
    videos, texts = inputs["vid"].split(rows), inputs["txt"].split(text_lengths)
    for i, (grid, length) in enumerate(zip(grids, text_lengths, strict=True)):
        alone = backbone(videos[i], texts[i], [grid], [length], inputs["timestep"][i : i + 1])
        yield compare(f"video {i} alone", alone, recorded.split(rows)[i])
        yield compare(f"video {i} packed", packed.split(rows)[i], recorded.split(rows)[i])


def relative(output: str, ours: Any, recorded: Any) -> Comparison:
    """For numbers of any size: the largest |a - b| / max(1, |b|), to pass at 1e-5."""
    ours, recorded = (torch.as_tensor(x).double().flatten() for x in (ours, recorded))
    if ours.shape != recorded.shape:
        return Comparison(f"{output} {len(ours)} for {len(recorded)}", float("inf"), FLOW_PASS_LINE)
    error = ((ours - recorded).abs() / recorded.abs().clamp(min=1)).max().item()
    return Comparison(output, error, FLOW_PASS_LINE)


def check_flow(case: Mapping[str, Any]) -> Iterator[Comparison]:
    """Sampler, guidance, path, time shift and condition noise.

    The sampler's velocity is the case's own: 0.5 sin(2x) + 0.3 cos(3t/1000) - 0.1x.
    """
    for run in case["runs"]:
        times = flow.sampling_times(run["steps"], run["shift"])
        start = torch.linspace(-2, 2, len(run["out"]))
        out = flow.sample(
            lambda x, t: 0.5 * torch.sin(2 * x) + 0.3 * torch.cos(3 * t / 1000) - 0.1 * x, start, times
        )
        name = f"{run['steps']} steps, shift {run['shift']}"
        yield relative(f"times of {name}", times, run["timesteps"])
        yield relative(f"result of {name}", out, run["out"])
    for steps in map(int, case["steps_whose_schedule_has_not_N_entries"]):
        yield relative(f"number of times of {steps} steps", len(flow.sampling_times(steps)), steps)
    cfg, schedule = case["cfg"], case["schedule"]
    positive, negative = (torch.tensor(cfg[name]).reshape(cfg["shape"]) for name in ("pos", "neg"))
    for row in cfg["cases"]:
        guided = flow.guide(positive, negative, row["scale"], row["rescale"])
        yield relative(f"guidance {row['scale']}, rescale {row['rescale']}", guided, row["out"])
    data, noise = (torch.tensor(schedule[name]).reshape(schedule["shape"]) for name in ("x_0", "x_T"))
    time = torch.tensor(schedule["t"]).reshape(-1, *[1] * (data.ndim - 1))
    x, v = flow.interpolate(data, noise, time), flow.velocity(data, noise)
    yield relative("noisy sample", x, schedule["x_t"])
    yield relative("velocity", v, schedule["v_lerp_target"])
    yield relative("data from velocity", flow.data_from_velocity(x, v, time), schedule["back_x_0"])
    yield relative("noise from velocity", flow.noise_from_velocity(x, v, time), schedule["back_x_T"])
    for shape, given, shifted in case["timestep_transform"]["rows"]:
        ours = flow.shift_time(torch.tensor(given), flow.time_shift_factor(shape))
        yield relative(f"shift of {given} at {shape}", ours, shifted)
    yield from _check_condition_noise(case["condition_noise"])


def _check_condition_noise(case: Mapping[str, Any]) -> Iterator[Comparison]:
    shape = case["latent_shape_T_H_W_C"]
    latent, noise = (torch.tensor(case[name]).reshape(-1, shape[3]) for name in ("latent", "aug_noise"))
    for row in case["rows"]:
        level = row["cond_noise_scale"]
        time = flow.condition_time(flow.MAX_TIME * level, tuple(shape[:3]), released_quirk=True)
        condition = flow.interpolate(latent, noise, torch.tensor(time))
        yield relative(f"condition time of {level}", time, row["t_after_transform"])
        channels = flow.network_input(latent, condition)[:, shape[3] :]
        yield relative(f"condition of {level}", channels, row["cond"])
    for latent_shape, quirk, intended in case["quirk_table"]["rows"]:
        for released_quirk, recorded in ((True, quirk), (False, intended)):
            time = flow.condition_time(100.0, tuple(latent_shape[:3]), released_quirk)
            yield relative(f"condition time at {latent_shape}, quirk {released_quirk}", time, recorded)


def check_windows(case: Mapping[str, Any]) -> Iterator[Comparison]:
    """The released rule's windows, in order: equal or not."""
    for row in case["cases"]:
        for kind in ("regular", "shifted"):
            windows = released_windows(tuple(row["size"]), tuple(case["window"]), kind == "shifted")
            equal = [[[s.start, s.stop] for s in window] for window in windows] == row[kind]
            yield Comparison(f"{kind} windows of {row['size']}", 0.0 if equal else float("inf"), 0.0)


def check_preprocess(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """Resize, crop and normalise; sizes; frame padding; wavelet colour fix."""
    for row in case["resize_cases"]:
        name = f"pre{row['i']}"
        ours = preprocess.official_preprocess(tensors[f"{name}.in"], row["res_h"], row["res_w"])
        yield compare(name, ours, tensors[f"{name}.out"])
    for size, target, resized, cropped in case["size_table"]:
        ours_resized = preprocess.resized_size(*size, *target)
        ours_cropped = preprocess.crop_to_multiple(torch.empty(1, 1, *ours_resized, device="meta")).shape[-2:]
        equal = [list(ours_resized), list(ours_cropped)] == [resized, cropped]
        yield Comparison(f"sizes of {size} for {target}", 0.0 if equal else float("inf"), 0.0)
    for split, frames, padded in case["frame_pad"]:
        ours_count = preprocess.padded_frame_count(frames, preprocess.FRAME_MULTIPLE * split)
        yield Comparison(f"{frames} frames over {split}", abs(ours_count - padded), 0.0)
    fixed = preprocess.wavelet_colour_fix(tensors["wavelet.content"], tensors["wavelet.style"])
    yield compare("wavelet colour fix", fixed, tensors["wavelet.out"])


# -- quality models -------------------------------------------------------------------------------------


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


def _from_pixels(sampling: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The network's input from the recorded bytes and offsets."""
    offsets = tensors["raw.offset_h"], tensors["raw.offset_w"]
    mosaic = fragments.spatial_fragments(tensors["raw.video_u8"], _fragment_size(sampling), offsets)
    return fragments.normalise(mosaic, sampling["num_clips"])


def _inner(
    network: nn.Module, pixels: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the network makes of the pixels, and what the named modules within it gave meanwhile."""
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


def _check_masks(
    swin: VideoSwin, pixels: Tensor, first: Tensor, tensors: Mapping[str, Tensor]
) -> Iterator[Comparison]:
    """Gate and shift mask of the first layer; first: its input (B, D, H, W, C)."""
    tokens, configured, wanted = first.shape[1:4], swin.config.window_size, swin.window_for(pixels.shape[2:])
    axes = [
        (min(n, w), n + -n % min(n, w), full // 2 if n > w else 0)
        for n, full, w in zip(tokens, configured, wanted, strict=True)
    ]
    window, grid, half = ((x, y, z) for x, y, z in zip(*axes, strict=True))
    for name, shift in (("noshift", (0, 0, 0)), ("shift", half)):
        if (recorded := tensors.get(f"aux.gate_layer0_{name}")) is not None:
            yield compare(f"gate, {name}", fragment_gate(grid, window, shift), recorded)
    if (recorded := tensors.get("aux.attn_mask_layer0_shift")) is not None:
        yield compare("shift mask", shift_mask(grid, window, half), recorded)


@torch.no_grad()
def check_fast_vqa(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """From pixels to the rescaled scores; every input that the case has."""
    base = case["backbone"].get("base_x_size", fast_vqa.SWIN_TINY.base_size)
    config = dataclasses.replace(
        fast_vqa.PUBLISHED,
        backbone=_swin_config(case["backbone"], tuple(base)),
        head_hidden=case["vqa_head"]["hidden_channels"],
    )
    with torch.device("meta"):
        network = fast_vqa.FastVQA(config)
    load_strict(network, part(tensors, "state"), source).eval()
    if "raw.video_u8" in tensors:
        yield compare("input.fragments", _from_pixels(case["sampling"], tensors), tensors["input.fragments"])
    swin = network.fragments_backbone
    for name, pixels in part(tensors, "input").items():
        prefix = "out" if name == "fragments" else f"out.{name}"
        feature, seen = _inner(swin, pixels, _swin_parts(swin))
        if name == "fragments":
            yield from _check_inner(seen, part(tensors, "mid"))
            yield from _check_masks(swin, pixels, seen["patch_embed"], tensors)
        scores = network.vqa_head(feature)
        yield compare(f"{prefix}.feature", feature, tensors[f"{prefix}.feature"])
        yield compare(f"{prefix}.score_map", scores, tensors[f"{prefix}.score_map"])
        result = case["results"]["main" if name == "fragments" else name]
        yield relative(f"{prefix}.score", scores.mean(), result["score"])
        published = {"FAST-VQA": fast_vqa.PUBLISHED, "FasterVQA": fast_vqa.PUBLISHED_FASTER}
        for model, of in {**published, "FAST-VQA-M": fast_vqa.PUBLISHED_M}.items():
            scaled = fast_vqa.rescale(scores.mean().item(), of)
            yield relative(f"{prefix}: as {model}", scaled, result["sigmoid_rescaled"][model])


@torch.no_grad()
def check_dover(case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Iterator[Comparison]:
    """Both branches from pixels to the fused scores; every further input of the technical one."""
    branch = case["aesthetic_backbone"]
    config = dataclasses.replace(
        dover.PUBLISHED,
        technical=_swin_config(case["technical_backbone"], None),
        aesthetic=dover.ConvNeXtConfig(tuple(branch["dims"]), tuple(branch["depths"]), version=1, classes=0),
        head_hidden=case["vqa_head"]["hidden_channels"],
    )
    with torch.device("meta"):
        network = dover.Dover(config)
    load_strict(network, part(tensors, "state"), source).eval()
    swin, convnext = network.technical_backbone, network.aesthetic_backbone
    assert isinstance(swin, VideoSwin) and isinstance(convnext, dover.ConvNeXt3d)
    if "raw.video_u8" in tensors:
        technical = _from_pixels(case["technical_sampling"], tensors)
        yield compare("input.technical", technical, tensors["input.technical"])
        whole = fragments.normalise(tensors["raw.aesthetic_resized_u8"], 1)
        yield compare("input.aesthetic", whole, tensors["input.aesthetic"])
    raw: dict[str, float] = {}
    for name, pixels in part(tensors, "input").items():
        if name == "aesthetic":
            feature, seen = _inner(convnext, pixels, _convnext_parts(convnext))
            scores = network.aesthetic_head(feature)
            yield from _check_inner(seen, part(tensors, "mid.aesthetic"))
        else:
            feature, seen = _inner(swin, pixels, _swin_parts(swin))
            scores = network.technical_head(feature)
        if name == "technical":
            yield from _check_inner(seen, part(tensors, "mid.technical"))
            yield from _check_masks(swin, pixels, seen["patch_embed"], tensors)
        raw[name] = scores.mean().item()
        yield compare(f"out.{name}_feature", feature, tensors[f"out.{name}_feature"])
        yield compare(f"out.{name}_score_map", scores, tensors[f"out.{name}_score_map"])
    for name, value in dover.fuse(raw["technical"], raw["aesthetic"]).items():
        yield relative(f"fused {name}", value, case["results"]["fused"][name])


@torch.no_grad()
def check_clip_iqa(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """Features of pictures and prompts, their scaled cosines, the probability of the first prompt."""
    shape = case["model"]
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
        quick_gelu=case["quick_gelu"],
    )
    load_strict(clip, part(tensors, "state"), source).eval()
    pictures, tokens = tensors["input.image01"], tensors["input.tokens"]
    logits = clip_iqa.similarities(clip, pictures, tokens)
    features = clip_iqa.picture_features(clip.visual, pictures)
    yield compare("image features", features, tensors["out.image_features"])
    yield compare("text features", clip.encode_text(tokens), tensors["out.text_features"])
    yield relative("logits", logits, tensors["out.logits_per_image"])
    yield compare("CLIP-IQA", logits.softmax(dim=-1)[:, :1], tensors["out.clipiqa"])


@torch.no_grad()
def check_aesthetic(tensors: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """The published heads of this package on recorded embeddings."""
    linear, mlp = (
        load_aesthetic_head(aesthetic.WEIGHTS / name) for name in (aesthetic.LINEAR_FILE, aesthetic.MLP_FILE)
    )
    embedding = tensors["embedding"]
    for name, head in (("linear_score", linear), ("mlp_score", mlp)):
        yield relative(name, aesthetic.aesthetic_score(head, embedding), tensors[name])
    yield relative("mlp_score_without_l2", mlp(embedding), tensors["mlp_score_without_l2"])
    drawn = load_strict(nn.Linear(aesthetic.EMBEDDING, 1), part(tensors, "random_linear"), "random_linear")
    yield relative(
        "random_linear_score", aesthetic.aesthetic_score(drawn, embedding), tensors["random_linear_score"]
    )


def check_sampling(case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """Fragments and frame numbers, equal or not; resized frames, equal to the byte. A case in JSON alone has
    no pictures."""
    for row in case["spatial"] if tensors else []:
        name, size = row["name"], _fragment_size(row["kwargs"])
        video = tensors[f"{name}.video"]
        offsets = tensors[f"{name}.offset_h"], tensors[f"{name}.offset_w"]
        if f"{name}.upsampled" in tensors:
            yield compare(f"{name}.upsampled", fragments.fit(video, size), tensors[f"{name}.upsampled"])
        mosaic = fragments.spatial_fragments(video, size, offsets)
        yield compare(name, mosaic, tensors[f"{name}.fragments"])
    for row in case["temporal"]:
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
        yield Comparison(name, 0.0 if ours == row["indices"] else float("inf"), 0.0)
    for row in case["resize"] if tensors else []:
        name, (height, width) = f"resize_{row['name']}", row["size"]
        for kind, antialias in (("default", True), ("false", False)):
            ours_resized = fragments.resize_frames(tensors[f"{name}.video"], height, width, antialias)
            yield Comparison(
                f"{name}, antialias {antialias}",
                compare(name, ours_resized, tensors[f"{name}.out_antialias_{kind}"]).error,
                0.0,
            )
