"""Cases without weights: the diffusion process, the windows, the way from pixels to the autoencoder."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from model import colour_fix, flow, preprocess
from model.checkpoints.parity.comparison import Case, Comparison, compare, exact, relative
from model.dit.windows import released_windows


def check_flow(case: Case) -> Iterator[Comparison]:
    """Sampler, guidance, path, time shift and condition noise.

    The sampler's velocity is the case's own: 0.5 sin(2x) + 0.3 cos(3t/1000) - 0.1x.
    """
    for run in case.header["runs"]:
        times = flow.sampling_times(run["steps"], run["shift"])
        start = torch.linspace(-2, 2, len(run["out"]))
        out = flow.sample(
            lambda x, t: 0.5 * torch.sin(2 * x) + 0.3 * torch.cos(3 * t / 1000) - 0.1 * x, start, times
        )
        name = f"{run['steps']} steps, shift {run['shift']}"
        yield relative(f"times of {name}", times, run["timesteps"])
        yield relative(f"result of {name}", out, run["out"])
    for steps in map(int, case.header["steps_whose_schedule_has_not_N_entries"]):
        yield relative(f"number of times of {steps} steps", len(flow.sampling_times(steps)), steps)
    cfg, schedule = case.header["cfg"], case.header["schedule"]
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
    for shape, given, shifted in case.header["timestep_transform"]["rows"]:
        ours = flow.shift_time(torch.tensor(given), flow.time_shift_factor(shape))
        yield relative(f"shift of {given} at {shape}", ours, shifted)
    yield from _check_condition_noise(case.header["condition_noise"])


def _check_condition_noise(noise_case: Mapping[str, Any]) -> Iterator[Comparison]:
    shape = noise_case["latent_shape_T_H_W_C"]
    latent, noise = (torch.tensor(noise_case[name]).reshape(-1, shape[3]) for name in ("latent", "aug_noise"))
    for row in noise_case["rows"]:
        level = row["cond_noise_scale"]
        time = flow.condition_time(flow.MAX_TIME * level, tuple(shape[:3]), released_quirk=True)
        condition = flow.interpolate(latent, noise, torch.tensor(time))
        yield relative(f"condition time of {level}", time, row["t_after_transform"])
        channels = flow.network_input(latent, condition)[:, shape[3] :]
        yield relative(f"condition of {level}", channels, row["cond"])
    for latent_shape, quirk, intended in noise_case["quirk_table"]["rows"]:
        for released_quirk, recorded in ((True, quirk), (False, intended)):
            time = flow.condition_time(100.0, tuple(latent_shape[:3]), released_quirk)
            yield relative(f"condition time at {latent_shape}, quirk {released_quirk}", time, recorded)


def check_windows(case: Case) -> Iterator[Comparison]:
    """The released rule's windows, in order: equal or not."""
    for row in case.header["cases"]:
        for kind in ("regular", "shifted"):
            windows = released_windows(tuple(row["size"]), tuple(case.header["window"]), kind == "shifted")
            ours = [[[s.start, s.stop] for s in window] for window in windows]
            yield exact(f"{kind} windows of {row['size']}", ours, row[kind])


def check_preprocess(case: Case) -> Iterator[Comparison]:
    """Resize, crop and normalise; sizes; frame padding; wavelet colour fix."""
    for row in case.header["resize_cases"]:
        name = f"pre{row['i']}"
        ours = preprocess.official_preprocess(case.tensors[f"{name}.in"], row["res_h"], row["res_w"])
        yield compare(name, ours, case.tensors[f"{name}.out"])
    for size, target, resized, cropped in case.header["size_table"]:
        ours_resized = preprocess.resized_size(*size, *target)
        ours_cropped = preprocess.crop_to_multiple(torch.empty(1, 1, *ours_resized, device="meta")).shape[-2:]
        ours_sizes = [list(ours_resized), list(ours_cropped)]
        yield exact(f"sizes of {size} for {target}", ours_sizes, [resized, cropped])
    for split, frames, padded in case.header["frame_pad"]:
        ours_count = preprocess.padded_frame_count(frames, preprocess.FRAME_MULTIPLE * split)
        yield exact(f"{frames} frames over {split}", ours_count, padded)
    fixed = colour_fix.wavelet_colour_fix(case.tensors["wavelet.content"], case.tensors["wavelet.style"])
    yield compare("wavelet colour fix", fixed, case.tensors["wavelet.out"])
