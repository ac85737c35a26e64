"""A restoration that is killed and started again gives the same file, bit for bit, without doing it all."""

import dataclasses
import pickle
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks import restore as benchmark
from pipeline.restoration import restore
from pipeline.restoration.restore import Encoding, RestoreActor, RestoreConfig, Sampling
from pipeline.store import storage
from pipeline.video import decoding, muxing
from pipeline.weights.backbones import ModelConfig
from tests import settings
from tests.helpers import processes, tiny_models
from tests.helpers.clips import cut_with_sound, packets
from tests.pipeline.restoration import restore_alone
from tests.pipeline.restoration.restore_alone import the_row

SAMPLING = Sampling(steps=4, chunk_frames=9, overlap_frames=4, slice_frames=4)
FRAMES = 41  # five chunks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("weights")
    return ModelConfig(tiny_models.save_dit(root / "dit"), vae=tiny_models.save_vae(root / "vae"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "clip.mp4"
    cut_with_sound(path, FRAMES, tracks=1)
    return path


def configured(models: ModelConfig, source: Path, target: Path, **changes) -> RestoreConfig:
    config = RestoreConfig(
        input=f"file://{source}",
        output=f"file://{target}",
        model=models,
        sampling=SAMPLING,
        scale=2,
        memory_gib=4,
    )
    return dataclasses.replace(config, **changes)


def restore_now(config: RestoreConfig, after_chunks: int | None = None) -> dict:
    """The manifest row; with after_chunks, the work is broken off before the chunk of that number."""
    actor = RestoreActor(config)
    denoise, seen = actor.restorer.denoise, []

    def counted(chunk):
        if len(seen) == after_chunks:
            raise BrokenOffError
        seen.append(chunk.start)
        return denoise(chunk)

    actor.restorer.denoise = counted  # type: ignore[method-assign]
    return actor(the_row(config))["result"]


class BrokenOffError(BaseException):
    """As sudden as a kill: nothing handles it."""


@pytest.mark.parametrize("codec", ["h264", "ffv1", "prores", "png"])
def test_broken_off_after_any_chunk_the_rest_gives_the_same_bytes(models, source, tmp_path, codec):
    how = Encoding(codec)
    once = restore_now(configured(models, source, tmp_path / "once", encoding=how))
    assert once["error"] is None and once["resumed_from_frame"] == 0
    config = configured(models, source, tmp_path / "again", encoding=how)
    for chunks in (1, 2) if codec == "h264" else (3,):
        with pytest.raises(BrokenOffError):
            restore_now(config, chunks)
    again = restore_now(config)
    assert again["error"] is None and again["resumed_from_frame"] > 4 and again["frames"] == FRAMES
    assert contents(tmp_path / "once") == contents(tmp_path / "again")


def contents(folder: Path) -> dict[str, bytes]:
    """Results and previews, not the bookkeeping."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert found
    return found


def test_what_was_made_in_another_way_is_not_mixed_in(models, source, tmp_path):
    config = configured(models, source, tmp_path)
    with pytest.raises(BrokenOffError):
        restore_now(config, 3)
    other = dataclasses.replace(config, sampling=dataclasses.replace(SAMPLING, seed=1))
    assert restore_now(other)["resumed_from_frame"] == 0


def start(config: RestoreConfig, file: Path) -> subprocess.Popen[str]:
    """A process that restores alone, as this file tells it."""
    file.write_bytes(pickle.dumps(config))
    program = "tests.pipeline.restoration.restore_alone"
    return processes.start(program, str(file), environment=settings.without_ray())


def wait_for_segments(process: subprocess.Popen, parts: Path, count: int) -> bool:
    """Until so many segments are there; False if the process ended before."""
    while process.poll() is None:
        if len(list(parts.glob("*/*.nut"))) >= count:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_killed_at_three_moments_the_result_is_the_same_bit_for_bit(models, source, tmp_path):
    restore_alone.run(configured(models, source, tmp_path / "once"))
    target, file = tmp_path / "killed", tmp_path / "config.pickle"
    config = configured(models, source, target)
    for count in (1, 2, 4):
        process = start(config, file)
        assert wait_for_segments(process, target / "_parts", count), "it ended before it could be killed"
        processes.kill_tree(process)
        assert not (target / "clip.mp4").exists()
    last = start(config, file)
    told, _ = last.communicate(timeout=300)
    assert last.returncode == 0, told[-3000:]
    killed = target / "clip.mp4"
    assert killed.read_bytes() == (tmp_path / "once" / "clip.mp4").read_bytes()
    assert packets(str(killed)) == packets(str(source))
    before, after = (stamps(path) for path in (source, killed))
    assert len(after) == FRAMES and after == before
    row = storage.read_json(restore.row_url(config, the_row(config)))
    assert row["error"] is None and row["resumed_from_frame"] > 0
    assert not list((target / "_parts").iterdir())


def stamps(path: Path) -> list[float]:
    """Seconds of every frame since the first."""
    about = decoding.probe(str(path))
    found = [stamp for stamp, _ in muxing.stamped_frames(str(path))]
    return [float((stamp - found[0]) * about.time_base) for stamp in found]


def test_out_of_memory_is_one_step_down_and_not_the_end(models, source, tmp_path, capsys):
    config = configured(models, source, tmp_path / "small")
    actor = RestoreActor(config)
    denoise, tried = actor.restorer.denoise, []

    def hungry(chunk):
        tried.append(len(chunk.latent))
        if len(tried) > 3 and len(chunk.latent) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(chunk)

    actor.restorer.denoise = hungry  # type: ignore[method-assign]
    row = actor(the_row(config))["result"]
    assert row["error"] is None and row["frames"] == FRAMES and row["plan"]["chunk_frames"] == 5
    said = capsys.readouterr().out
    assert "out of memory; trying again with less" in said and "expected peak" in said
    frames = list(decoding.decode_frames(str(tmp_path / "small" / "clip.mp4")))
    assert len(frames) == FRAMES and frames[0].shape == (48, 64, 3)


def test_what_never_fits_is_an_error_that_says_so(models, source, tmp_path):
    actor = RestoreActor(configured(models, source, tmp_path))

    def hopeless(chunk):
        raise torch.OutOfMemoryError("CUDA out of memory")

    actor.restorer.denoise = hopeless  # type: ignore[method-assign]
    row = actor(the_row(configured(models, source, tmp_path)))["result"]
    assert "out of memory with the smallest plan" in row["error"]


def test_a_state_of_ten_bits_is_read_as_ten_bits(models, source, tmp_path):
    """Sixteen-bit pictures have more levels than eight could hold."""
    config = configured(models, source, tmp_path, encoding=Encoding("png", bits=10), scale=None)
    restore_now(config)
    picture = cv2.imread(str(tmp_path / "clip" / "00000003.png"), cv2.IMREAD_UNCHANGED)
    assert picture.dtype == np.uint16 and len(np.unique(picture)) > 256


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(models, tmp_path, monkeypatch):
    """190 frames more take less than half of their own bytes: none of them is kept.

    benchmarks/restore.py has the ratio for long videos.
    """
    # Freed memory goes back at once: what is measured varies by 2 MiB, not by 20.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    urls, size, counts = (models.vae, models.weights), (96, 160), (60, 250)
    short, long = (
        benchmark.measured("ours", tmp_path, count, size, urls)["rise_of_peaks_mib"] for count in counts
    )
    frames_mib = (counts[1] - counts[0]) * size[0] * size[1] * 3 / 2**20
    assert long - short < frames_mib / 2
