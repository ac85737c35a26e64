"""The table of held-out clips: what it is made of and how its numbers are formed. `make table` makes it."""

import numpy as np
import pytest
import yaml

from demo import held_out, table
from demo.held_out import HELD_OUT, TRAINING, Shot
from pipeline.video import decoding, encoding
from tests.helpers.clips import MEDIA


def test_the_clips_are_many_and_no_network_has_seen_them():
    clips = {kind: sum(shot.clips for shot in HELD_OUT if shot.kind == kind) for kind in held_out.KINDS}
    scenes = [shot for shot in HELD_OUT if shot.kind != "pan"]  # pans over photographs count apart
    assert clips["camera"] + clips["animation"] >= 30 and len(scenes) >= 8
    assert 3 * clips["camera"] >= clips["camera"] + clips["animation"]
    assert len({shot.source for shot in HELD_OUT}) >= 4
    spans = yaml.safe_load((table.ROOT / "configs" / "demo" / "filter.yaml").read_text())["held_out"]
    for shot in (shot for shot in HELD_OUT if (MEDIA / shot.source).exists()):
        assert any(span.split("@")[0] == shot.source for span in spans), shot.name
    fps = 24  # of the trailer, of which only some seconds are held out
    (bunny,) = [shot for shot in HELD_OUT if shot.source == "trailer_bbb.mp4"]
    (span,) = [span for span in spans if span.startswith("trailer_bbb.mp4@16")]
    start_s, end_s = map(float, span.split("@")[1].split("-"))
    assert bunny.first / fps >= start_s and bunny.end / fps <= end_s + 0.2
    for shot in TRAINING:
        assert not any(
            shot.source == other.source and shot.first < other.end and other.first < shot.end
            for other in HELD_OUT
        )


def test_clips_are_cut_from_their_shot(tmp_path):
    frames = [np.full((300, 400, 3), level, np.uint8) for level in range(40)]
    path = tmp_path / "levels.mkv"
    with encoding.VideoWriter(str(path), 25, 400, 300, codec="ffv1") as writer:
        for frame in frames:
            writer.write(frame)
    clips, fps = held_out.shot_clips(Shot("x", "levels.mkv", "camera", 10, 36, 2), path)
    assert [clip[0, 0, 0, 0] for clip in clips] == [13, 20] and fps == 25
    assert all(clip.shape == (held_out.FRAMES, held_out.HEIGHT, held_out.WIDTH, 3) for clip in clips)
    short, _ = held_out.shot_clips(Shot("x", "levels.mkv", "camera", 32, 40, 1), path)
    assert short[0].shape[0] == 8
    pan, _ = held_out.shot_clips(Shot("cat", "cat.jpg", "pan", 0, 0, 1), MEDIA / "cat.jpg")
    assert (pan[0][1, :, :-2] == pan[0][0, :, 2:]).all()
    assert (pan[0][0, :, 0] != pan[0][-1, :, 0]).any()


def test_standard_errors_are_by_shot():
    entry = table.by_shot({"a-1_x": 1.0, "a-2_x": 3.0, "b-1_x": 5.0})
    assert entry["mean"] == 3.0 and entry["clips"] == 3
    assert entry["standard_error"] == pytest.approx(np.std([2.0, 5.0], ddof=1) / np.sqrt(2))
    assert table.by_shot({"a-1_x": 1.0})["standard_error"] is None


def row(method: str, clip: str, psnr: float) -> dict:
    return {"method": method, "clip": clip, "psnr_rgb": psnr, "ssim_rgb": psnr / 100, "niqe": None}


def test_gains_are_paired_and_by_kind():
    clips = {"box-1_a": 20.0, "bunny-1_a": 30.0}
    rows = [row("LQ", clip, value) for clip, value in clips.items()]
    rows += [row("ours", "box-1_a", 21.0), row("ours", "bunny-1_a", 30.5)]
    found = table.gains(rows, "ours", "LQ", held_out.KINDS)
    assert found["psnr_rgb"]["mean"] == 0.75 and found["niqe"]["mean"] is None
    assert table.gains(rows, "ours", "LQ", ("animation",))["psnr_rgb"]["mean"] == 0.5
    lines = table.gain_lines(rows, ["ours"])
    assert lines[2].startswith("| ours | all | +0.75 ± 0.25 |") and lines[5] == "| ours | pan | – | – | – |"


def test_the_best_filter_is_the_one_nearest_to_the_truth(tmp_path):
    rng = np.random.default_rng(0)
    truth = [frame[:64, :96] for frame in decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=3)]
    for folder, noise in (("hq", 0), ("lq", 12)):
        (tmp_path / folder).mkdir()
        with encoding.VideoWriter(str(tmp_path / folder / "a.mkv"), 25, 96, 64, codec="ffv1") as writer:
            for frame in truth:
                noisy = frame + rng.normal(0, noise, frame.shape) if noise else frame
                writer.write(np.clip(noisy, 0, 255).round().astype(np.uint8))
    best, means = table.best_filter(tmp_path)
    assert means[best] == max(means.values()) > means["none"] and best != "none"
