"""The autoencoder on this machine: speed, its convolutions' share of matrix products' speed, memory.

    python -m benchmarks.vae                        (about 15 minutes on 2 cores; nothing else should run)
    python -m benchmarks.vae --only speed           (or layers, memory, cogvideox)

fp32 on the CPU, random weights. Prints tables and writes out/bench/vae.json:

speed      frames per second of encode and decode at two widths; `encode_peak_share`, `decode_peak_share`: the
           FLOPs of the full-size model's convolutions per second of the whole pass, over those of
           matrix products timed just before and after it; and where the time goes, by a profile
layers     the same share for each convolution by itself, against a product of its channels and taps beside it
memory     peak above the loaded, warmed-up model, of one pass and of streams by length, frames going in and
           out one by one; `memory_growth_33_to_257` is the larger of encode's and decode's
cogvideox  against diffusers' AutoencoderKLCogVideoX at its published size on the same clip.
           `vs_cogvideox_encode`, `_decode`: FLOP/s of ours over theirs (above 1: ours wastes
           less); `..._absolute`: their seconds over ours; `..._per_parameter`: that, with the seconds of
           each divided by its number of parameters
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import reset_peak, status_bytes
from model.vae import FULL_CONFIG, AutoencoderConfig, CausalVideoAutoencoder
from model.vae.causal_conv import CausalConv3d

OUT = Path("out/bench/vae.json")
NARROW_CONFIG = AutoencoderConfig(
    widths=(32, 64, 128, 128),
    latent_channels=16,
    norm_groups=32,
    encoder_layers=2,
    decoder_layers=3,
    time_halvings=2,
    latent_scale=0.9152,
    latent_shift=0.0,
)
"""A quarter of the full widths."""
FRAMES = 17
"""The paper's training clips have as many."""
SIZES = {"full": (FULL_CONFIG, 96), "narrow": (NARROW_CONFIG, 192)}
"""Configuration and side of the square frames in pixels."""
COGVIDEOX_FRAMES = 9
PRODUCT_ROWS = 4096
"""Of the products beside single convolutions: enough for their full speed."""
MEMORY_CONFIG = dataclasses.replace(NARROW_CONFIG, widths=(16, 32, 64, 64), norm_groups=16)
"""So narrow that 257 frames pass in a minute; what is compared does not depend on it."""
MEMORY_SIDE, MEMORY_SLICE = 160, 4
LENGTHS = (33, 129, 257)
KINDS = {
    "convolutions": ("convolution",),
    "norms": ("norm",),
    "SiLU": ("silu",),
    "copies": ("cat", "copy", "clone", "contiguous", "pad", "fill"),
    "attention": ("attention", "linear", "addmm"),
}
"""Which of the profiler's operators belong together, by parts of their names."""


def random_autoencoder(config: AutoencoderConfig) -> CausalVideoAutoencoder:
    torch.manual_seed(0)
    return CausalVideoAutoencoder(config).eval()


def random_video(frames: int, side: int) -> Tensor:
    """(1, 3, frames, side, side) in [-1, 1]."""
    return torch.rand(1, 3, frames, side, side) * 2 - 1


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def product_rate() -> float:
    """FLOP/s of large fp32 matrix products, now (under a second)."""
    a, b = torch.randn(2048, 4096), torch.randn(4096, 4096)
    F.linear(a, b)
    return 2 * 2048 * 4096**2 / min(seconds_of(lambda: F.linear(a, b)) for _ in range(3))


