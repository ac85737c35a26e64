"""How fast the degradations are, against the same chain through basicsr's own functions.

    python -m benchmarks.degradations --reference-python .reference/bin/python

21 frames of 720x720, one thread, the same drawn parameters on both sides (one value for all frames,
as basicsr's batched functions take them), CPU seconds, each side in a process of its own. Both sides
start from the uint8 clip and end with uint8 at a quarter of the size; the sharpening of the truth
and the return to HQ's size, which basicsr's side would pay dearly for, are left out of the ratio.
Then the RealBasicVSR chain with codecs, whole, and where its time goes. Writes
out/bench/degradations.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import cv2
import matplotlib
import numpy as np

from benchmarks.memory import status_bytes
from degradations.config import REALBASICVSR, REALESRGAN
from degradations.kernels import KernelKind
from degradations.operations import Blur, Jpeg, Resize, UnsharpMask, VideoCodec
from degradations.recipe import Degradation, apply, draw, from_json, to_json

matplotlib.use("Agg")
from matplotlib import pyplot

SHAPE = (21, 720, 720)
FPS = 24.0
KINDS: tuple[KernelKind, ...] = (
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "sinc",
)


def load_clip(path: str, start_s: float) -> np.ndarray:
    """(21, 720, 720, 3) uint8 of a video, centre crop; grown first if it is smaller."""
    frames: list[np.ndarray] = []
    with av.open(path) as container:
        for picture in container.decode(video=0):
            if (picture.time or 0.0) < start_s:
                continue
            frame: np.ndarray = picture.to_ndarray(format="rgb24")
            scale = max(1.0, 720 / min(frame.shape[:2]))
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            top, left = (frame.shape[0] - 720) // 2, (frame.shape[1] - 720) // 2
            frames.append(frame[top : top + 720, left : left + 720])
            if len(frames) == SHAPE[0]:
                return np.stack(frames)
    raise ValueError(f"{path}: only {len(frames)} frames from {start_s} s on; need {SHAPE[0]}")


def chains(count: int) -> list[Degradation]:
    """Real-ESRGAN degradations that end at a quarter of the size, without sharpening."""
    config = dataclasses.replace(REALESRGAN, time="constant", sharpen_truth=False)
    drawn = [draw(config, seed, SHAPE, FPS) for seed in range(count)]
    return [dataclasses.replace(one, operations=one.operations[:-1]) for one in drawn]


def single_operations() -> list[Any]:
    """One of each deterministic operation, for one frame."""
    blurs = [Blur((kind,), (21,), (2.5,), (1.2,), (0.6,), (1.5,), (1.2,)) for kind in KINDS]
    resizes = [
        Resize((interpolation,), (height,), (height,))
        for interpolation in ("area", "bilinear", "bicubic")
        for height in (300, 1000)
    ]
    return [*blurs, *resizes, Jpeg((30,)), Jpeg((60,)), Jpeg((95,)), UnsharpMask()]


def packed(operation: Any) -> dict[str, Any]:
    values = {item.name: getattr(operation, item.name) for item in dataclasses.fields(operation)}
    values = {name: value[0] if isinstance(value, tuple) else value for name, value in values.items()}
    return {"operation": type(operation).__name__, **values}


def describe(operation: Any) -> str:
    values = packed(operation)
    keys = ("operation", "kind", "interpolation", "height_px", "quality")
    return " ".join(str(values[key]) for key in keys if key in values)


def measure_ours(clip_path: str, drawn_path: str) -> None:
    """Run our side in a process of its own and print its report."""
    cv2.setNumThreads(1)
    clip = np.load(clip_path)
    drawn = json.loads(Path(drawn_path).read_text())
    degradations = [from_json(json.dumps(one)) for one in drawn["chains"]]
    seconds = []
    for degradation in degradations:
        start = time.process_time()
        apply(degradation, clip)
        seconds.append(time.process_time() - start)
    print(json.dumps({"seconds": seconds, "peak_bytes": status_bytes("VmHWM")}))


def shares_of(degradations: list[Degradation], clip: np.ndarray) -> dict[str, float]:
    """CPU seconds a clip of each operation."""
    spent: defaultdict[str, float] = defaultdict(float)
    for degradation in degradations:
        frames = list(clip)
        if degradation.truth is not None:
            start = time.process_time()
            frames = [degradation.truth.apply(frame) for frame in frames]
            spent["UnsharpMask"] += time.process_time() - start
        for operation in degradation.operations:
            start = time.process_time()
            name = type(operation).__name__
            if isinstance(operation, VideoCodec):
                (frames, _), name = operation.apply_clip(frames), f"VideoCodec {operation.encoder}"
            else:
                frames = [operation.apply(frame, index) for index, frame in enumerate(frames)]
            spent[name] += time.process_time() - start
    most_first = sorted(spent.items(), key=lambda item: -item[1])
    return {name: seconds / len(degradations) for name, seconds in most_first}


def realesrgan(clip: np.ndarray, reference_python: str, count: int) -> dict[str, Any]:
    """Ours against basicsr: ratio of clips a second and of peak memory, difference of each operation."""
    drawn, single = chains(count), single_operations()
    with tempfile.TemporaryDirectory() as folder:
        clip_path, drawn_path, out_path = (
            f"{folder}/{name}" for name in ("clip.npy", "drawn.json", "out.npz")
        )
        np.save(clip_path, clip)
        record = {
            "chains": [json.loads(to_json(one)) for one in drawn],
            "single": [packed(one) for one in single],
        }
        Path(drawn_path).write_text(json.dumps(record))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.degradations", "--worker", clip_path, drawn_path]
        ours = json.loads(subprocess.run(command, check=True, env=environment, capture_output=True).stdout)
        script = "benchmarks.degradations_reference"
        command = [reference_python, "-m", script, clip_path, drawn_path, out_path]
        subprocess.run(command, check=True, env=environment)
        with np.load(out_path) as arrays:
            theirs = json.loads(str(arrays["report"]))
            differences = {}
            for index, operation in enumerate(single):
                frame = clip[0]
                if isinstance(operation, UnsharpMask):
                    done = operation.apply(frame)
                elif isinstance(operation, Jpeg):  # basicsr's luma table is the standard's, transposed
                    done = operation.apply(np.ascontiguousarray(frame.swapaxes(0, 1)), 0).swapaxes(0, 1)
                else:
                    done = operation.apply(frame, 0)
                difference = np.abs(done.astype(np.float32) - arrays[f"r{index}"]).mean()
                differences[describe(operation)] = round(float(difference), 3)
    return {
        "realesrgan_ratio": sum(theirs["seconds"]) / sum(ours["seconds"]),
        "realesrgan_memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "realesrgan_clips": count,
        "realesrgan_cpu_s_a_clip": {"ours": np.mean(ours["seconds"]), "basicsr": np.mean(theirs["seconds"])},
        "realesrgan_cpu_s_of_each": {"ours": ours["seconds"], "basicsr": theirs["seconds"]},
        "realesrgan_peak_mib": {"ours": ours["peak_bytes"] / 2**20, "basicsr": theirs["peak_bytes"] / 2**20},
        "realesrgan_shares_s": {
            "ours": shares_of(drawn, clip),
            "basicsr": {name: seconds / count for name, seconds in theirs["shares"].items()},
        },
        "mean_difference_of_255": differences,
    }


def realbasicvsr(clip: np.ndarray, count: int) -> dict[str, Any]:
    """The whole chain with codecs, walking, truth sharpened, back at HQ's size."""
    drawn = [draw(REALBASICVSR, seed, SHAPE, FPS) for seed in range(count)]
    seconds, rates = [], []
    for degradation in drawn:
        start = time.process_time()
        rates += apply(degradation, clip).measured
        seconds.append(time.process_time() - start)
    return {
        "realbasicvsr_clips_per_s": count / sum(seconds),
        "realbasicvsr_cpu_s_of_each": seconds,
        "realbasicvsr_shares_s": shares_of(drawn, clip),
        "realbasicvsr_rates": rates,
    }


