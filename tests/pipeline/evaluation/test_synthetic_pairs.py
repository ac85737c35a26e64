"""Pairs: lossless files of what the degradation gives, the same from the same seed, all in the manifest."""

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from degradations.recipe import LIGHT, apply, from_json
from pipeline.evaluation.synthetic_pairs import (
    PairsConfig,
    clip_rows,
    make_pair,
    read_middle,
    run,
)
from pipeline.video import decoding
from tests.helpers.clips import MEDIA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A video, an image, a damaged file and a caption."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "inner").mkdir()
    shutil.copy(MEDIA / "cup.mp4", folder / "inner")
    shutil.copy(MEDIA / "cat.jpg", folder)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "inner" / "cup.txt").write_text("a cup")
    return folder


def config_of(folder: Path, output: Path, **changes) -> PairsConfig:
    settings = {"max_frames": 7, "max_height": 97, "max_width": 128, "seed": 3, **changes}
    return PairsConfig(output=f"file://{output}", folder=f"file://{folder}", **settings)


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(decoding.decode_frames(str(path))))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory, local_ray) -> Path:
    output = tmp_path_factory.mktemp("pairs")
    summary = run(config_of(folder, output))
    assert (summary.rows_in, summary.rows_kept, summary.errors) == (3, 2, 1)
    return output


def test_files_hold_exactly_what_the_manifest_says(folder, made):
    pairs = json.loads((made / "manifest.json").read_text())["pairs"]
    assert [pair["source"] for pair in pairs] == ["broken.mp4", "cat.jpg", "cup.mp4"]
    assert "broken.mp4" in pairs[0]["error"] and "file" not in pairs[0]
    for pair, source, frames in ((pairs[1], "cat.jpg", 1), (pairs[2], "inner/cup.mp4", 7)):
        whole = frames_of(folder / source)
        first, (height, width) = (len(whole) - frames) // 2, whole.shape[1:3]
        top, left = (height - 97) // 2, (width - 128) // 2
        crop = whole[first : first + frames, top : top + 97, left : left + 128]
        assert (pair["frames"], pair["height"], pair["width"]) == crop.shape[:3]
        degraded = apply(from_json(json.dumps(pair["degradation"])), np.ascontiguousarray(crop))
        assert np.array_equal(frames_of(made / "hq" / pair["file"]), degraded.hq)
        assert np.array_equal(frames_of(made / "lq" / pair["file"]), degraded.lq)
        assert pair["measured"] == degraded.measured
    assert len(pairs[2]["measured"]) == 2  # drawn and measured rate of both codecs
    assert {"drawn_bits_per_pixel", "measured_bits_per_pixel"} <= set(pairs[2]["measured"][0])


def test_same_seed_same_bytes_and_another_seed_others(folder, made, tmp_path):
    def files(output: Path) -> dict[str, bytes]:
        return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("?q/*")}

    outputs = {}
    for seed in (3, 4):
        config = config_of(folder, tmp_path / str(seed), seed=seed)
        for row in clip_rows(config):
            make_pair(row, config)
        outputs[seed] = files(tmp_path / str(seed))
    assert len(outputs[3]) == 4 and outputs[3] == files(made)
    assert set(outputs[3]) == set(outputs[4])
    assert all(outputs[3][name] != outputs[4][name] for name in outputs[3] if name.startswith("lq"))
    assert all(outputs[3][name] == outputs[4][name] for name in outputs[3] if name.startswith("hq"))


def test_what_is_there_stays_and_what_is_missing_comes_back(folder, made):
    lq = sorted((made / "lq").iterdir())
    times = [path.stat().st_mtime_ns for path in lq]
    manifest = (made / "manifest.json").read_bytes()
    (made / "manifest.json").unlink()
    run(config_of(folder, made))
    assert (made / "manifest.json").read_bytes() == manifest
    assert [path.stat().st_mtime_ns for path in lq] == times


@pytest.mark.parametrize("change", [{"seed": 4}, {"max_frames": 5}, {"video_recipe": LIGHT}])
def test_pairs_of_other_settings_do_not_mix(folder, made, change):
    with pytest.raises(ValueError, match=r"output: .*made with another seed, recipe or size"):
        run(config_of(folder, made, **change))


def test_a_clip_that_cannot_be_degraded_is_an_error_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("degradations.codecs._DECODERS", {})  # an FFmpeg without any codec
    config = config_of(folder, tmp_path)
    row = next(row for row in clip_rows(config) if row["uri"].endswith("cup.mp4"))
    assert "cup.mp4: encoder: " in make_pair(row, config)["error"]
    assert not list(tmp_path.glob("?q/*"))


def test_a_plain_path_names_the_same_clips(folder, tmp_path):
    config = config_of(folder, tmp_path)
    plain = dataclasses.replace(config, folder=f"{folder}/")
    assert clip_rows(plain) == clip_rows(config)


def test_images_and_short_clips_have_fewer_frames(folder):
    picture, kind, _ = read_middle({}, str(folder / "cat.jpg"), 9)
    assert kind == "image" and picture.shape == (1, *cv2.imread(str(folder / "cat.jpg")).shape)
    whole, kind, fps = read_middle({}, str(folder / "inner" / "cup.mp4"), 10_000)
    assert kind == "video" and fps > 1
    assert np.array_equal(whole, frames_of(folder / "inner" / "cup.mp4"))


@pytest.mark.parametrize("change", [{"max_frames": 0}, {"max_width": -1}])
def test_impossible_sizes_are_named(folder, tmp_path, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: .*at least 1"):
        config_of(folder, tmp_path, **change)
