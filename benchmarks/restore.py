"""How restoring spends its time, and whether its memory grows with the length of the video.

    python -m benchmarks.restore                 (about 20 minutes on 2 cores; nothing else should run)
    python -m benchmarks.restore --only speed    (or ratio, growth: the others stay as they were measured)
    python -m benchmarks.restore --quick         (a check that it runs)

One step, real frames repeated, H.264 in and out, each measurement in a process of its own.
speed: seconds per frame at 360p and 720p with the shipped small weights (random ones make noise, which H.264
writes slowly): read (decode the file), encode, transformer, decode, pixels (sizes and colours), write.
ratio, growth: memory with random weights of tiny widths, of the process and its decoder, as the rise over
the loaded models; PSS, and beside it the kernel's own peaks of resident memory. The naive way holds all
frames and treats the video as one chunk. Writes out/bench/restore.json with `outside_networks_share`,
`memory_ratio_1000` and `memory_growth_200_to_10000`.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch

from benchmarks.memory import reset_peak, status_bytes
from model.dit.swin_mmdit import TINY, SwinMMDiT
from model.vae.autoencoder import CausalVideoAutoencoder
from pipeline.restoration import restore
from pipeline.restoration.chunking import Chunk
from pipeline.restoration.restore import RestoreActor, RestoreConfig, Sampling
from pipeline.runtime.stage import proportional_memory
from pipeline.video import decoding, encoding
from pipeline.weights import weights_folder
from pipeline.weights.backbones import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = f"file://{ROOT}/demo/weights/vae", f"file://{ROOT}/demo/weights/dit"
CLIP = ROOT / "demo" / "media" / "city.mp4"
OUT = Path("out/bench")
SAMPLING = Sampling(steps=1, chunk_frames=21, overlap_frames=8, slice_frames=8)
MEMORY_SIZE = (180, 320)
NAIVE_SIZE = (96, 160)


def tiny_models(folder: Path) -> tuple[str, str]:
    """Random weights at a fraction of the shipped widths; their URLs."""
    torch.manual_seed(0)
    vae_config = dataclasses.replace(weights_folder.load_vae(SHIPPED[0]).config, widths=(4, 4, 8, 16))
    dit_config = dataclasses.replace(TINY, num_layers=2, num_heads=2, windows=((5, 16, 16),))
    urls = f"file://{folder}/vae", f"file://{folder}/dit"
    vae, dit = CausalVideoAutoencoder(vae_config), SwinMMDiT(dit_config)
    weights_folder.save_weights(urls[0], weights_folder.VAE, vae_config, vae.state_dict())
    null = weights_folder.Prompts(torch.randn(7, dit_config.text_dim), torch.randn(dit_config.pooled_dim))
    weights_folder.save_weights(urls[1], weights_folder.SWIN_MMDIT, dit_config, dit.state_dict(), null)
    return urls


def make_clip(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Real frames at a (height, width), there and back again until there are enough."""
    real = [
        cv2.resize(frame, size[::-1], interpolation=cv2.INTER_CUBIC)
        for frame in decoding.decode_frames(str(CLIP), max_frames=40)
    ]
    there_and_back = [*real, *real[-2:0:-1]]
    with encoding.VideoWriter(str(path), Fraction(25), size[1], size[0], crf=20) as writer:
        for index in range(frames):
            writer.write(there_and_back[index % len(there_and_back)])


class MemoryRise:
    """Peak growth of this process and its children while it is open.

    Measured as PSS, sampled twenty times a second, and as the sum of each process's own peak of resident
    memory, which the kernel keeps.

    The share of the networks' libraries that counts as this process's own moves PSS by a hundred MiB when
    other processes that use them come and go, and sampling misses peaks, more of them in a short run.
    """

    def __init__(self) -> None:
        self._residents = {process.pid: reset_peak(process.pid) for process in self._processes()}
        self.before = self.peak = self._now()
        self.rise_of_peaks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _processes(self) -> list[psutil.Process]:
        me = psutil.Process()
        return [me, *me.children(recursive=True)]

    def _now(self) -> int:
        """PSS in bytes."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += proportional_memory(process)
        return total

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> "MemoryRise":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())
        for process in self._processes():
            peak = status_bytes("VmHWM", process.pid)
            self.rise_of_peaks += peak - self._residents.get(process.pid, 0)

    @property
    def result(self) -> dict[str, float]:
        rises = {"rise_mib": self.peak - self.before, "rise_of_peaks_mib": self.rise_of_peaks}
        return {name: rise / 2**20 for name, rise in rises.items()}


def run_ours(clip: str, vae: str, dit: str) -> dict[str, Any]:
    """Restore a file as the job's actor does."""
    with tempfile.TemporaryDirectory() as folder:
        config = RestoreConfig(
            input=f"file://{clip}",
            output=f"file://{folder}",
            model=ModelConfig(dit, vae=vae),
            sampling=SAMPLING,
            memory_gib=16,
            cpus=2,
        )
        actor = RestoreActor(config)
        actor.sandbox.call(decoding.probe, clip)  # the decoder's process counts to what is loaded
        (row,) = restore.list_inputs(config)
        row |= {"preview": False, "fingerprint": restore.fingerprint(config, row)}
        with MemoryRise() as rise:
            result = actor(row)["result"]
        assert result["error"] is None, result["error"]
        return {**{key: result[key] for key in ("frames", "seconds", "seconds_in")}, **rise.result}


