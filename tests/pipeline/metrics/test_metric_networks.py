"""The learned metrics of evaluate: equal to their networks one by one, and left out without weights."""

import numpy as np
import pytest
import torch

from model.perceptual.dists import Dists
from model.perceptual.lpips import Lpips
from model.quality import dover
from pipeline.metrics import metric_networks
from pipeline.metrics.metric_networks import LearnedMetrics, Networks


def test_without_weights_a_column_is_left_out_and_said():
    nothing = LearnedMetrics()
    assert nothing.columns(True) == ()
    assert nothing.left_out(True) == (
        "left out: no weights for lpips, dists, musiq, clip_iqa, dover (learned.lpips, ...)"
    )
    assert nothing.hashes() == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lpips": "file:///nowhere"}, r"learned\.lpips: file:///nowhere has no vgg16-397923af\.pth"),
        ({"dists": "file:///nowhere"}, r"learned\.dists: file:///nowhere has no vgg16-397923af\.pth"),
        ({"musiq": "file:///nowhere.npz"}, r"learned\.musiq: there is no file file:///nowhere\.npz"),
        ({"dover": "nowhere.pth"}, r"learned\.dover: .*relative"),
    ],
)
def test_weights_that_are_not_there_are_named(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LearnedMetrics(**wrong)


def tiny_networks() -> Networks:
    """LPIPS, DISTS and a stand-in for a metric of single frames, at tiny widths with random weights."""
    torch.manual_seed(0)
    networks = Networks(LearnedMetrics(), torch.device("cpu"))
    networks.per_frame["lpips"] = networks._compared(Lpips((4, 4, 8, 8, 8)), lambda x: x / 127.5 - 1)
    networks.per_frame["dists"] = networks._compared(Dists((4, 4, 8, 8, 8)), lambda x: x / 255)
    networks.per_frame["musiq"] = lambda frames, _: frames.float().mean(dim=(1, 2, 3)).tolist()
    return networks


def test_batches_give_the_mean_over_all_frames(monkeypatch):
    rng = np.random.default_rng(0)
    frames, truths = rng.integers(0, 256, (2, 5, 32, 32, 3), np.uint8)
    networks = tiny_networks()

    def measured(batch: int) -> dict[str, float | None]:
        monkeypatch.setattr(metric_networks, "BATCH_FRAMES", batch)
        clip = networks.clip(len(frames))
        for frame, truth in zip(frames, truths, strict=True):
            clip.push(frame, truth)
        return clip.finish()

    alone, together = measured(1), measured(3)
    assert set(alone) == {"lpips", "dists", "musiq"}
    assert together == pytest.approx(alone, rel=1e-5) and alone["musiq"] == pytest.approx(frames.mean())


def test_without_a_truth_there_is_no_distance():
    clip = tiny_networks().clip(1)
    clip.push(np.zeros((32, 32, 3), np.uint8), None)
    assert clip.finish() == {"lpips": None, "dists": None, "musiq": 0.0}


class _Looks:
    """DOVER's sampling, with a score that tells which frames it was given."""

    def frame_numbers(self, total: int) -> tuple[list[int], list[int]]:
        return dover.Dover.frame_numbers(self, total)  # type: ignore[arg-type]

    config = dover.PUBLISHED

    def look(self, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = frame.float().mean().reshape(1, 1, 1, 1)
        return level, level

    def score(self, technical: torch.Tensor, aesthetic: torch.Tensor) -> dict[str, float]:
        return {"technical": technical.mean().item(), "overall": float(aesthetic.shape[1])}


@pytest.mark.parametrize("count", [40, 3])
def test_dover_sees_the_frames_that_it_wants_in_its_order(count: int):
    networks = Networks(LearnedMetrics(), torch.device("cpu"))
    networks.dover = _Looks()
    clip = networks.clip(count)
    for level in range(count):
        clip.push(np.full((8, 8, 3), level, np.uint8), None)
    found = clip.finish()
    wanted, _ = networks.dover.frame_numbers(count)
    assert found == {"dover_technical_x100": pytest.approx(100 * np.mean(wanted)), "dover_overall": 32}
