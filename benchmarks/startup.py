"""What a user waits for after each command, with Ray up: seconds until a worker begins the job's first task.

    python -m benchmarks.startup [--only ingest filter ...]      (about 3 minutes on 2 cores)

The demo's jobs on two clips, each in a driver of its own; a training's first task is its ranks' start. A
job's driver's CPU seconds until then are beside them: other work on the machine stretches the wall time.
Prints a table, writes out/bench/startup.json.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from demo import run as demo
from demo.local_ray import LocalRay, local_ray

OUT = Path("out/bench")
CLIPS = ("cup.mp4", "fig.jpg", "box.mp4", "cat.jpg")
_HELPERS = (
    *("IDLE", "DashboardAgent", "RuntimeEnvAgent", "clear", "ControlActor", "TrainController", "_StatsActor"),
    *("ActorLocationTracker", "AutoscalingCoordinator", "_AutoscalingCoordinator", "PlacementGroupCleaner"),
    *("SynchronizationActor", "PreemptionWatcher", "JobSupervisor", "_ray_internal_job_actor"),
)
"""What Ray's processes call themselves while they do no work of the job's."""
_LIMIT_S = 600


def first_task(ray: LocalRay) -> str | None:
    """The name of a task or actor that a worker is at."""
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ()).strip()
        if not title.startswith("ray::") or title.removeprefix("ray::").startswith(_HELPERS):
            continue
        with contextlib.suppress(psutil.Error):
            if any(parent.pid == ray.head.pid for parent in process.parents()):
                return title
    return None


def start(job: demo.Job, ray: LocalRay, log: Path) -> dict[str, Any]:
    """Seconds until the job's first task; the job then runs to its end, as later ones need what it leaves."""
    command = [sys.executable, "-m", f"jobs.{job.stage}", "--config", f"configs/demo/{job.stage}.yaml"]
    while first_task(ray):  # workers of the job before
        time.sleep(0.5)
    with log.open("w") as file:
        begin = time.monotonic()
        driver = psutil.Popen(
            [*command, *job.overrides, *job.short], env=ray.environment, stdout=file, stderr=file
        )
        task = None
        while task is None and driver.poll() is None and time.monotonic() < begin + _LIMIT_S:
            time.sleep(0.02)
            task = first_task(ray)
        seconds = time.monotonic() - begin
        with contextlib.suppress(psutil.Error):
            spent = driver.cpu_times()
        driver.wait()
    if task is None or driver.returncode:
        raise RuntimeError(f"{job.stage} ended with {driver.returncode}:\n{log.read_text()[-2000:]}")
    cpu = spent.user + spent.system
    return {"seconds": round(seconds, 2), "driver_cpu_seconds": round(cpu, 2), "first_task": task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="print these; the others run where they are needed")
    only = parser.parse_args().only
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, local_ray(2, 1 << 30) as ray:
        out = Path(folder)
        (out / "input").mkdir()
        for name in CLIPS:
            (out / "input" / name).symlink_to(demo.MEDIA / name)
        print(f"{'job':<12}{'seconds':>9}{'driver CPU s':>14}   first task")
        for job in demo.jobs(out):
            row = start(job, ray, out / f"{job.stage}.log")
            if not only or job.stage in only:
                found[job.stage] = row
                numbers = f"{row['seconds']:>9}{row['driver_cpu_seconds']:>14}"
                print(f"{job.stage:<12}{numbers}   {row['first_task']}", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "startup.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