def plot_rates(rates: list[dict[str, Any]], path: Path) -> None:
    """Drawn against measured bits a pixel, one point a codec pass."""
    figure, axes = pyplot.subplots(figsize=(5, 4), dpi=90)
    for encoder in sorted({rate["encoder"] for rate in rates}):
        chosen = [rate for rate in rates if rate["encoder"] == encoder]
        drawn = [rate["drawn_bits_per_pixel"] for rate in chosen]
        axes.scatter(drawn, [rate["measured_bits_per_pixel"] for rate in chosen], s=14, label=encoder)
    axes.plot([0.1, 1.6], [0.1, 1.6], color="grey", linewidth=1)
    axes.set(xlabel="drawn, bits a pixel", ylabel="measured, bits a pixel", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference-python", default=".reference/bin/python", help="of `make reference`")
    parser.add_argument("--clip", default="demo/media/trailer_bbb.mp4", help="any video")
    parser.add_argument("--start-s", type=float, default=30.0)
    parser.add_argument("--clips", type=int, default=20, help="degradations to draw, of each recipe")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure_ours(*arguments.worker)
        return
    cv2.setNumThreads(1)
    clip = load_clip(arguments.clip, arguments.start_s)
    result = realesrgan(clip, arguments.reference_python, arguments.clips) | realbasicvsr(
        clip, arguments.clips
    )
    out = Path("out/bench/degradations.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    plot_rates(result["realbasicvsr_rates"], out.with_name("degradations_rates.png"))
    for name, value in result.items():
        if not isinstance(value, list) and not name.endswith("of_each"):
            print(
                f"{name}: {value:.3g}"
                if isinstance(value, float)
                else f"{name}: {json.dumps(value, indent=1)}"
            )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
