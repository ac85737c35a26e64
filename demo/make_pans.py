"""Make the demo's pan clips: a slow camera move over a large photograph.

    python demo/make_pans.py --stills /usr/share/backgrounds --out demo/media

The photographs are those of Debian's package lomiri-wallpapers-16.04 (their licences are in
demo/media/ATTRIBUTION.md); the clips are kept in the repository, so this only has to run to remake
them. Each photograph is 3 to 10 times larger than the frame, so every frame is sharper than what a
video codec leaves of real footage, and the motion is known exactly. The same photograph always gives
the same pixels; the bytes of the file depend on the installed libx264.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

FRAME_WIDTH_PX, FRAME_HEIGHT_PX = 640, 360
NUM_FRAMES = 48
FRAMES_PER_SECOND = 24
CONSTANT_RATE_FACTOR = 17
# Frames are drawn twice as large and then averaged down: sub-pixel motion without aliasing.
SUPERSAMPLING = 2


@dataclass(frozen=True)
class View:
    """What one frame shows: centre and width as fractions of the photograph's width and height."""

    center_x: float
    center_y: float
    width: float


@dataclass(frozen=True)
class Pan:
    """A straight move from one view to another over one photograph."""

    clip: str
    still: str
    still_sha256: str
    start: View
    end: View


PANS = (
    Pan(
        "pan_stream.mp4",
        "life_by_Aitzol_Berasategi.jpg",
        "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05",
        View(0.36, 0.62, 0.50),
        View(0.58, 0.42, 0.50),
    ),
    Pan(
        "pan_mountains.mp4",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a",
        View(0.30, 0.40, 0.55),
        View(0.66, 0.44, 0.45),
    ),
    Pan(
        "pan_dogs.mp4",
        "friends_by_Aitzol_Berasategi.jpg",
        "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d",
        View(0.55, 0.55, 0.85),
        View(0.55, 0.32, 0.70),
    ),
    Pan(
        "pan_dandelions.mp4",
        "seeding_by_Clements_Engelhardt.jpg",
        "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f",
        View(0.55, 0.50, 0.75),
        View(0.40, 0.40, 0.45),
    ),
)


def read_still(path: Path, sha256: str) -> np.ndarray:
    """The photograph as uint8 `(H, W, 3)` RGB. Raises ValueError when it is another file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such photograph; point --stills at the folder that holds it")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: not the photograph this clip was made from (its sha256 differs)")
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def draw_frames(still: np.ndarray, pan: Pan) -> Iterator[np.ndarray]:
    """Yield the frames, uint8 `(360, 640, 3)`; speed follows half a cosine, so the move has no jerk."""
    drawn_width_px = FRAME_WIDTH_PX * SUPERSAMPLING
    drawn_height_px = FRAME_HEIGHT_PX * SUPERSAMPLING
    # Shrink first so that the narrower of the two views has one photograph pixel per drawn pixel.
    narrowest_px = min(pan.start.width, pan.end.width) * still.shape[1]
    shrink = min(1.0, drawn_width_px / narrowest_px)
    still = cv2.resize(still, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    height_px, width_px = still.shape[:2]
    for index in range(NUM_FRAMES):
        progress = 0.5 - 0.5 * np.cos(np.pi * index / (NUM_FRAMES - 1))
        center_x_px = width_px * (pan.start.center_x + progress * (pan.end.center_x - pan.start.center_x))
        center_y_px = height_px * (pan.start.center_y + progress * (pan.end.center_y - pan.start.center_y))
        view_width_px = width_px * (pan.start.width + progress * (pan.end.width - pan.start.width))
        step = view_width_px / drawn_width_px
        frame_to_still = np.array(
            [
                [step, 0, center_x_px - step * drawn_width_px / 2],
                [0, step, center_y_px - step * drawn_height_px / 2],
            ]
        )
        drawn = cv2.warpAffine(
            still,
            frame_to_still,
            (drawn_width_px, drawn_height_px),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        yield cv2.resize(drawn, (FRAME_WIDTH_PX, FRAME_HEIGHT_PX), interpolation=cv2.INTER_AREA)


def write_clip(frames: Iterator[np.ndarray], path: Path) -> None:
    """Encode RGB frames as H.264; one thread, since libx264's output depends on how many there are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = FRAME_WIDTH_PX, FRAME_HEIGHT_PX, "yuv420p"
        stream.options = {"crf": str(CONSTANT_RATE_FACTOR), "preset": "slow", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stills", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--out", type=Path, default=Path("demo/media"), help="folder for the clips")
    arguments = parser.parse_args()
    for pan in PANS:
        still = read_still(arguments.stills / pan.still, pan.still_sha256)
        write_clip(draw_frames(still, pan), arguments.out / pan.clip)
        print(f"{pan.clip}: {NUM_FRAMES} frames, {(arguments.out / pan.clip).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