def flops_of(network: nn.Module, call: Callable[[], Any]) -> float:
    """Multiplications and additions of the convolutions and linear layers that a call runs."""
    counted = [0.0]

    def count(layer: nn.Module, _: Any, result: Tensor) -> None:
        weight = layer.get_parameter("weight")
        counted[0] += 2 * result.numel() * weight[0].numel()

    layers = (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear))
    hooks = [layer.register_forward_hook(count) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()
    return counted[0]


def compare_with_products(call: Callable[[], Any], counted: float, repeats: int) -> tuple[float, float]:
    """Best seconds, and the median share of the product rate.

    The speed of a shared machine changes by the minute, so each run is compared with the products timed just
    before and just after it.
    """
    before, shares, times = product_rate(), [], []
    for _ in range(repeats):
        times.append(seconds_of(call))
        after = product_rate()
        shares.append(counted / times[-1] / ((before + after) / 2))
        before = after
    return min(times), statistics.median(shares)


# --- speed ---


def time_by_kind(call: Callable[[], Any]) -> dict[str, float]:
    """Shares of the time of one call, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in events:
        kind = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "other")
        shares[kind] += event.self_cpu_time_total / total
    return shares


def speed() -> dict[str, Any]:
    """Frames per second and the share of the product rate, at both widths."""
    result: dict[str, Any] = {"speed": {}}
    for name, (config, side) in SIZES.items():
        vae, video = random_autoencoder(config), random_video(FRAMES, side)
        mean = vae.encode(video)[0]
        row: dict[str, Any] = {"widths": config.widths, "frames": FRAMES, "side": side}
        passes: dict[str, Callable[[], Any]] = {
            "encode": lambda vae=vae, video=video: vae.encode(video),  # type: ignore[misc]
            "decode": lambda vae=vae, mean=mean: vae.decode_unscaled(mean),  # type: ignore[misc]
        }
        for direction, call in passes.items():
            counted = flops_of(vae, call)
            seconds, share = compare_with_products(call, counted, 3)
            row[direction] = {
                "frames_per_second": FRAMES / seconds,
                "tflop": counted / 1e12,
                "peak_share": share,
                "time": time_by_kind(call),
            }
            print(f"{name} {direction}: {rounded(row[direction])}", flush=True)
        result["speed"][name] = row
    full = result["speed"]["full"]
    return result | {f"{d}_peak_share": full[d]["peak_share"] for d in ("encode", "decode")}


# --- layers ---


def layers() -> dict[str, Any]:
    """Each kind of convolution of the full-size model beside a matrix product of its size."""
    config, side = SIZES["full"]
    vae, video = random_autoencoder(config), random_video(FRAMES, side)
    shapes: dict[tuple[Any, ...], tuple[CausalConv3d, Tensor, int]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(layer, CausalConv3d)
        key = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, tuple(inputs[0].shape))
        _, _, count = shapes.get(key, (layer, inputs[0], 0))
        shapes[key] = (layer, inputs[0].clone(), count + 1)

    hooks = [m.register_forward_hook(note) for m in vae.modules() if isinstance(m, CausalConv3d)]
    vae.decode_unscaled(vae.encode(video)[0])
    for hook in hooks:
        hook.remove()
    rows = []
    for layer, x, count in shapes.values():
        counted = flops_of(layer, lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
        inner = layer.weight[0].numel()
        a, b = torch.randn(PRODUCT_ROWS, inner), torch.randn(layer.out_channels, inner)
        product = 2 * PRODUCT_ROWS * inner * layer.out_channels
        pairs = [(seconds_of(lambda: layer(x)), seconds_of(lambda: F.linear(a, b))) for _ in range(5)]  # noqa: B023
        rates = [(counted / conv, product / linear) for conv, linear in pairs]
        rows.append(
            {
                "layer": f"{layer.in_channels}->{layer.out_channels} {'x'.join(map(str, layer.kernel_size))}",
                "input": list(x.shape[2:]),
                "count": count,
                "gflop": counted / 1e9,
                "giga_per_second": max(rate for rate, _ in rates) / 1e9,
                "share_of_product": statistics.median(rate / peak for rate, peak in rates),
            }
        )
        print(f"layer {rounded(rows[-1])}", flush=True)
    return {"layers": rows}


# --- memory ---


def measure_rise(direction: str, frames: int, streamed: bool) -> float:
    """Peak MiB over the loaded, warmed-up model, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.vae",
        "--measure",
        direction,
        str(frames),
        str(int(streamed)),
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.split()[-1])


def run_in_this_process(direction: str, frames: int, streamed: bool) -> None:
    """What `measure_rise` starts: prints the rise in MiB."""
    vae = random_autoencoder(MEMORY_CONFIG)
    vae.decode_unscaled(vae.encode(random_video(5, 32))[0])
    before = reset_peak()
    if not streamed:
        latents = MEMORY_CONFIG.latent_shape(frames, MEMORY_SIDE, MEMORY_SIDE)
        if direction == "encode":
            vae.encode(random_video(frames, MEMORY_SIDE))
        else:
            vae.decode_unscaled(torch.randn(1, MEMORY_CONFIG.latent_channels, *latents))
    elif direction == "encode":
        pieces = (random_video(1, MEMORY_SIDE) for _ in range(frames))
        for _ in vae.encode_stream(pieces, MEMORY_SLICE):
            pass
    else:
        for _ in vae.decode_stream(random_latents(frames), frames, MEMORY_SIDE, MEMORY_SIDE, MEMORY_SLICE):
            pass
    print((status_bytes("VmHWM") - before) / 2**20)