def run_naive(clip: str, vae_url: str, dit_url: str) -> dict[str, Any]:
    """The whole video at once: every frame in memory, one pass of each network, no overlap."""
    actor_restorer = restore.Restorer.from_weights(ModelConfig(dit_url, vae=vae_url), SAMPLING, device="cpu")
    vae = actor_restorer.vae
    with MemoryRise() as rise, torch.inference_mode():
        frames = np.stack(list(decoding.decode_frames(clip)))
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mean, _ = vae.encode(video)
        latent = vae.to_latent(mean, torch.zeros_like(mean), None)[0].permute(1, 2, 3, 0)
        restored = actor_restorer.denoise(Chunk(0, latent)).latent
        decoded = vae.decode(restored.permute(3, 0, 1, 2)[None], len(frames), *frames.shape[1:3])
        pixels = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    return {"frames": len(pixels), **rise.result}


def measured(
    which: str, folder: Path, frames: int, size: tuple[int, int], models: tuple[str, str]
) -> dict[str, Any]:
    """One measurement in a process of its own."""
    clip = folder / f"{frames}_{size[1]}x{size[0]}.mp4"
    if not clip.exists():
        make_clip(clip, frames, size)
    command = [sys.executable, "-m", "benchmarks.restore", "--worker", which, str(clip), *models]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{which}, {frames} frames of {size[1]}x{size[0]}: {result}", flush=True)
    return result


def speed(folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds per frame by part."""
    counts = {"360p": 25, "720p": 9} if quick else {"360p": 125, "720p": 65}
    shares, table = [], {}
    for label, size in (("360p", (360, 640)), ("720p", (720, 1280))):
        run = measured("ours", folder, counts[label], size, SHIPPED)
        parts = {part: spent / run["frames"] for part, spent in run["seconds_in"].items()}
        networks = sum(parts[part] for part in ("encode", "transformer", "decode"))
        shares.append(1 - networks / (run["seconds"] / run["frames"]))
        table[label] = {**parts, "total": run["seconds"] / run["frames"]}
        print(label, " ".join(f"{part} {seconds:.4f}" for part, seconds in table[label].items()))
    return {"seconds_per_frame": table, "outside_networks_share": max(shares)}


def ratio(folder: Path, quick: bool) -> dict[str, Any]:
    """Memory of the naive way over ours."""
    models, count = tiny_models(folder), 40 if quick else 1000
    ours, naive = (measured(which, folder, count, NAIVE_SIZE, models) for which in ("ours", "naive"))
    return {
        "memory_ratio_1000": naive["rise_mib"] / ours["rise_mib"],
        "ratio": {"frames": count, "ours": ours, "naive": naive},
    }


def growth(folder: Path, quick: bool) -> dict[str, Any]:
    """Memory of a long video over that of a short one."""
    models, counts = tiny_models(folder), (24, 60) if quick else (200, 10_000)
    short, long = (measured("ours", folder, count, MEMORY_SIZE, models) for count in counts)
    return {
        "memory_growth_200_to_10000": long["rise_mib"] / short["rise_mib"],
        "growth": {"frames": counts, "short": short, "long": long},
    }


PARTS = {"speed": speed, "ratio": ratio, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few frames: only a check that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        which, clip, vae, dit = arguments.worker
        print(json.dumps((run_ours if which == "ours" else run_naive)(clip, vae, dit)))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / ("restore_quick.json" if arguments.quick else "restore.json")
    report = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.only:
        with tempfile.TemporaryDirectory() as name:
            report |= PARTS[part](Path(name), arguments.quick)
        file.write_text(json.dumps(report, indent=1) + "\n")
    for key in ("outside_networks_share", "memory_growth_200_to_10000", "memory_ratio_1000"):
        if key in report:
            print(f"{key}: {report[key]:.3f}")


if __name__ == "__main__":
    main()
