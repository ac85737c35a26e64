"""Short clips from the demo's training photographs, since its few videos alone are soon memorised.

    python -m demo.make_training_pans --out FOLDER

A window moves over each photograph by whole pixels, so nothing is resampled; the clips are lossless. Together
with the files of demo/media they are the training data of configs/small/train_dit_more.yaml. Held-out
photographs are excluded.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from demo.held_out import MEDIA
from pipeline.evaluation import synthetic_pairs
from pipeline.video import decoding

STILLS = (
    "astronaut.jpg",
    "autumn_hills.jpg",
    "brushes.jpg",
    "china.jpg",
    "clock_motion.png",
    "coffee.jpg",
    "fig.jpg",
    "rocket.jpg",
)
FRAMES = 25
MOVES_PX = ((0, 2), (1, -2), (-2, 1), (2, 2))
"""Of the window from frame to frame, down and right: the photographs take them in turn."""


def moved(still: np.ndarray, down: int, right: int) -> np.ndarray:
    """uint8 (25, H, W, 3) of a photograph: as large as the move leaves room for, with even sides."""
    way = abs(down) * (FRAMES - 1), abs(right) * (FRAMES - 1)
    height, width = ((extent - w) // 2 * 2 for extent, w in zip(still.shape[:2], way, strict=True))
    tops = [down * index if down >= 0 else way[0] + down * index for index in range(FRAMES)]
    lefts = [right * index if right >= 0 else way[1] + right * index for index in range(FRAMES)]
    return np.stack([still[t : t + height, w : w + width] for t, w in zip(tops, lefts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name, move in zip(STILLS, itertools.cycle(MOVES_PX)):
        frames = moved(decoding.load_image(str(MEDIA / name)), *move)
        file = f"file://{out}/{Path(name).stem}.mkv"
        synthetic_pairs.write_lossless(file, frames, 25.0, is_image=False)
        print(f"{file}: {frames.shape[2]}x{frames.shape[1]}, {len(frames)} frames")


if __name__ == "__main__":
    main()
