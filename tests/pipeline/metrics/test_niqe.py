"""NIQE equals basicsr's on real frames, and says None where it cannot be told."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.metrics.niqe import niqe
from pipeline.video import decoding

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "tests/data/scores/niqe.json"
IMAGES = ("astronaut.jpg", "cat.jpg", "coffee.jpg", "rocket.jpg", "flower.jpg")


def frames() -> dict[str, np.ndarray]:
    """20 frames: five photographs as they are, blurred, noisy, and cut to an odd size; none above 640x480."""
    made: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for name in IMAGES:
        picture = decoding.load_image(str(ROOT / "demo/media" / name))[:480, :640]
        noisy = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        for variant in (picture, cv2.GaussianBlur(picture, (0, 0), 2.0), noisy, picture[3:300, 5:416]):
            made[f"frame_{len(made):02d}"] = np.ascontiguousarray(variant)
    return made


def test_equals_basicsr():
    recorded = json.loads(RECORDED.read_text())
    made = frames()
    assert sorted(recorded) == sorted(made)
    for index, (name, frame) in enumerate(made.items()):
        # Clipped noise makes flat specks, whose statistics hang on the last bits of basicsr's float32.
        tolerance = 4e-3 if index % 4 == 2 else 1e-3
        assert niqe(frame) == pytest.approx(recorded[name], abs=tolerance), name


def test_noise_and_blur_are_worse_than_the_photograph():
    made = list(frames().values())
    for index in range(0, 20, 4):
        sharp, blurred, noisy = (niqe(frame) for frame in made[index : index + 3])
        assert sharp is not None and blurred is not None and noisy is not None
        assert sharp < blurred and sharp < noisy


def test_none_where_it_cannot_be_told():
    assert niqe(np.zeros((200, 300, 3), np.uint8)) is None
    assert niqe(np.random.default_rng(0).integers(0, 256, (95, 400, 3), dtype=np.uint8)) is None


if __name__ == "__main__":
    np.savez(sys.argv[1], allow_pickle=False, **frames())
