"""What these programs share: every video and image of a folder through a function, into another folder.

Light: beside this only PyAV, OpenCV, Pillow and numpy, so that it also runs in the reference environment.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.video import decoding, encoding

ENDINGS = frozenset({".mkv", ".mp4", ".mov", ".avi", ".webm", ".png", ".jpg", ".jpeg", ".bmp", ".webp"})


def arguments(description: str | None) -> argparse.Namespace:
    """INPUT OUTPUT WEIGHTS SCALE."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("input", type=Path, help="folder with videos and images")
    parser.add_argument("output", type=Path, help="folder for the results, named as the inputs")
    parser.add_argument("weights", type=Path, help="where the published weights are")
    parser.add_argument("scale", type=float, help="size of the result over that of the input")
    return parser.parse_args()


def upscale_folder(
    source: Path, target: Path, scale: float, network: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
) -> None:
    """Pass each file's frames through `network` and write the result losslessly (.mkv, .png).

    A network whose own factor differs from `scale` has its result resized (area, cubic) to exactly `scale`
    times the input.
    """
    for file in sorted(source.rglob("*")):
        if file.suffix.lower() not in ENDINGS:
            continue
        about = decoding.probe(str(file))
        width, height = round(about.width * scale), round(about.height * scale)
        path = target / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = (sized(frame, width, height) for frame in network(decoding.decode_frames(str(file))))
        if about.media == "image":
            cv2.imwrite(str(path.with_suffix(".png")), cv2.cvtColor(next(frames), cv2.COLOR_RGB2BGR))
            continue
        video = str(path.with_suffix(".mkv"))
        with encoding.VideoWriter(video, about.fps, width, height, codec="ffv1") as writer:
            for frame in frames:
                writer.write(frame)


def sized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """A uint8 (H, W, 3) frame at exactly this size."""
    if frame.shape[:2] == (height, width):
        return frame
    how = cv2.INTER_AREA if width < frame.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(frame, (width, height), interpolation=how)


def to_unit(frame: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (H, W, 3) -> fp32 (1, 3, H, W) in 0 to 1."""
    return torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255


def to_frame(picture: Tensor) -> np.ndarray:
    """(1, 3, H, W) in 0 to 1 -> uint8 (H, W, 3)."""
    scaled = (picture[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).cpu().numpy()
