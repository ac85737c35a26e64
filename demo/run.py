"""The whole system once, on real clips, on this machine: `make demo`.

Starts its own Ray, sends every stage through `ray job submit` as a user would, measures time and memory, and
writes out/demo/report.html and out/demo/summary.json. `--short` takes fewer clips and steps.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from demo.local_ray import LocalRay, local_ray
from pipeline.runtime.stage import proportional_memory

ROOT = Path(__file__).resolve().parent.parent
MEDIA = ROOT / "demo" / "media"
WEIGHTS = ROOT / "demo" / "weights"
CPUS = 2
OBJECT_STORE_BYTES = 1 << 30
SHORT_MEDIA = (
    *("trailer_bbb.mp4", "city.mp4", "cup.mp4", "box.mp4", "pan_dogs.mp4"),
    *("fig.jpg", "coffee.jpg", "flower.jpg", "cat.jpg", "astronaut.jpg"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One `ray job submit`."""

    stage: str
    folder: str  # below out/demo: where the stage leaves its _summary.json
    overrides: tuple[str, ...]
    short: tuple[str, ...] = ()


def jobs(out: Path) -> list[Job]:
    """The stages in order, with the URLs that only this run knows."""
    data = f"file://{out}/data"
    restored, pairs = f"file://{out}/restored", f"file://{out}/pairs"
    vae, dit = f"{data}/weights/vae", f"{data}/weights/dit"
    return [
        Job("ingest", "data/clips", (f"--input=file://{out}/input", f"--output={data}")),
        Job("filter", "data/scores", (f"--data={data}",)),
        Job(
            "train_vae",
            "data/weights/vae",
            (f"--data={data}", f"--output={data}", f"--initial_weights=file://{WEIGHTS}/vae"),
            SHORT_VAE,
        ),
        Job("precompute", "data/latents", (f"--data={data}", f"--vae={vae}"), ("--variants=1",)),
        Job(
            "train_dit",
            "data/weights/dit",
            (f"--data={data}", f"--output={data}", f'--initial={{"weights": "file://{WEIGHTS}/dit"}}'),
            SHORT_DIT,
        ),
        Job("pairs", "pairs", (f"--data={data}", f"--output={pairs}"), ("--max_clips=4",)),
        Job(
            "restore",
            "restored",
            (
                f'--input=["{pairs}/lq"]',
                f"--output={restored}",
                f"--model.weights={dit}",
                f"--model.vae={vae}",
            ),
        ),
        Job(
            "evaluate",
            "evaluation",
            (
                f"--truth={pairs}/hq",
                f'--methods={{"LQ": "{pairs}/lq", "restored": "{restored}"}}',
                f"--reconstruct_with={vae}",
                f"--output=file://{out}/evaluation",
            ),
        ),
    ]


SHORT_VAE = (
    '--stages=[{"crop": {"frames": 5, "height": 64, "width": 64}, "steps": 20, "learning_rate": 2.0e-5, '
    '"crops_per_worker": 2}]',
    "--adversarial.start_step=5",
    "--adversarial.warmup_steps=5",
)
SHORT_DIT = (
    '--stages=[{"name": "5x64x64", "buckets": ["5x64x64", "1x64x64"], "steps": 15, "learning_rate": 2.0e-5, '
    '"tokens_per_pack": 256, "one_step": {"share": 0.5}}, {"name": "9x96x96", "buckets": ["9x96x96", '
    '"1x64x64"], "steps": 10, "learning_rate": 2.0e-5, "tokens_per_pack": 512, "one_step": {"share": 0.5}}]',
)


def prepare_input(out: Path, short: bool) -> None:
    """The bundled clips, and one damaged file, as real collections contain them."""
    folder = out / "input"
    folder.mkdir(parents=True)
    names = SHORT_MEDIA if short else sorted(path.name for path in MEDIA.iterdir() if path.suffix != ".md")
    for name in names:
        (folder / name).symlink_to(MEDIA / name)
    (folder / "broken_download.mp4").write_bytes((MEDIA / "box.mp4").read_bytes()[:20_000])


class MemoryWatch:
    """The highest sum of PSS over all processes of the demo, by sampling."""

    def __init__(self, ray: LocalRay) -> None:
        self.peak_bytes = 0
        self._ray = ray
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            self.peak_bytes = max(self.peak_bytes, sum(map(proportional_memory, self._ray.processes())))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def submit(job: Job, ray: LocalRay, out: Path, short: bool) -> dict[str, Any]:
    """Run one stage to its end; its summary with the seconds of the whole submission. Stops on failure."""
    overrides = job.overrides + (job.short if short else ())
    entry = ["python", "-m", f"jobs.{job.stage}", "--config", f"configs/demo/{job.stage}.yaml", *overrides]
    command = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", *entry]
    print(f"\n$ ray job submit --working-dir . -- {' '.join(entry)}", flush=True)
    start = time.monotonic()
    with open(out / "logs" / f"{job.stage}.log", "w") as log:
        process = subprocess.Popen(
            command, env=ray.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if worth_showing(line):
                print("   " + line.rstrip(), flush=True)
    wall_s = time.monotonic() - start
    if process.wait() != 0:
        raise SystemExit(f"the stage {job.stage} failed; its log is {out}/logs/{job.stage}.log")
    summary = json.loads((out / job.folder / "_summary.json").read_text())
    return {**summary, "wall_s": wall_s, "startup_s": max(0.0, wall_s - summary["seconds"])}


def worth_showing(line: str) -> bool:
    """Print every tenth of training's step lines, the summaries, and errors; the rest is in the log."""
    if " step " in line and "eta" in line:
        number = line.split(" step ")[1].split("/")[0]
        return number.endswith("0")
    return line.startswith(("== ", "   ", "error:")) or "passed over" in line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer clips and steps: some minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="made anew each time")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    prepare_input(out, arguments.short)
    start = time.monotonic()
    try:
        with local_ray(CPUS, OBJECT_STORE_BYTES) as ray:
            print(f"local Ray is up, dashboard {ray.dashboard} (token authentication)", flush=True)
            memory = MemoryWatch(ray)
            stages = [submit(job, ray, out, arguments.short) for job in jobs(out)]
            memory.close()
    except KeyboardInterrupt:
        print("\nstopped; the local Ray is gone, what was made is in", out, file=sys.stderr)
        raise SystemExit(130) from None
    from demo.results import collect  # matplotlib and the networks: only now

    total = {"seconds": time.monotonic() - start, "peak_memory_bytes": memory.peak_bytes}
    collect(out, stages, total, short=arguments.short)
    print(f"\n{total['seconds'] / 60:.1f} minutes, peak memory {memory.peak_bytes / 2**30:.2f} GiB")
    print(f"report: {out}/report.html\nnumbers: {out}/summary.json")


if __name__ == "__main__":
    main()
