"""Any command that reads a folder and writes a folder is run, checked and measured."""

from pathlib import Path

import pytest

from benchmarks.peers import folders
from pipeline.evaluation import comparison_tables, peers
from pipeline.evaluation.peers import PeerConfig
from pipeline.store import storage
from pipeline.video import decoding
from tests.helpers.clips import MEDIA, make_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One clip of 4 frames, 32x48, in a subfolder."""
    frames = decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=4)
    make_video(tmp_path / "lq" / "sub" / "a.mkv", [frame[:32, :48] for frame in frames])
    return tmp_path


def test_a_baseline_is_run_and_measured(folder):
    cost = peers.run(PeerConfig(str(folder / "lq"), str(folder / "out"), method="bicubic", scale=2))
    frames = list(decoding.decode_frames(str(folder / "out" / "sub" / "a.mkv")))
    assert len(frames) == cost["frames"] == 4 and frames[0].shape == (64, 96, 3)
    assert cost["seconds_per_frame"] > 0 and cost["peak_memory_gib"] > 0.01 and cost["parameters_m"] == 0
    assert storage.read_json(f"file://{folder}/out/_peer.json") == cost
    (line,) = comparison_tables.markdown_costs({"bicubic": peers.cost_of(f"file://{folder}/out"), "x": None})[
        4:5
    ]
    assert line.startswith(f"| bicubic | {cost['seconds_per_frame']:.3f} |")


@pytest.mark.parametrize("scale", [1, 4])
def test_another_networks_results_have_the_size_that_was_asked_for(folder, scale):
    def four_times(frames):
        for frame in frames:
            yield frame.repeat(4, axis=0).repeat(4, axis=1)

    folders.upscale_folder(folder / "lq", folder / "out", scale, four_times)
    made = list(decoding.decode_frames(str(folder / "out" / "sub" / "a.mkv")))
    given = list(decoding.decode_frames(str(folder / "lq" / "sub" / "a.mkv")))
    assert len(made) == 4 and made[0].shape == (32 * scale, 48 * scale, 3)
    assert all((one[::scale, ::scale] == other).all() for one, other in zip(made, given, strict=True))


def test_a_command_of_ones_own_that_fails_or_leaves_nothing_says_so(folder):
    config = PeerConfig(str(folder / "lq"), str(folder / "none"), command="true {input} {output}")
    with pytest.raises(ValueError, match="it left no video and no image"):
        peers.run(config)
    config = PeerConfig(str(folder / "lq"), str(folder / "none"), command="false {input}")
    with pytest.raises(ValueError, match="status 1 from: false "):
        peers.run(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give either method"),
        ({"method": "magic"}, "method: 'magic' is none of bicubic, median, ours, Real-ESRGAN"),
        ({"method": "Real-ESRGAN"}, "weights: this command needs them; see https://github.com"),
        ({"method": "bicubic", "input": "s3://bucket/lq"}, "input: commands read and write local folders"),
    ],
)
def test_wrong_configs_name_their_key(wrong, message):
    with pytest.raises(ValueError, match=message):
        PeerConfig(**{"input": "/lq", "output": "/out", **wrong})


def test_every_command_has_its_source_and_can_be_filled_in():
    values = {"input": "a", "output": "b", "scale": 4, "weights": "w", "python": "python", "root": "r"}
    for name, about in peers.known().items():
        filled = about["command"].format(**values)
        assert {"a", "b"} <= {part[-1] for part in filled.split()} and about["source"], name
