"""Cost of the learned scores: CPU seconds, parameters and memory for a clip of 1280x720, one thread.

    python -m benchmarks.scorers [--frames 4] [--only NAME ...]

The published shapes with random weights, since cost does not depend on them; decoding is not counted. CPU
time, not wall time, so that other work on the machine disturbs little. Prints a table, writes
out/bench/scorers.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from model.checkpoints import load_aesthetic_head
from model.quality import aesthetic, dover, fast_vqa, musiq
from model.quality.clip_iqa import ClipIQA

OUT = Path("out/bench")
CLIP_FRAMES = 120
Cost = tuple[
    int, Callable[[torch.Tensor], None]
]  # parameters; what a clip of which each frame is this one costs


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def of_pictures(score: Callable[[torch.Tensor], float], frames: int) -> Callable[[torch.Tensor], None]:
    def run(frame: torch.Tensor) -> None:
        for _ in range(frames):
            score(frame)

    return run


def build(name: str, frames: int) -> Cost:
    """A scorer by name, with random weights."""
    if name == "aesthetic":
        visual = open_clip.create_model("ViT-L-14-quickgelu").visual.eval()
        head = load_aesthetic_head(aesthetic.WEIGHTS / aesthetic.MLP_FILE)
        return parameters(visual) + parameters(head), of_pictures(
            partial(aesthetic.score, visual, head), frames
        )
    if name == "clip_iqa":
        clip = open_clip.create_model("RN50-quickgelu").eval()
        return parameters(clip), of_pictures(ClipIQA(clip).score, frames)
    if name == "musiq":
        network = musiq.Musiq(musiq.PUBLISHED).eval()
        return parameters(network), of_pictures(network.score, frames)
    if name == "dover":
        both = dover.Dover(dover.PUBLISHED).eval()
        technical, whole = both.frame_numbers(CLIP_FRAMES)

        def run_dover(frame: torch.Tensor) -> None:
            looks = [both.look(frame) for _ in technical + whole]
            close = torch.cat([look for look, _ in looks[: len(technical)]], dim=1)
            both.score(close, torch.cat([picture for _, picture in looks[len(technical) :]], dim=1))

        return parameters(both), run_dover
    shape = {"fast_vqa": fast_vqa.PUBLISHED, "faster_vqa": fast_vqa.PUBLISHED_FASTER}[name]
    video = fast_vqa.FastVQA(shape).eval()

    def run_video(frame: torch.Tensor) -> None:
        video.score(torch.cat([video.look(frame) for _ in video.frame_numbers(CLIP_FRAMES)], dim=1))

    return parameters(video), run_video


NAMES = ("aesthetic", "clip_iqa", "fast_vqa", "faster_vqa", "musiq", "dover")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=4, help="frames for those that see single frames")
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frame = torch.randint(0, 256, (720, 1280, 3), dtype=torch.uint8)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        count, run = build(name, arguments.frames)
        start = time.process_time()
        run(frame)
        seconds = time.process_time() - start
        rows.append({"scorer": name, "parameters": count, "cpu_s_per_clip": seconds})
        print(f"{name:12s} {count / 1e6:7.1f} M parameters {seconds:8.1f} CPU s a clip", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    report = {"frame": "1280x720", "frames": arguments.frames, "threads": 1, "scorers": rows}
    (OUT / "scorers.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
