"""Other methods, run by a command: anything that reads a folder and writes a folder can be timed and scored.

A command is a template with {input} and {output} (local folders), {scale}, {weights}, {python} and {root};
configs/peers.yaml names some. `_peer.json` next to the results records their cost, which `jobs.evaluate`
prints next to their quality. The filters of `pipeline.evaluation.baselines`, followed by bicubic enlargement,
are a command of this module:

    python -m pipeline.evaluation.peers FILTER INPUT OUTPUT SCALE   (none, median, mean3, gaussian:1.3)
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import yaml

from pipeline.evaluation import baselines
from pipeline.runtime.stage import proportional_memory
from pipeline.store import storage
from pipeline.store.schema import SUMMARY
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding, encoding
from pipeline.video.file_endings import MEDIA_ENDINGS, ending_of

ROOT = Path(__file__).resolve().parents[2]
PEERS_FILE = ROOT / "configs" / "peers.yaml"
COST = "_peer.json"
_SAMPLE_S = 0.2


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """What `jobs.peer` reads."""

    input: Url
    """Local folder with the low-quality clips."""
    output: Url
    """Local folder for the results, which are named like the inputs."""
    method: str | None = None
    """Name of a command in configs/peers.yaml; give exactly one of `method` and `command`."""
    command: str | None = None
    """Command of your own, with the placeholders {input} and {output} and, where it needs them, {scale} and
    {weights}; give exactly one of `method` and `command`."""
    scale: int = 4
    """Enlarging factor that takes the place of {scale} in the command."""
    weights: str = ""
    """Path of the method's weights, which takes the place of {weights} in the command."""
    parameters_m: float | None = None
    """Millions of parameters of the method, shown in the tables; null takes the number in configs/peers.yaml,
    if there is one."""

    def __post_init__(self) -> None:
        check_urls(self)
        for key in ("input", "output"):
            if not getattr(self, key).startswith("file://"):
                raise ValueError(f"{key}: commands read and write local folders, not {getattr(self, key)}")
        if (self.method is None) == (self.command is None):
            raise ValueError("give either method (a name in configs/peers.yaml) or command")
        if self.method is not None and self.method not in known():
            raise ValueError(f"method: {self.method!r} is none of {', '.join(known())} (configs/peers.yaml)")
        if "{weights}" in self.template and not self.weights:
            about = known().get(self.method or "", {})
            raise ValueError(f"weights: this command needs them; see {about.get('source', 'its author')}")

    @property
    def template(self) -> str:
        """The command with its placeholders."""
        return self.command or str(known()[self.method or ""]["command"])


def known() -> dict[str, dict[str, Any]]:
    """The methods of configs/peers.yaml: command, source, parameters_m."""
    return yaml.safe_load(PEERS_FILE.read_text())


def run(config: PeerConfig) -> dict[str, Any]:
    """Run the command; its cost, which is also written. ValueError if it fails or leaves nothing."""
    source, target = (storage.path_of(url) for url in (config.input, config.output))
    os.makedirs(target, exist_ok=True)
    values = {
        "input": shlex.quote(source),
        "output": shlex.quote(target),
        "scale": config.scale,
        "weights": shlex.quote(config.weights),
        "python": shlex.quote(sys.executable),
        "root": shlex.quote(str(ROOT)),
    }
    command = config.template.format(**values)
    start = time.monotonic()
    with subprocess.Popen(shlex.split(command)) as process:
        peak = watch(process)
    seconds = time.monotonic() - start
    if process.returncode:
        raise ValueError(f"{config.method or 'command'}: status {process.returncode} from: {command}")
    frames = sum(1 for file in clips(Path(target)) for _ in decoding.decode_frames(str(file), max_side=64))
    if not frames:
        raise ValueError(f"{config.method or 'command'}: it left no video and no image in {target}")
    parameters = config.parameters_m
    if parameters is None and config.method is not None:
        parameters = known()[config.method].get("parameters_m")
    cost = {
        "command": command,
        "frames": frames,
        "seconds": seconds,
        "seconds_per_frame": seconds / frames,
        "peak_memory_gib": peak / 2**30,
        "parameters_m": parameters,
    }
    storage.write_json(storage.join("file://" + target, COST), cost)
    return cost


def cost_of(url: str) -> dict[str, Any] | None:
    """Cost of the results in a folder, if `jobs.peer` or `jobs.restore` made them; None otherwise.

    The keys are seconds_per_frame, peak_memory_gib and parameters_m, None where unknown. For restore's own
    results the seconds are those of an actor at work, with its models loaded; for a command's they are all of
    its run.
    """
    cost_url, manifest_url = (storage.join(url, name) for name in (COST, "manifest.json"))
    if storage.exists(cost_url):
        return storage.read_json(cost_url)
    rows = storage.read_json(manifest_url) if storage.exists(manifest_url) else []
    made = [row for row in rows if isinstance(row, dict) and row.get("frames") and row.get("seconds")]
    if not made:
        return None
    summary_url = storage.join(url, SUMMARY)
    peak = storage.read_json(summary_url).get("peak_memory_bytes") if storage.exists(summary_url) else None
    return {
        "seconds_per_frame": sum(row["seconds"] for row in made) / sum(row["frames"] for row in made),
        "peak_memory_gib": peak / 2**30 if peak else None,
        "parameters_m": made[0].get("parameters_m"),
    }


def watch(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a command; returns the peak memory (PSS) of it and its children, in bytes."""
    peak = 0
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            peak = max(peak, sum(map(proportional_memory, family)))
        except psutil.NoSuchProcess:
            pass
        time.sleep(_SAMPLE_S)
    return peak


def clips(folder: Path) -> Iterator[Path]:
    """Every video and image of a folder that is not bookkeeping."""
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if (
            file.is_file()
            and ending_of(file.name) in MEDIA_ENDINGS
            and not any(part[0] in "_." for part in inner.parts)
        ):
            yield file


def baseline(name: str, source: Path, target: Path, scale: int = 1) -> None:
    """Write every clip of `source`, filtered and enlarged, losslessly."""
    through = baselines.by_name(name)
    for file in clips(source):
        about = decoding.probe(str(file))
        path = target / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = (enlarged(frame, scale) for frame in through(decoding.decode_frames(str(file))))
        if about.media == "image":
            cv2.imwrite(str(path.with_suffix(".png")), cv2.cvtColor(next(frames), cv2.COLOR_RGB2BGR))
            continue
        size = about.width * scale, about.height * scale
        with encoding.VideoWriter(str(path.with_suffix(".mkv")), about.fps, *size, codec="ffv1") as writer:
            for frame in frames:
                writer.write(frame)


def enlarged(frame: np.ndarray, scale: int) -> np.ndarray:
    """A uint8 (H, W, 3) frame, `scale` times as large, by OpenCV's bicubic."""
    if scale == 1:
        return frame
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


if __name__ == "__main__":
    which, source_folder, target_folder, factor = sys.argv[1:]
    baseline(which, Path(source_folder), Path(target_folder), int(factor))
