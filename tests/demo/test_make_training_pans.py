"""The clips made of the training photographs."""

import numpy as np
import yaml

from demo.make_training_pans import FRAMES, MOVES_PX, STILLS, moved
from demo.run import ROOT


def test_a_window_moves_over_the_photograph_by_whole_pixels():
    still = np.random.default_rng(0).integers(0, 256, (101, 120, 3), dtype=np.uint8)
    for down, right in MOVES_PX:
        frames = moved(still, down, right)
        assert len(frames) == FRAMES and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
        height, width = frames.shape[1:3]
        corners = [0 if step >= 0 else abs(step) * (FRAMES - 1) for step in (down, right)]
        for index, frame in enumerate(frames):
            top, left = corners[0] + down * index, corners[1] + right * index
            assert np.array_equal(frame, still[top : top + height, left : left + width])


def test_no_photograph_is_held_out():
    held_out = yaml.safe_load((ROOT / "configs/demo/filter.yaml").read_text())["held_out"]
    assert not set(STILLS) & {name.split("@")[0] for name in held_out}
