"""Restoring real clips with tiny random weights: shapes, sound, time stamps, seeds, chunk borders, jobs."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.denoise import Prompt
from pipeline.data import discovery
from pipeline.restoration import restore
from pipeline.restoration.restore import Encoding, RestoreConfig, Restorer, Sampling
from pipeline.store import storage
from pipeline.video import decoding, encoding
from pipeline.video.muxing import stamped_frames
from pipeline.weights import weights_folder
from pipeline.weights.backbones import OWN, Backbone, ModelConfig
from tests.helpers import tiny_models
from tests.helpers.clips import MEDIA, cut_with_sound, make_video, packets

MODEL = ModelConfig("file:///d", vae="file:///v")
SAMPLING = Sampling(steps=2, chunk_frames=9, overlap_frames=4, slice_frames=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("weights")
    return ModelConfig(tiny_models.save_dit(root / "dit"), vae=tiny_models.save_vae(root / "vae"))


@pytest.fixture(scope="module")
def restorer(models: ModelConfig) -> Restorer:
    return Restorer.from_weights(models, SAMPLING, device="cpu")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """40 real frames with motion, 37x53."""
    return [
        frame[100:137, 200:253] for frame in decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=40)
    ]


def restored(restorer: Restorer, frames: list[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
    return np.concatenate(list(restorer.restore(frames, size)))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 9, 10, 23])
def test_as_many_frames_come_out_as_go_in(restorer: Restorer, frames: list[np.ndarray], count: int):
    out = restored(restorer, frames[:count])
    assert out.shape == (count, 37, 53, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (16, 16), (74, 106), (20, 30)])
def test_any_size_comes_out_whole(restorer: Restorer, frames: list[np.ndarray], size: tuple[int, int]):
    assert restored(restorer, frames[:5], size).shape == (5, *size, 3)


def test_no_frame_no_result(restorer: Restorer):
    assert list(restorer.restore([])) == []


def test_the_same_seed_gives_the_same_video(restorer, models, frames):
    once, again = restored(restorer, frames[:13]), restored(restorer, frames[:13])
    assert np.array_equal(once, again)
    other = Restorer.from_weights(models, Sampling(**{**vars(SAMPLING), "seed": 1}), device="cpu")
    assert not np.array_equal(once, restored(other, frames[:13]))


def test_the_slices_of_the_autoencoder_do_not_show(restorer, models, frames):
    whole = Restorer.from_weights(models, Sampling(**{**vars(SAMPLING), "slice_frames": 40}), device="cpu")
    difference = restored(restorer, frames).astype(int) - restored(whole, frames)
    assert np.abs(difference).max() <= 1  # rounding of equal pictures


def test_beginning_does_not_depend_on_what_follows(restorer, frames):
    """The first chunk is the same however long the video is: nothing is planned from the length."""
    assert np.array_equal(restored(restorer, frames[:40])[:13], restored(restorer, frames[:25])[:13])


def test_frames_are_taken_only_as_they_are_needed(restorer, frames):
    taken = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in frames * 3:
            taken += 1
            yield frame

    ahead = 0
    given = 0
    for piece in restorer.restore(counted()):
        given += len(piece)
        ahead = max(ahead, taken - given)
    assert given == 120
    assert ahead <= SAMPLING.chunk_frames + SAMPLING.slice_frames


class AgreeingNetwork(torch.nn.Module):
    """Answers with the low-quality latent and a part of the noise: chunks agree if their noise does."""

    def forward(self, video, text, video_shapes, text_lengths, timestep, pooled):
        noisy, condition = video[:, :16], video[:, 16:32]
        return noisy - (condition + 0.3 * noisy)


def test_chunks_that_agree_leave_no_trace(models, frames):
    """What only depends on latent frames and their noise is the same in many chunks and in a single one."""
    network = Backbone(AgreeingNetwork(), Prompt(torch.zeros(1, 1), None), None, OWN, shape_quirk=False)
    out = []
    for chunk_frames in (9, 41):
        sampling = Sampling(steps=1, chunk_frames=chunk_frames, overlap_frames=4, condition_noise=0)
        vae = weights_folder.load_vae(models.vae)
        out.append(restored(Restorer(vae, network, sampling, device="cpu"), frames).astype(int))
    assert np.abs(out[0] - out[1]).max() <= 1
    assert np.abs(np.diff(out[0], axis=0)).mean() > 1  # the noise does show


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_no_jump_where_chunks_meet(models, moving):
    """Energy of frame differences at chunk borders <= 1.1 times that elsewhere, plus half a grey level."""
    sampling = Sampling(steps=2, chunk_frames=21, overlap_frames=4)
    clip = [f[100:132, 200:232] for f in decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=101)]
    clip = clip if moving else clip[:1] * 101
    out = restored(Restorer.from_weights(models, sampling, device="cpu"), clip).astype(np.float64) / 255
    per_frame = ((out[1:] - out[:-1]) ** 2).mean(axis=(1, 2, 3))
    energy = per_frame.reshape(25, 4).mean(axis=1)  # from latent frame i to i + 1
    overlap = sampling.chunks.overlap
    starts = range(sampling.chunks.length - overlap, 25, sampling.chunks.length - overlap)
    borders = {start - 1 for start in starts} | {start - 1 + overlap for start in starts}
    # Before latent frame 10 the random decoder still sees the first frame's copies and is calmer.
    at_border = [energy[index] for index in range(10, 25) if index in borders]
    elsewhere = [energy[index] for index in range(10, 25) if index not in borders]
    assert len(at_border) >= 5 and len(elsewhere) >= 5
    assert np.mean(at_border) <= 1.1 * np.mean(elsewhere) + (0.5 / 255) ** 2


def test_colours_come_from_the_input(models, frames):
    """With the wavelet fix a grey input stays grey in the mean, whatever the random network paints."""
    grey = [np.full((64, 64, 3), 90, np.uint8)] * 5
    means = {}
    for method in ("wavelet", "adain", "none"):
        sampling = Sampling(**{**vars(SAMPLING), "color_fix": method})
        means[method] = restored(Restorer.from_weights(models, sampling, device="cpu"), grey).mean()
    assert abs(means["wavelet"] - 90) < 6 and abs(means["adain"] - 90) < 6
    assert abs(means["none"] - 90) > 6


def test_a_change_of_size_within_a_video_is_one_clear_line(restorer, frames):
    with pytest.raises(ValueError, match="from 53x37 to 30x20 at frame 3"):
        list(restorer.restore([*frames[:3], frames[3][:20, :30]]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk_frames": 8}, r"sampling\.chunk_frames: 8 is not 4n\+1"),
        ({"overlap_frames": 6}, r"sampling\.overlap_frames: 6 is not a multiple of 4"),
        ({"overlap_frames": 12}, r"sampling\.overlap_frames: 12 leaves nothing new"),
        ({"steps": 0}, r"sampling\.steps: 0"),
        ({"condition_noise": 2000}, r"sampling\.condition_noise: 2000"),
    ],
)
def test_wrong_settings_name_their_key(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**{**vars(SAMPLING), **wrong})


# --- files ---


@pytest.fixture(scope="module")
def job(models, frames, tmp_path_factory, local_ray) -> tuple[RestoreConfig, Path, Path]:
    """A folder of all kinds of files, restored once by the job."""
    root = tmp_path_factory.mktemp("restore")
    source, target = root / "in", root / "out"
    (source / "sub").mkdir(parents=True)
    make_video(source / "odd.mp4", frames[:7])
    make_video(source / "sub" / "portrait.mp4", [np.rot90(frame).copy() for frame in frames[:3]])
    stamps = [0, 900, 2500, 2600, 5000]
    make_video(source / "variable.mp4", frames[:5], stamps)
    Image.fromarray(frames[0]).save(source / "picture.jpg")
    (source / "text.mp4").write_text("not a video")
    (source / "notes.txt").write_text("not looked at")
    cut_with_sound(source / "sound.mkv")
    config = RestoreConfig(
        input=f"file://{source}",
        output=f"file://{target}",
        model=models,
        sampling=SAMPLING,
        scale=2,
    )
    restore.run(config)
    return config, source, target


def manifest(target: Path) -> dict[str, dict]:
    return {row["name"]: row for row in storage.read_json(f"file://{target}/manifest.json")}


def test_every_file_is_accounted_for(job):
    _, _, target = job
    rows = manifest(target)
    assert set(rows) == {"odd", "sub/portrait", "variable", "picture", "text", "sound"}
    assert [name for name, row in rows.items() if row["error"]] == ["text"]
    assert "text.mp4" in rows["text"]["error"]
    assert {"vae_sha256", "dit_sha256", "seed", "seconds", "fps"} <= set(rows["odd"])


def test_frames_sizes_and_time_stamps_are_kept(job):
    _, source, target = job
    for name, count, size in (
        ("odd", 7, (74, 106)),
        ("sub/portrait", 3, (106, 74)),
        ("variable", 5, (74, 106)),
    ):
        before = list(stamped_frames(str(source / f"{name}.mp4")))
        after = list(stamped_frames(str(target / f"{name}.mp4")))
        assert len(after) == len(before) == count
        assert after[0][1].shape[:2] == size
        bases = [decoding.probe(str(folder / f"{name}.mp4")) for folder in (source, target)]
        seconds = [
            [float((stamp - clip[0][0]) * about.time_base) for stamp, _ in clip]
            for clip, about in zip((before, after), bases, strict=True)
        ]
        assert seconds[1] == pytest.approx(seconds[0], abs=1e-4)
    assert decoding.probe(str(target / "odd.mp4")).fps == Fraction(24000, 1001)


def test_images_come_out_as_images(job):
    _, _, target = job
    assert decoding.load_image(str(target / "picture.png")).shape == (74, 106, 3)


def test_sound_is_copied_bit_by_bit(job):
    _, source, target = job
    row = manifest(target)["sound"]
    assert (row["streams_copied"], row["streams_left"]) == (2, 0)
    assert packets(storage.path_of(row["output"])) == packets(str(source / "sound.mkv"))


def test_running_again_does_only_what_is_missing(job):
    config, _, target = job
    stamps = {path: path.stat().st_mtime_ns for path in target.rglob("*.mp4")}
    lost = target / "odd.mp4"
    before = lost.read_bytes()
    lost.unlink()
    summary = restore.run(config)
    assert summary.already_done == 4 and summary.rows_in == 6 and summary.errors == 1
    assert lost.read_bytes() == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != lost)


def test_whatever_ingest_takes_is_restored_and_the_rest_is_named(tmp_path: Path, capsys):
    taken = [f"a{ending}" for ending in (".3gp", ".asf", ".ivf", ".m2ts", ".MTS", ".vob", ".wmv", ".png")]
    for name in (*taken, "notes.txt", "more.txt", "README"):
        (tmp_path / name).write_bytes(b"x")
    config = RestoreConfig(input=str(tmp_path), output="/out", model=MODEL)
    assert sorted(row["input"].rsplit("/")[-1] for row in restore.list_inputs(config)) == sorted(taken)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("left out: 3 files") and "2 .txt" in line and "1 without an ending" in line
    listing = discovery.Listing(f"file://{tmp_path}", "file:///out", [], None)
    assert sorted(row["path"] for row in listing) == sorted(taken) and listing.ignored == 1


def test_two_inputs_of_one_name_do_not_overwrite_each_other(tmp_path: Path):
    for name in ("a.mp4", "a.mov", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    config = RestoreConfig(
        input=[f"file://{tmp_path}"],
        output="file:///out",
        model=MODEL,
        sampling=SAMPLING,
    )
    assert sorted(row["name"] for row in restore.list_inputs(config)) == ["a.mov", "a.mp4", "b"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": "clips/a.mp4"}, "input: .* is relative"),
        ({"input": []}, "input: empty"),
        ({"scale": 2, "short_side": 720}, "scale, short_side, area, size"),
        ({"sampling": Sampling(guidance_scale=6.5)}, r"sampling\.guidance_scale"),
        ({"output": "https://host/out"}, "output: .* neither file:// nor s3://"),
    ],
)
def test_wrong_configs_name_their_key(wrong: dict, message: str):
    good = {"input": "file:///in", "output": "file:///out", "model": MODEL}
    with pytest.raises(ValueError, match=message):
        RestoreConfig(**{**good, **wrong})


def test_an_entry_in_the_table_of_codecs_is_a_codec(tmp_path: Path, monkeypatch, frames: list[np.ndarray]):
    """With no other change, videos are written in it, in the container that it says."""
    with pytest.raises(ValueError, match=r"encoding\.codec: 'mpeg4' is none of h264, prores, ffv1, png"):
        Encoding(codec="mpeg4")
    entry = encoding.Codec("mpeg4", lambda bits, odd: "yuv420p", always_deep=True, ending="mkv")
    monkeypatch.setitem(encoding.CODECS, "mpeg4", entry)
    how = Encoding(codec="mpeg4")
    assert how.endings[0] == "mkv" and how.deep
    with encoding.VideoWriter(str(tmp_path / "a.mkv"), 25, 53, 37, codec=how.codec) as out:
        out.write(frames[0])
    about = decoding.probe(str(tmp_path / "a.mkv"))
    assert (about.codec, about.bit_depth, about.width) == ("mpeg4", 8, 53)


def test_target_sizes():
    def size(height: int, width: int, **target):
        config = RestoreConfig(input="file:///in", output="file:///o", model=MODEL, **target)
        return config.output_size(height, width)

    assert size(37, 53) == (37, 53)
    assert size(37, 53, scale=2.5) == (92, 132)
    assert size(360, 640, short_side=720) == (720, 1280)
    assert size(640, 360, short_side=720) == (1280, 720)
    assert size(10, 10, size=(720, 1280)) == (720, 1280)
    with pytest.raises(ValueError, match="would become"):
        size(4000, 4000, scale=8)
