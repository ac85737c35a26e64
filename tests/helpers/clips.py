"""Small clips for tests, real ones and odd ones, and what is in them."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from pipeline.video import decoding, encoding

MEDIA = Path(__file__).resolve().parents[2] / "demo" / "media"


def moving_picture(count: int = 30, height: int = 144, width: int = 256) -> list[np.ndarray]:
    """A pan over a rough texture."""
    rng = np.random.default_rng(0)
    rough = rng.integers(40, 216, (6, 8, 3), dtype=np.uint8)
    base = cv2.resize(rough, (width + 2 * count, height + count), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(base[i : i + height, 2 * i : 2 * i + width]) for i in range(count)]


def encode(path: Path, codec: str, pix_fmt: str, options: dict[str, str], prepare=None, frames=None) -> str:
    """A video at 25 fps in any codec, `moving_picture` by default; `prepare` gets its stream."""
    frames = frames or moving_picture()
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pix_fmt
        if prepare:
            prepare(stream)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return str(path)


def make_video(path: Path, frames: list[np.ndarray], stamps: list[int] | None = None) -> None:
    """A video by our own writer: FFV1 in a .mkv, else H.264. stamps: in 1/24000 s, else 24000/1001 fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    codec = "ffv1" if path.suffix == ".mkv" else "h264"
    rate, time_base = Fraction(24000, 1001), Fraction(1, 24000)
    with encoding.VideoWriter(str(path), rate, width, height, codec, time_base=time_base) as out:
        for index, frame in enumerate(frames):
            out.write(frame, stamps[index] if stamps else index * 1001)


def packets(path: str) -> list[bytes]:
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(container.streams.audio[0]) if packet.size]


def cut_with_sound(path: Path, count: int = 9, tracks: int = 2) -> None:
    """The first frames of the bundled trailer, small, with its own sound, in so many tracks."""
    pictures = path.with_name("pictures.mp4")
    small = [
        frame[:48:2, :64:2]
        for frame in decoding.decode_frames(str(MEDIA / "trailer_bbb.mp4"), max_frames=count)
    ]
    make_video(pictures, small)
    with (
        av.open(str(MEDIA / "trailer_bbb.mp4")) as source,
        av.open(str(pictures)) as video,
        av.open(str(path), "w") as out,
    ):
        picture = out.add_stream_from_template(video.streams.video[0])
        sounds = [out.add_stream_from_template(source.streams.audio[0]) for _ in range(tracks)]
        for packet in video.demux(video.streams.video[0]):
            if packet.dts is not None:
                packet.stream = picture
                out.mux(packet)
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is None or packet.dts * packet.time_base > max(1, count / 24):
                break
            for sound in sounds:
                packet.stream = sound
                out.mux(packet)
    pictures.unlink()


def odd_files(folder: Path) -> dict[str, str]:
    """A folder with one file of each odd kind; file name -> a word of the error expected, '' for none."""
    whole = Path(encode(folder / "plain.mp4", "libx264", "yuv420p", {})).read_bytes()
    encode(folder / "one_frame.mp4", "libx264", "yuv420p", {}, frames=moving_picture(1))
    encode(folder / "ten_bit.mkv", "libx265", "yuv420p10le", {"x265-params": "log-level=none"})
    turn = {"prepare": lambda stream: stream.set_display_rotation(90), "frames": moving_picture(12)}
    encode(folder / "turned.mp4", "libx264", "yuv420p", {}, **turn)
    make_video(folder / "odd_size.mp4", moving_picture(10, 273, 641))
    stream = Path(encode(folder / "cut_stream.ts", "mpeg2video", "yuv420p", {"g": "6"}))
    stream.write_bytes(stream.read_bytes()[: stream.stat().st_size * 2 // 3])
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video\n" * 30)
    (folder / "empty.mp4").touch()
    picture = Image.fromarray(moving_picture(1)[0])
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("RGBA").save(folder / "alpha.png")
    (folder / "cut.jpg").write_bytes((folder / "grey.jpg").read_bytes()[:2000])
    (folder / "plain.txt").write_text("a pan over a rough texture\n")
    (folder / "odd_size.json").write_text(json.dumps({"caption": "odd", "license": "CC0"}))
    (folder / "notes.md").write_text("ignored")
    errors = {"cut.mp4": "moov", "text.mp4": "FFmpeg", "empty.mp4": "empty", "cut.jpg": "decoded"}
    good = "plain.mp4 one_frame.mp4 ten_bit.mkv turned.mp4 odd_size.mp4 cut_stream.ts grey.jpg alpha.png"
    return {**dict.fromkeys(good.split(), ""), **errors}
