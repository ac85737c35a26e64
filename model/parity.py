"""Numbers recorded from the released code, run again through ours: one function per kind of case.

A case is a header (`case`, `config`, notes) and tensors: `state.*` weights, `in.*` inputs, `out.*`
outputs. `model.checkpoints` opens the files and prints; here is only what to run and what to compare.
To add a kind: write its function, and let `check` tell it by what the case holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import flow, preprocess
from model.checkpoints import (
    build_autoencoder,
    build_backbone,
    released_autoencoder_config,
    released_backbone_config,
)
from model.windows import Grid, released_windows

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
    raise ValueError(f"{source}: not a parity case of a known kind")


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


@torch.no_grad()
def check_autoencoder(
    case: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> Iterator[Comparison]:
    """Moments of each clip and its decoded mean, in one pass and streamed in slices of 4 and 8 frames.

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
        for slice_frames in (4, 8):
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
        start = torch.linspace(-2, 2, 24).reshape(6, 4)
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
    time = torch.tensor(schedule["t"])[:, None]
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
