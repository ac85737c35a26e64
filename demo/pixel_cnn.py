"""A small convolutional network on pixels, the simplest learned baseline: `demo.table` compares it with ours.

    python -m demo.pixel_cnn --data file:///data/run --minutes 60 --output file:///data/cnn

trains it on the samples that configs/small/precompute.yaml plans of a data root, as pixels: the clips, crops
and degradations of the small transformer. It sees three frames and corrects the middle one; restore's colour
fix follows.
"""

import argparse
import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import colour_fix
from pipeline.data import precompute
from pipeline.data.kept_clips import KeptClips
from pipeline.data.sample_pixels import prepare_sample
from pipeline.runtime.job_config import parse
from pipeline.store import schema, storage
from pipeline.training.runs import trainer
from pipeline.video import decoding, encoding
from pipeline.weights.weights_folder import WEIGHTS_FILE

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "small" / "precompute.yaml"
BUCKET = "9x128x128"
"""Of that file's, the one that crops are taken from."""
WIDTH, BLOCKS = 48, 8
EMA_DECAY = 0.995
SHUFFLE = 2
"""Pixels a side that become channels: all convolutions run at half the size."""


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class PixelCNN(nn.Module):
    """Three frames -> the middle one, corrected. Starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(9 * SHUFFLE**2, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.leave = nn.Conv2d(WIDTH, 3 * SHUFFLE**2, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3 frames, 3, H, W) from 0 to 1, H and W even -> (B, 3, H, W)."""
        x = F.pixel_unshuffle(frames.flatten(1, 2), SHUFFLE)
        return frames[:, 1] + F.pixel_shuffle(self.leave(self.blocks(self.enter(x))), SHUFFLE)


def load(url: str) -> PixelCNN:
    """A trained network."""
    network = PixelCNN()
    network.load_state_dict(load_file(storage.path_of(storage.join(url, WEIGHTS_FILE))))
    return network.eval()


@torch.inference_mode()
def restored(network: PixelCNN, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) frames, each corrected; at the ends the missing neighbour is the frame itself."""
    window: list[Tensor] = []
    for frame in frames:
        window.append(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1) / 255)
        if len(window) == 1:
            window.append(window[0])
        if len(window) == 3:
            yield _middle(network, window)
            window.pop(0)
    if window:
        yield _middle(network, [*window, window[-1]])


def _middle(network: PixelCNN, window: list[Tensor]) -> np.ndarray:
    height, width = window[0].shape[-2:]
    even = F.pad(torch.stack(window), (0, width % SHUFFLE, 0, height % SHUFFLE), mode="replicate")
    corrected = network(even[None])[..., :height, :width]
    fixed = colour_fix.wavelet_colour_fix(corrected, window[1][None])[0]  # linear, so 0 to 1 works
    return (fixed.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def restore_folder(url: str, source: Path, target: Path) -> None:
    """Every video of a folder, corrected, losslessly, under its own name."""
    network = load(url)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        about = decoding.probe(str(file))
        size = about.width, about.height
        with encoding.VideoWriter(str(target / file.name), about.fps, *size, codec="ffv1") as writer:
            for frame in restored(network, decoding.decode_frames(str(file))):
                writer.write(frame)


# --- training ---


def training_pairs(data: str, count: int, workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(HQ, LQ), each uint8 (T, H, W, 3), of so many planned training samples of video, drawn at random."""
    arguments = ["--config", str(CONFIG), f"--data={data}", f"--vae={data}"]
    config = parse(precompute.PrecomputeConfig, "", arguments)
    kept = KeptClips(config.data)
    kept.read_text_tokens(storage.join(config.data, schema.TEXT))
    rows = [
        row
        for row in precompute.plan_rows(config, kept, config.data, config.variants, config.seed)
        if row["split"] == "train" and row["bucket"] == BUCKET
    ]
    random.Random(config.seed).shuffle(rows)
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(functools.partial(prepare_sample, config=config.pixels), rows[:count])
        return [(pair["hq"], pair["lq"]) for pair in made if "error" not in pair]


def crops(
    pairs: list[tuple[np.ndarray, np.ndarray]], side: int, draw: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (three LQ frames, the middle HQ frame), cropped and mirrored at random."""
    while True:
        hq, lq = pairs[draw.integers(len(pairs))]
        first = draw.integers(len(lq) - 2)
        top, left = (draw.integers(0, extent - side + 1) for extent in lq.shape[1:3])
        area = (slice(top, top + side), slice(left, left + side))
        seen, wanted = lq[first : first + 3][:, *area], hq[first + 1][area]
        down, right = (slice(None, None, draw.choice((-1, 1))) for _ in range(2))
        seen, wanted = seen[:, down, right], wanted[down, right]
        yield (
            torch.from_numpy(seen.copy()).permute(0, 3, 1, 2) / 255,
            torch.from_numpy(wanted.copy()).permute(2, 0, 1) / 255,
        )


def time_share(minutes: float) -> Callable[[int], float]:
    """A function for `train`: the share of the given minutes, counted from now, that has passed."""
    start = time.monotonic()
    return lambda step: (time.monotonic() - start) / (60 * minutes)


def train(
    pairs: list[tuple[np.ndarray, np.ndarray]],
    share_over: Callable[[int], float],
    rate: float,
    side: int,
    batch: int,
) -> tuple[PixelCNN, list[float]]:
    """The moving average of the weights at the end, and the mean absolute error of each step.

    share_over: from the number of steps made to how much of the training is over, which ends at 1.
    """
    torch.manual_seed(0)
    network, average = PixelCNN(), PixelCNN()
    optimiser = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    samples = crops(pairs, side, np.random.default_rng(0))
    history: list[float] = []
    while (share := share_over(len(history))) < 1:
        warm = min(1.0, (len(history) + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * (1 + math.cos(math.pi * share)) / 2
        seen, wanted = (torch.stack(part) for part in zip(*islice(samples, batch), strict=True))
        loss = F.l1_loss(network(seen), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay = min(EMA_DECAY, (1 + len(history)) / (10 + len(history)))
        with torch.no_grad():
            for kept, parameter in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(parameter, 1 - decay)
        history.append(loss.item())
        if len(history) % 100 == 0:
            mean = np.mean(history[-100:])
            print(f"step {len(history)}: L1 {mean:.4f}, {100 * share:.0f}% of the time", flush=True)
    return average, history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="URL of a data root with clips/, selection/ and text/")
    parser.add_argument("--output", required=True, help="URL of the folder for the weights")
    parser.add_argument("--minutes", type=float, default=60, help="of training, on one core")
    parser.add_argument(
        "--samples", type=int, default=1000, help="pairs that are made first and kept in memory"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that degrade")
    options = parser.parse_args()
    pairs = training_pairs(options.data, options.samples, options.workers)
    print(f"{len(pairs)} pairs", flush=True)
    torch.set_num_threads(1)
    network, history = train(pairs, time_share(options.minutes), rate=1e-3, side=64, batch=16)
    folder = Path(storage.path_of(options.output))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), str(folder / WEIGHTS_FILE))
    every = max(1, len(history) // 200)
    means = [round(float(np.mean(history[i : i + every])), 5) for i in range(0, len(history), every)]
    about = {"steps": len(history), "minutes": options.minutes, "pairs": len(pairs)}
    history_url = storage.join(options.output, trainer.HISTORY)
    storage.write_json(history_url, {**about, "steps_a_mean": every, "l1": means})


if __name__ == "__main__":
    main()