def random_latents(frames: int) -> Iterator[Tensor]:
    """Latent frames of a video, one by one."""
    count, height, width = MEMORY_CONFIG.latent_shape(frames, MEMORY_SIDE, MEMORY_SIDE)
    for _ in range(count):
        yield torch.randn(1, MEMORY_CONFIG.latent_channels, 1, height, width)


def memory() -> dict[str, Any]:
    """Peak by length, streamed and in one pass, in one table."""
    rows: dict[str, dict[str, float]] = {}
    for direction in ("encode", "decode"):
        for streamed in (True, False):
            name = f"{direction}, {f'slices of {MEMORY_SLICE}' if streamed else 'one pass'}"
            rows[name] = {f"{n} frames": measure_rise(direction, n, streamed) for n in LENGTHS}
            print(f"peak MiB, {name}: {rounded(rows[name])}", flush=True)
    streams = {d: rows[f"{d}, slices of {MEMORY_SLICE}"] for d in ("encode", "decode")}
    growth = max(stream["257 frames"] / stream["33 frames"] for stream in streams.values())
    over = {
        f"{d}, {n} frames": rows[f"{d}, one pass"][f"{n} frames"] / streams[d][f"{n} frames"]
        for d in streams
        for n in LENGTHS
    }
    print(f"257 frames over 33: {growth:.3f}; one pass over a stream: {rounded(over)}")
    return {
        "memory_mib": rows,
        "memory_side": MEMORY_SIDE,
        "memory_widths": MEMORY_CONFIG.widths,
        "memory_growth_33_to_257": growth,
        "memory_one_pass_over_stream": over,
    }


# --- CogVideoX ---


def cogvideox() -> dict[str, Any]:
    """Ours and CogVideoX's autoencoder in turns on one clip."""
    import diffusers

    torch.manual_seed(0)
    levels = len((128, 256, 256, 512))
    theirs = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
    ).eval()
    ours, side = random_autoencoder(FULL_CONFIG), SIZES["full"][1]
    video = random_video(COGVIDEOX_FRAMES, side)
    latent, their_latent = ours.encode(video)[0], theirs.encode(video).latent_dist.mode()
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode": (lambda: ours.encode(video), lambda: theirs.encode(video)),
        "decode": (lambda: ours.decode_unscaled(latent), lambda: theirs.decode(their_latent)),
    }
    parameters = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    result: dict[str, Any] = {
        "cogvideox": {"parameters_m": [p / 1e6 for p in parameters], "frames": COGVIDEOX_FRAMES, "side": side}
    }
    for direction, (our_call, their_call) in calls.items():
        counted = flops_of(ours, our_call), flops_of(theirs, their_call)
        times = [(seconds_of(our_call), seconds_of(their_call)) for _ in range(3)]
        absolute = statistics.median(their / our for our, their in times)
        result[f"vs_cogvideox_{direction}"] = absolute * counted[0] / counted[1]
        result[f"vs_cogvideox_{direction}_absolute"] = absolute
        result[f"vs_cogvideox_{direction}_per_parameter"] = absolute * parameters[0] / parameters[1]
        result["cogvideox"][direction] = {
            "seconds": [min(our for our, _ in times), min(their for _, their in times)],
            "tflop": [count / 1e12 for count in counted],
        }
    print(f"ours, CogVideoX: {result['cogvideox']}")
    print(rounded({key: value for key, value in result.items() if key.startswith("vs_")}))
    return result


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """For printing."""
    return {
        key: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }


def main() -> None:
    parts = {"speed": speed, "layers": layers, "memory": memory, "cogvideox": cogvideox}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=parts, help="one part; the others keep their last recorded numbers")
    parser.add_argument(
        "--measure", nargs=3, metavar=("DIRECTION", "FRAMES", "STREAMED"), help="(used by memory)"
    )
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    if given.measure:
        run_in_this_process(given.measure[0], int(given.measure[1]), given.measure[2] == "1")
        return
    torch.set_num_threads(os.cpu_count() or 1)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, part in parts.items():
        if given.only in (None, name):
            result |= part() | {f"load_before_{name}": os.getloadavg()[0]}
            OUT.parent.mkdir(parents=True, exist_ok=True)
            OUT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
