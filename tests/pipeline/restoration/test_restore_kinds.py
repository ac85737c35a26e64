"""Every kind of video and image that people have comes out with its size, length, time stamps and sound."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.restoration import restore
from pipeline.restoration.restore import Encoding, RestoreActor, RestoreConfig, Sampling
from pipeline.video import decoding, muxing
from pipeline.weights.backbones import ModelConfig
from tests.helpers import tiny_models
from tests.helpers.clips import MEDIA, cut_with_sound, packets

SAMPLING = Sampling(steps=1, chunk_frames=9, overlap_frames=4, slice_frames=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("weights")
    return ModelConfig(tiny_models.save_dit(root / "dit"), vae=tiny_models.save_vae(root / "vae"))


@pytest.fixture(scope="module")
def actor(models: ModelConfig) -> RestoreActor:
    """One pair of loaded models for all files."""
    return RestoreActor(settings(models, Path("/nowhere"), Path("/nowhere")))


def settings(models: ModelConfig, source: Path, target: Path, **changes) -> RestoreConfig:
    config = RestoreConfig(
        input=f"file://{source}",
        output=f"file://{target}",
        model=models,
        sampling=SAMPLING,
        memory_gib=8,
        previews=0,
    )
    return dataclasses.replace(config, **changes)


def restored(actor: RestoreActor, source: Path, **changes) -> tuple[dict, str]:
    """(manifest row, local path of the result)."""
    models = actor.config.model
    config = settings(models, source, source.parent / "out", **changes)
    actor.config = config
    (row,) = restore.list_inputs(config)
    result = actor({**row, "preview": False, "fingerprint": restore.fingerprint(config, row)})["result"]
    assert result["error"] is None, result["error"]
    return result, result["output"].removeprefix("file://")


@pytest.fixture(scope="module")
def real() -> list[np.ndarray]:
    return list(decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=40))


def write(
    path: Path,
    frames: list[np.ndarray],
    stamps: list[int] | None = None,
    prepare: Callable | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Frames as H.264 with time stamps in 1/1000 s."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if prepare is not None:
            prepare(stream)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format=pix_fmt)
            picture.pts = stamps[index] if stamps else index * 40
            picture.time_base = Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def seconds(path: Path | str) -> list[float]:
    about = decoding.probe(str(path))
    stamps = [stamp for stamp, _ in muxing.stamped_frames(str(path))]
    return [float((stamp - stamps[0]) * about.time_base) for stamp in stamps]


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("size", [(37, 53), (54, 38)], ids=["odd", "portrait"])
def test_lengths_and_small_sizes(actor, real, tmp_path, size, count):
    height, width = size
    odd = width % 2 or height % 2
    frames = [resized(frame, *size) for frame in real[:count]]
    source = write(tmp_path / "a.mp4", frames, pix_fmt="yuv444p" if odd else "yuv420p")
    row, path = restored(actor, source)
    about = decoding.probe(path)
    assert (about.height, about.width, row["frames"]) == (height, width, count)
    assert seconds(path) == pytest.approx(seconds(source), abs=1e-6)


@pytest.mark.slow
def test_full_high_definition(actor, real, tmp_path):
    source = write(tmp_path / "a.mp4", [resized(real[0], 1080, 1920)] * 2)
    row, path = restored(actor, source)
    assert row["output_size"] == [1080, 1920] and len(list(decoding.decode_frames(path))) == 2


def test_rotated_video_comes_out_as_it_is_shown(actor, real, tmp_path):
    frames = [resized(frame, 36, 64) for frame in real[:3]]
    source = write(tmp_path / "a.mp4", frames, prepare=lambda stream: stream.set_display_rotation(-90))
    _, path = restored(actor, source)
    about = decoding.probe(path)
    assert (about.height, about.width, about.rotation) == (64, 36, 0)


def test_variable_frame_rate_is_kept_to_the_tick(actor, real, tmp_path):
    stamps = [0, 10, 90, 91, 200, 1000, 1033, 1066, 1099, 1500, 1540, 1541, 1600]
    source = write(tmp_path / "a.mp4", [resized(frame, 36, 64) for frame in real[:13]], stamps)
    _, path = restored(actor, source)
    assert seconds(path) == [stamp / 1000 for stamp in stamps]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_two_tracks_of_sound_are_copied_bit_by_bit(actor, tmp_path, ending):
    source = tmp_path / f"a.{ending}"
    cut_with_sound(source, 10, tracks=2)
    row, path = restored(actor, source)
    assert (row["streams_copied"], row["streams_left"]) == (2, 0)
    assert packets(path) == packets(str(source))
    with av.open(path) as opened:
        assert len(opened.streams.audio) == 2


def test_subtitles_languages_titles_and_chapters_come_along(actor, tmp_path):
    plain, source = tmp_path / "plain.mp4", tmp_path / "a.mkv"
    cut_with_sound(plain, 10, tracks=1)
    subtitles = tmp_path / "words.srt"
    subtitles.write_text("1\n00:00:00,000 --> 00:00:00,300\nA line of words\n")
    with av.open(str(plain)) as film, av.open(str(subtitles)) as words, av.open(str(source), "w") as out:
        streams = {}
        for stream in (*film.streams, *words.streams):
            copy = out.add_stream_from_template(stream)
            copy.metadata["language"] = "fre"
            streams[id(stream)] = copy
        out.metadata["title"] = "A title"
        out.set_chapters(
            [{"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}]
        )
        for opened in (film, words):
            for packet in opened.demux():
                if packet.dts is not None:
                    packet.stream = streams[id(packet.stream)]
                    out.mux(packet)
    row, path = restored(actor, source)
    # SubRip does not fit into mp4: the video moves to Matroska.
    assert path.endswith(".mkv") and (row["streams_copied"], row["streams_left"]) == (2, 0)
    with av.open(path) as opened:
        (subtitle,), (sound,) = opened.streams.subtitles, opened.streams.audio
        assert subtitle.metadata["language"] == sound.metadata["language"] == "fre"
        assert opened.metadata["title"] == "A title" and opened.chapters()[0]["metadata"]["title"] == "One"
        assert b"A line of words" in next(bytes(p) for p in opened.demux(subtitle))


def test_colours_are_tagged_and_coded_as_in_the_source(actor, real, tmp_path):
    def old_television(stream) -> None:
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 6, 6, 6, 2

    source = write(tmp_path / "a.mp4", [resized(frame, 36, 64) for frame in real[:3]], prepare=old_television)
    _, path = restored(actor, source, sampling=dataclasses.replace(SAMPLING, color_fix="wavelet"))
    before, after = decoding.probe(str(source)), decoding.probe(path)
    assert before.color_primaries == "smpte170m" and before.full_range
    for key in ("color_primaries", "color_transfer", "color_matrix", "full_range"):
        assert getattr(after, key) == getattr(before, key), key
    means = [
        np.mean([frame for frame in decoding.decode_frames(str(name))], axis=(0, 1, 2))
        for name in (source, path)
    ]
    assert np.abs(means[0] - means[1]).max() < 6  # the colour fix holds the mean, if coding does


@pytest.mark.parametrize(
    ("codec", "ending", "pix_fmt"),
    [("h264", "mp4", "yuv420p10le"), ("h264", "mkv", "yuv420p10le"), ("prores", "mov", "yuv422p10le"),
     ("ffv1", "mkv", "gbrp10le")],
)  # fmt: skip
def test_ten_bits_and_codecs(actor, real, tmp_path, codec, ending, pix_fmt):
    source = write(tmp_path / "a.mp4", [resized(frame, 36, 64) for frame in real[:10]], pix_fmt="yuv420p10le")
    how = Encoding(codec, bits=10, container="mkv" if ending == "mkv" else "mp4")
    _, path = restored(actor, source, encoding=how)
    about = decoding.probe(path)
    assert path.endswith(ending) and (about.pix_fmt, about.bit_depth, about.fps) == (pix_fmt, 10, 25)
    assert seconds(path) == pytest.approx(seconds(source), abs=6e-4 if ending == "mkv" else 1e-6)


def test_a_sequence_of_images_is_a_video_and_can_come_out_as_one(actor, real, tmp_path):
    folder = tmp_path / "in" / "shot"
    folder.mkdir(parents=True)
    for index, frame in enumerate(real[:11]):
        Image.fromarray(resized(frame, 36, 64)).save(folder / f"frame_{index}.png")  # 10 after 9, not after 1
    lossless = Encoding("ffv1")
    row, path = restored(actor, tmp_path / "in", sequence_fps=12.5, encoding=lossless)
    about = decoding.probe(path)
    assert row["name"] == "shot" and row["frames"] == 11 and about.fps == Fraction(25, 2)
    video = list(decoding.decode_frames(path))
    _, pictures = restored(actor, tmp_path / "in", sequence_fps=12.5, encoding=Encoding("png"))
    files = sorted(Path(pictures).glob("*.png"))
    assert [file.name for file in files] == [f"{index:08d}.png" for index in range(1, 12)]
    for index, file in enumerate(files):
        assert np.array_equal(decoding.load_image(str(file)), video[index]), f"frame {index}"


def test_images_keep_their_kind(actor, real, tmp_path):
    picture = resized(real[0], 37, 53)
    alpha = np.zeros((37, 53), np.uint8)
    alpha[:, 20:] = 255
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "alpha.png")
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.jpg")
    _, path = restored(actor, tmp_path / "alpha.png", scale=2)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("RGBA", (106, 74))
        mask = np.asarray(image)[:, :, 3]
        assert mask[:, :30].max() == 0 and mask[:, 50:].min() == 255
    _, path = restored(actor, tmp_path / "grey.jpg", scale=2)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("L", (106, 74))
