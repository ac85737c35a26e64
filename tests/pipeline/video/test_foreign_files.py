"""Damaged and malicious files: no crash, no hang, every file is in one row with a readable reason."""

import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import ingest, shots
from pipeline.data.ingest import IngestConfig
from pipeline.store import schema
from pipeline.video.sandbox import Sandbox
from tests.helpers import bad_decoders
from tests.helpers.clips import encode, moving_picture, odd_files

MUTANTS = 300
SEED = 6


def originals(folder: Path) -> list[Path]:
    """Small sound files of several containers and codecs."""
    folder.mkdir()
    few = moving_picture(10, 96, 128)
    made = [
        encode(folder / "h264.mp4", "libx264", "yuv420p", {}, frames=few),
        encode(folder / "h265.mkv", "libx265", "yuv420p", {"x265-params": "log-level=none"}, frames=few),
        encode(folder / "vp9.webm", "libvpx-vp9", "yuv420p", {}, frames=few),
        encode(folder / "mpeg2.ts", "mpeg2video", "yuv420p", {}, frames=few),
        encode(folder / "mpeg4.avi", "mpeg4", "yuv420p", {}, frames=few),
        encode(folder / "prores.mov", "prores_ks", "yuv422p10le", {}, frames=few),
    ]
    for name in ("picture.jpg", "picture.png", "picture.webp"):
        Image.fromarray(few[0]).save(folder / name)
    few[0].tofile(folder / "noise.mp4")
    return [Path(path) for path in made] + sorted(folder.glob("picture.*")) + [folder / "noise.mp4"]


def mutate(data: bytes, kind: str, draw: np.random.Generator) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    if kind == "truncation":
        return data[: int(draw.integers(1, len(data)))]
    if kind == "bit flips":
        where = draw.integers(0, len(data), int(draw.integers(1, 1 + len(data) // 200)))
        np.bitwise_xor.at(changed, where, (1 << draw.integers(0, 8, len(where))).astype(np.uint8))
    elif kind == "header damage":
        end = min(len(data), 600)
        where = draw.integers(0, end, int(draw.integers(1, 60)))
        changed[where] = draw.integers(0, 256, len(where))
    elif kind == "zero bytes":
        start = int(draw.integers(0, len(data)))
        changed[start : start + int(draw.integers(1, len(data)))] = 0
    return changed.tobytes()


def mutants(folder: Path, sound: list[Path]) -> None:
    """MUTANTS files from a seed; a fifth of them under another kind's ending."""
    draw = np.random.default_rng(SEED)
    kinds = ("truncation", "bit flips", "header damage", "zero bytes", "wrong extension")
    endings = [path.suffix for path in sound]
    for number in range(MUTANTS):
        original, kind = sound[number % len(sound)], kinds[number // len(sound) % len(kinds)]
        ending = original.suffix
        if kind == "wrong extension":
            ending = str(draw.choice([other for other in endings if other != ending]))
        data = mutate(original.read_bytes(), kind, draw)
        (folder / f"{number:03d}_{kind.replace(' ', '_')}_{original.stem}{ending}").write_bytes(data)


def forged(folder: Path) -> list[str]:
    """Headers that claim 16384x16384 pixels, 400 to 800 MB a frame."""
    (folder / "forged.y4m").write_bytes(
        b"YUV4MPEG2 W16384 H16384 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(5000)
    )
    vp8 = bytes([0x10, 2, 0, 0x9D, 0x01, 0x2A]) + struct.pack("<HH", 16383, 16383) + bytes(200)
    head = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, b"VP80", 16384, 16384, 25, 1, 1, 0)
    (folder / "forged.ivf").write_bytes(head + struct.pack("<IQ", len(vp8), 0) + vp8)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", 16384, 16384, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "forged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return ["forged.y4m", "forged.ivf", "forged.png"]


class BadDecoder(Sandbox):
    """Its decoder hangs or dies on files of these names."""

    def stream(self, function, *args, **kwargs):
        name = Path(args[0]).name
        bad = {"hangs.mp4": bad_decoders.hang, "dies.mp4": bad_decoders.die}.get(name, function)
        return super().stream(bad, *args, **kwargs)


def rows_by_file(folder: Path, sandbox: Sandbox, **changes) -> tuple[dict[str, list[dict]], float]:
    """(rows of clips/ by file, the longest time that a file took)."""
    config = IngestConfig(input=str(folder), output="/nowhere", min_clip_frames=1, **changes)
    found, slowest = {}, 0.0
    for source in ingest.list_sources(config):
        start = time.monotonic()
        found[source["path"]] = ingest.ingest_source(source, config, sandbox)
        slowest = max(slowest, time.monotonic() - start)
    return found, slowest


def check(found: dict[str, list[dict]], slowest: float) -> None:
    assert slowest < 30
    for name, rows in found.items():
        assert rows, name
        for row in rows:
            assert set(row) == set(schema.CLIPS_SCHEMA.names)
        errors = [row["error"] for row in rows if row["error"] is not None]
        # Damage that looks like a cut makes two clips of a file; an error is its only row.
        assert not errors or len(rows) == 1, name
        for error in errors:
            assert 10 < len(error) < 300 and not re.search("Traceback|object at 0x|codec can't", error), error
            assert " " in error and not error.split(":")[0].endswith("Error"), f"{name}: {error}"


def test_hostile_headers_and_decoders_are_one_error_row_each(tmp_path):
    names = forged(tmp_path)
    for name in ("hangs.mp4", "dies.mp4", "fine.mp4"):
        encode(tmp_path / name, "libx264", "yuv420p", {}, frames=moving_picture(4, 96, 128))
    sandbox = BadDecoder(time_limit_s=6.0, memory_limit_bytes=3 * 2**30)
    found, slowest = rows_by_file(tmp_path, sandbox, time_limit_s=6.0)
    sandbox.close()
    check(found, slowest)
    for name in names:
        error = found[name][0]["error"]
        assert "pixels" in error or "Picture size 16384x16384" in error, error
    assert "longer than the limit of 6 s" in found["hangs.mp4"][0]["error"]
    assert "crashed (SIGSEGV)" in found["dies.mp4"][0]["error"]
    assert found["fine.mp4"][0]["error"] is None  # after both, the next file works


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hundred_mutated_files_are_each_accounted_for(tmp_path):
    sound = originals(tmp_path / "sound")
    folder = tmp_path / "mutants"
    folder.mkdir()
    mutants(folder, sound)
    odd_files(folder)
    sandbox = Sandbox(time_limit_s=20.0, memory_limit_bytes=3 * 2**30)
    found, slowest = rows_by_file(folder, sandbox, time_limit_s=20.0)
    sandbox.close()
    check(found, slowest)
    listed = [path for path in folder.iterdir() if path.suffix not in (".txt", ".json", ".md")]
    assert len(found) == len(listed) == MUTANTS + 12
    broken = sum(rows[0]["error"] is not None for rows in found.values())
    assert MUTANTS / 4 < broken < MUTANTS * 0.9  # some damage bites, some is played over
    ids = [row["clip_id"] for rows in found.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_the_span_of_a_forged_duration_is_not_planned():
    assert shots.spans(0, 1e12, 300.0, shots.Fraction(1, 25)) == [0]
