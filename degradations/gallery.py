"""A page that shows what the degradations do: `python -m degradations.gallery CLIP OUT.html`.

Each operation at low, middle and high strength as pictures; nine draws of each recipe as short
playable clips, next to the truth. Everything is inside the one file. `--pictures FOLDER` also writes
the sheets that the documentation shows.
"""

import argparse
import base64
import html
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.stream import VideoStream

from degradations.config import LIGHT, REALBASICVSR, REALESRGAN, OrderConfig, operation_configs
from degradations.operations import UnsharpMask
from degradations.operations.protocol import ClipOperation, Operation
from degradations.recipe import Degradation, apply, draw

SIDE_PX = 320
NUM_FRAMES = 21
Shown = list[tuple[str, np.ndarray]]
"""Captions and (H, W, 3) pictures."""


def read_clip(path: str, start_s: float) -> tuple[np.ndarray, float]:
    """(21, 320, 320, 3) uint8, the middle of the picture at half of 720 lines, and its rate."""
    frames: list[np.ndarray] = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 24)
        for picture in container.decode(stream):
            if (picture.time or 0.0) < start_s:
                continue
            frame: np.ndarray = picture.to_ndarray(format="rgb24")
            scale = 360 / min(frame.shape[:2])
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            top, left = (frame.shape[0] - SIDE_PX) // 2, (frame.shape[1] - SIDE_PX) // 2
            frames.append(frame[top : top + SIDE_PX, left : left + SIDE_PX])
            if len(frames) == NUM_FRAMES:
                return np.stack(frames), fps
    raise ValueError(f"{path}: only {len(frames)} frames from {start_s} s on; the gallery needs {NUM_FRAMES}")


def operation_rows(clip: np.ndarray, fps: float) -> list[tuple[str, Shown]]:
    """Each operation at low, middle and high strength, on the middle frame."""
    frame = clip[len(clip) // 2]
    rows: list[tuple[str, Shown]] = [
        ("Truth, and sharpened", [("truth", frame), ("unsharp mask", UnsharpMask().apply(frame))])
    ]
    for config in operation_configs(OrderConfig):
        for example in config.examples(clip, fps):
            rows.append((example.title, [_shown(caption, chain, clip) for caption, chain in example.chains]))
    return rows


def _shown(caption: str, chain: Sequence[Operation], clip: np.ndarray) -> tuple[str, np.ndarray]:
    """The middle frame after a chain of operations; only what works on whole clips sees all of them."""
    frames, middle = [clip[len(clip) // 2]], 0
    if any(isinstance(operation, ClipOperation) for operation in chain):
        frames, middle = list(clip), len(clip) // 2
    for operation in chain:
        if isinstance(operation, ClipOperation):
            frames, measured = operation.apply_clip(frames)
            if "measured_bits_per_pixel" in measured:
                caption += f", spent {measured['measured_bits_per_pixel']:.2f} bits a pixel"
        else:
            frames = [operation.apply(frame, 0) for frame in frames]
    return caption, frames[middle]


def describe(drawn: Degradation) -> str:
    """One line: what was drawn, by the values of the first frame."""
    return " → ".join(operation.summary() for operation in drawn.operations[:-1])


def recipe_draws(clip: np.ndarray, fps: float) -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Nine draws of each recipe: captions and LQ clips (T, H, W, 3)."""
    drawn = []
    for name, config in (("realbasicvsr", REALBASICVSR), ("realesrgan", REALESRGAN), ("light", LIGHT)):
        clips = []
        for seed in range(9):
            degradation = draw(config, seed, clip.shape[:3], fps)  # type: ignore[arg-type]
            clips.append((f"seed {seed}: {describe(degradation)}", apply(degradation, clip).lq))
        drawn.append((name, clips))
    return drawn


def picture_uri(picture: np.ndarray) -> str:
    """A JPEG for an HTML page."""
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92]
    )
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def clip_uri(clip: np.ndarray, fps: float) -> str:
    """An MP4 that browsers play, near lossless so that what is seen is the degradation's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast"}
        for frame in clip:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return "data:video/mp4;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:24px;background:#fafafa;color:#222}
.row{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:320px}figure.pair{width:640px}
figcaption{font-size:12px;color:#555}h3{margin:18px 0 6px}img,video{display:block;max-width:100%}"""


def page(rows: list[tuple[str, Shown]], draws: list[tuple[str, Shown]], clip: np.ndarray, fps: float) -> str:
    """The HTML."""

    def figure(caption: str, media: str, kind: str = "") -> str:
        return f'<figure class="{kind}">{media}<figcaption>{html.escape(caption)}</figcaption></figure>'

    parts = [f"<!doctype html><meta charset=utf-8><title>Degradations</title><style>{_STYLE}</style>"]
    parts.append("<h1>Degradations</h1><h2>Nine draws of each recipe: truth left, low quality right</h2>")
    for name, clips in draws:
        parts.append(f'<h3>{name}</h3><div class="row">')
        for caption, lq in clips:
            uri = clip_uri(np.concatenate([clip, lq], axis=2), fps)
            parts.append(figure(caption, f'<video src="{uri}" autoplay loop muted controls></video>', "pair"))
        parts.append("</div>")
    parts.append("<h2>Each operation at low, middle and high strength</h2>")
    for name, shown in rows:
        figures = "".join(
            figure(caption, f'<img src="{picture_uri(picture)}">') for caption, picture in shown
        )
        parts.append(f'<h3>{html.escape(name)}</h3><div class="row">{figures}</div>')
    return "\n".join(parts)


def sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size in rows."""
    blank = np.full_like(pictures[0], 255)
    pictures = pictures + [blank] * (-len(pictures) % columns)
    lines = [np.concatenate(pictures[at : at + columns], axis=1) for at in range(0, len(pictures), columns)]
    return np.concatenate(lines, axis=0)


def write_pictures(rows: list[tuple[str, Shown]], draws: list[tuple[str, Shown]], folder: Path) -> None:
    """The documentation's sheets: one per operation family and per recipe, about 60 kB each."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {name: sheet([lq[len(lq) // 2][60:260, 60:260] for _, lq in clips], 9) for name, clips in draws}
    families: dict[str, list[np.ndarray]] = {}
    for title, row in rows[1:]:
        family = title.split(",")[0].split(" (")[0].lower().replace(" ", "_")
        families.setdefault(family, []).extend(picture[60:260, 60:260] for _, picture in row)
    sheets |= {name: sheet(pictures, 6 if len(pictures) > 3 else 3) for name, pictures in families.items()}
    for name, picture in sheets.items():
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"{name}.jpg"), bgr, [cv2.IMWRITE_JPEG_QUALITY, 80])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clip", help="any video of 21 frames or more")
    parser.add_argument("out", help="the page, .html")
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--pictures", metavar="FOLDER", help="write the documentation's sheets here too")
    arguments = parser.parse_args()
    clip, fps = read_clip(arguments.clip, arguments.start_s)
    rows, draws = operation_rows(clip, fps), recipe_draws(clip, fps)
    Path(arguments.out).write_text(page(rows, draws, clip, fps))
    if arguments.pictures:
        write_pictures(rows, draws, Path(arguments.pictures))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
