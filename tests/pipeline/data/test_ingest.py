"""Every file below the input is accounted for in clips/, whatever it is; running again only adds."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data import ingest, shots
from pipeline.data.filter import FilterConfig
from pipeline.data.ingest import IngestConfig
from pipeline.store import delta_tables, parquet, schema, storage
from pipeline.video import decoding, encoding
from tests.helpers.clips import MEDIA, encode, moving_picture, odd_files
from tests.helpers.processes import ROOT, output_of


def rows_of(output: Path) -> list[dict]:
    table = delta_tables.read(f"file://{output}/clips")
    assert table is not None and table.schema.equals(schema.CLIPS_SCHEMA)
    return table.to_pylist()


def name_of(row: dict) -> str:
    return row["uri"].rsplit("/", 1)[1]


def test_every_odd_file_is_accounted_for_and_running_again_only_adds(local_ray, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    expected = odd_files(source)
    config = IngestConfig(
        input=str(source), output=str(output), sources_per_shard=4, dataset="odd", concurrency=2
    )
    summary = ingest.run(config)
    rows = rows_of(output)
    by_name = {name_of(row): row for row in rows}
    assert len(rows) == len(by_name) == len(expected) == summary.rows_in
    for name, word in expected.items():
        error = by_name[name]["error"]
        assert (word in error) if word else error is None, f"{name}: {error}"
    assert summary.errors == 4 and summary.rows_kept == 8
    assert summary.details["files ignored (not media by name)"] == 1

    assert by_name["one_frame.mp4"]["num_frames"] == 1
    assert by_name["ten_bit.mkv"]["bit_depth"] == 10
    odd = by_name["odd_size.mp4"]
    assert (odd["width"], odd["height"], odd["num_frames"]) == (641, 273, 10)
    assert (odd["caption"], odd["license"], odd["dataset"]) == ("odd", "CC0", "odd")
    assert by_name["plain.mp4"]["caption"] == "a pan over a rough texture"
    turned = by_name["turned.mp4"]
    assert (turned["width"], turned["height"], turned["rotation"]) == (144, 256, 270)
    assert 5 < by_name["cut_stream.ts"]["num_frames"] < 30
    assert by_name["grey.jpg"]["media"] == "image" and by_name["grey.jpg"]["num_frames"] == 1
    for row in rows:
        if row["error"] is None:  # each clip can be read as its row says
            path = storage.path_of(row["uri"])
            frames = decoding.read_frames(row, path, 0, row["num_frames"])
            assert frames.shape[1:3] == (row["height"], row["width"])

    again = ingest.run(config)
    assert again.already_done == len(expected) and again.bytes == 0
    assert rows_of(output) == rows
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(source / "new.png")
    more = ingest.run(config)
    assert more.details["new clips"] == 1
    ids = {row["clip_id"] for row in rows}
    assert {name_of(row) for row in rows_of(output) if row["clip_id"] not in ids} == {"new.png"}

    with pytest.raises(ValueError, match="other settings"):
        ingest.run(IngestConfig(input=str(source), output=str(output), max_clip_frames=33))


def test_clips_do_not_depend_on_where_the_input_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.mp4").write_bytes(b"x")
    listed = [
        list(ingest.list_sources(IngestConfig(input=str(tmp_path / place), output="/data")))
        for place in ("here", "there")
    ]
    assert listed[0][0]["source_id"] == listed[1][0]["source_id"]


def scan(path: str, **changes) -> list[dict]:
    cutting = IngestConfig(input="/x", output="/y", **changes).cutting
    probe = decoding.probe(path)
    source = shots.Source(probe.coded_size, probe.fps, probe.time_base)
    frames = np.concatenate([part["frames"] for part in shots.scan(path, 2**26, source)])
    return shots.cut(frames, cutting, source)


def test_shots_are_cut_where_the_picture_changes_and_to_length(tmp_path):
    one, two = moving_picture(40), [255 - frame[::-1] for frame in moving_picture(33)]
    black = [np.zeros_like(one[0])] * 10
    path = encode(tmp_path / "two.mp4", "libx264", "yuv420p", {}, frames=[*one, *two])
    assert [clip["num_frames"] for clip in scan(path)] == [40, 33]
    # The tail of 4 is under min_clip_frames and left out.
    assert [clip["num_frames"] for clip in scan(path, max_clip_frames=18)] == [18, 18, 18, 15]
    path = encode(tmp_path / "black.mp4", "libx264", "yuv420p", {}, frames=[*one, *black, *two])
    clips = scan(path)
    first = clips[0]
    assert first["num_frames"] <= 45 and clips[-1]["num_frames"] <= 45  # nothing spans the black
    assert first["start_pts"] == 0 and not first["vfr"] and first["fps"] == 25


@pytest.mark.slow
def test_a_source_scanned_in_spans_gives_the_clips_of_one_pass(local_ray, tmp_path):
    (tmp_path / "in").mkdir()
    os.link(MEDIA / "trailer_bbb.mp4", tmp_path / "in/film.mp4")
    settings = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "max_clip_frames": 49}
    made = {}
    for segment_s in (300.0, 19.0, 11.0, 4.5):
        config = IngestConfig(**settings, segment_s=segment_s)
        (source,) = ingest.list_sources(config)
        made[segment_s] = ingest.ingest_source(source, config, ingest._sandbox(config))
    assert len(made[300.0]) > 20 and made[300.0][0]["error"] is None
    for segment_s, rows in made.items():
        assert rows == made[300.0], f"{segment_s} s"
    # Spans are kept until the clips are written: after a kill they are not scanned again.
    probe = decoding.probe(str(tmp_path / "in/film.mp4"))
    about = shots.Source(probe.coded_size, probe.fps, probe.time_base)
    begins = shots.spans(probe.start_pts, probe.duration_s, 11.0, probe.time_base)
    config = IngestConfig(**settings, segment_s=11.0)
    (tmp_path / "in/film.mp4").unlink()
    assert ingest.scan_span(source, about, begins[1], begins[2], config) is not None


def test_spans_that_disagree_where_they_overlap_are_not_joined(tmp_path):
    path = encode(tmp_path / "a.mp4", "libx264", "yuv420p", {"g": "25"}, frames=moving_picture(150, 96, 128))
    probe = decoding.probe(path)
    about = shots.Source(probe.coded_size, probe.fps, probe.time_base)
    ticks = round(3 / probe.time_base)

    def frames(*span: int | None) -> np.ndarray:
        return np.concatenate([part["frames"] for part in shots.scan(path, 2**26, about, *span)])

    parts = [frames(None, ticks), frames(ticks - round(2 / probe.time_base), None)]
    joined = shots.join(parts, [0, ticks], probe.time_base)
    assert joined is not None and np.array_equal(joined, frames())
    parts[1]["stamp"] += 1
    assert shots.join(parts, [0, ticks], probe.time_base) is None


MANIFESTS = {
    "webvid.csv": "videoid,contentUrl,duration,page_dir,name\n1066,https://x/1.mp4,PT0M10S,000_050,A cup\n",
    "openvid.csv": "video,caption,aesthetic score,fps,seconds\n000_050/1066.mp4,A cup,4.9,25,3.2\n",
    "plain.tsv": "path\ttext\tlicense\n./000_050/1066.mp4\tA cup\tCC0\n",
    "table.parquet": "",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_name_the_files_and_carry_the_captions(name, tmp_path):
    (tmp_path / "in/000_050").mkdir(parents=True)
    encode(tmp_path / "in/000_050/1066.mp4", "libx264", "yuv420p", {}, frames=moving_picture(12, 96, 128))
    encode(tmp_path / "in/unnamed.mp4", "libx264", "yuv420p", {}, frames=moving_picture(2, 96, 128))
    manifest = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(
            f"file://{manifest}",
            [pa.table({"path": ["000_050/1066.mp4"], "caption": ["A cup"], "score": [1.0]})],
            pa.schema([("path", pa.string()), ("caption", pa.string()), ("score", pa.float64())]),
        )
    else:
        manifest.write_text(MANIFESTS[name])
    config = IngestConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), manifest=str(manifest))
    (source,) = ingest.list_sources(config)
    (row,) = ingest.ingest_source(source, config, ingest._sandbox(config))
    assert row["error"] is None and row["num_frames"] == 12 and row["caption"] == "A cup"
    assert row["license"] == ("CC0" if name == "plain.tsv" else None)
    by_search = list(ingest.list_sources(IngestConfig(input=str(tmp_path / "in"), output="/out")))
    assert source["source_id"] in {other["source_id"] for other in by_search}  # the same clip either way


def test_what_a_manifest_names_wrongly_is_an_error_row(tmp_path):
    manifest = tmp_path / "files.csv"
    (tmp_path / "secret.mp4").write_text("x")
    (tmp_path / "in").mkdir()
    manifest.write_text("file_name,caption\ngone.mp4,\n../secret.mp4,\n")
    config = IngestConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), manifest=str(manifest))
    errors = [
        ingest.ingest_source(source, config, ingest._sandbox(config))[0]["error"]
        for source in ingest.list_sources(config)
    ]
    assert errors == ["there is no such file", "its path leads out of the input folder"]
    manifest.write_text("name,caption\na,b\n")
    with pytest.raises(ValueError, match=r"manifest: .* its columns are name, caption"):
        list(ingest.list_sources(config))


def test_interlaced_and_squeezed_pictures_and_sound_alone_are_told(tmp_path):
    def squeeze(stream) -> None:
        stream.sample_aspect_ratio = decoding.Fraction(4, 3)
        stream.codec_context.sample_aspect_ratio = decoding.Fraction(4, 3)

    encode(tmp_path / "squeezed.mkv", "libx264", "yuv420p", {}, prepare=squeeze)
    encode(tmp_path / "fields.ts", "mpeg2video", "yuv420p", {"flags": "+ildct+ilme", "top": "1"})
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        for start in range(0, 48000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    config = IngestConfig(input=str(tmp_path), output="/out")
    rows = {
        source["path"]: ingest.ingest_source(source, config, ingest._sandbox(config))[0]
        for source in ingest.list_sources(config)
    }
    assert rows["sound.mp4"]["error"] == "there is no video stream in it, only audio"
    squeezed = rows["squeezed.mkv"]
    assert (squeezed["width"], squeezed["height"], squeezed["sample_aspect"]) == (341, 144, "4/3")
    assert rows["fields.ts"]["interlaced"] and not squeezed["interlaced"]


def test_uneven_frame_times_are_noticed(tmp_path):
    path = str(tmp_path / "uneven.mkv")
    with encoding.VideoWriter(path, 25, 256, 144, time_base=decoding.Fraction(1, 1000)) as writer:
        for index, frame in enumerate(moving_picture(20)):
            writer.write(frame, pts=index * 40 + (60 if index >= 10 else 0))
    (clip,) = scan(path)
    assert clip["vfr"] and clip["fps"] == pytest.approx(19 / 0.82, rel=0.01)


def test_hashes_stay_when_a_picture_is_scaled_and_compressed(tmp_path):
    picture = decoding.load_image(str(MEDIA / "coffee.jpg"))
    Image.fromarray(picture).resize((300, 200)).save(tmp_path / "small.jpg", quality=40)
    one, small, other = (
        int(shots.scan_image(str(path), 2**26), 16)
        for path in (MEDIA / "coffee.jpg", tmp_path / "small.jpg", MEDIA / "cat.jpg")
    )
    assert (one ^ small).bit_count() <= 3 < 12 < (one ^ other).bit_count()


@pytest.mark.parametrize("job", ["ingest", "filter"])
def test_help_documents_every_field(job):
    text = output_of(f"jobs.{job}", "--help")
    for field in dataclasses.fields(IngestConfig if job == "ingest" else FilterConfig):
        option = text.split(f"--{field.name}", 1)
        assert len(option) == 2, field.name
        described = option[1].split("\n  --", 1)[0]
        assert len(described.split("(")[0].split()) > 4, f"{field.name} says too little: {described}"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--max_clip_framez", "9"], "max_clip_framez"),
        (["--max_clip_frames", "many"], "max_clip_frames"),
        (["--input", "relative/folder"], "input"),
        (["--min_clip_frames", "500"], "min_clip_frames"),
        (["--input", "/out/raw"], "input"),
        (["--manifest", "/in/files.xlsx"], "manifest"),
    ],
)
def test_a_wrong_config_stops_with_the_keys_name_before_ray_starts(arguments, key):
    command = [sys.executable, "-m", "jobs.ingest", "--input", "/in", "--output", "/out", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and key in done.stderr and "Started a local Ray" not in done.stderr
