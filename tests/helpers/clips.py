"""Small real clips for tests, and what is in them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.video import decoding, encoding

MEDIA = Path(__file__).resolve().parents[2] / "demo" / "media"


def make_video(path: Path, frames: list[np.ndarray], stamps: list[int] | None = None) -> None:
    height, width = frames[0].shape[:2]
    with encoding.VideoWriter(
        str(path), Fraction(24000, 1001), width, height, time_base=Fraction(1, 24000)
    ) as out:
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
