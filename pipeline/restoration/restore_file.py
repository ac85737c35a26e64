"""Restoration of one video, image or image sequence: what an actor of `restore` does with each file.

The restored frames of a video go into a finished part at every chunk; in the end the parts are joined with
the source's sound without re-encoding (`pipeline.restoration.resume`, `pipeline.video.muxing`).
"""

import contextlib
import dataclasses
import io
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model import preprocess
from pipeline.restoration.restorer import Restorer, RestoreStream
from pipeline.restoration.resume import RestoredParts
from pipeline.store import storage
from pipeline.video import colour, decoding, encoding, muxing
from pipeline.video.encoding import VideoFormat, VideoWriter
from pipeline.video.sandbox import Sandbox

PNG = "png"
"""The one choice that is not a video codec: a folder of pictures."""
_REPORT_EVERY_S = 10.0
_PREVIEW_SIDE_PX = 960


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How restored videos are written."""

    codec: str = "h264"
    """Codec of restored videos: h264 for watching, prores for editing (.mov, always 10 bits), ffv1 for
    measuring (lossless, .mkv), or png for a folder of lossless pictures without sound."""
    bits: Literal[8, 10] = 8
    """Bits per colour channel of restored videos; 10 also reads 10-bit sources without rounding, and a PNG
    sequence then has 16."""
    crf: int = 16
    """Constant rate factor of H.264: a lower value gives a larger and better file."""
    container: Literal["mp4", "mkv"] = "mp4"
    """Container of H.264 videos; a video whose sound or subtitles do not fit into mp4 is written as mkv
    instead."""

    def __post_init__(self) -> None:
        known = [*encoding.CODECS, PNG]
        if self.codec not in known:
            raise ValueError(f"encoding.codec: {self.codec!r} is none of {', '.join(known)}")

    @property
    def endings(self) -> list[str]:
        """The containers to try, in this order; of a video, not of pictures."""
        return [encoding.CODECS[self.codec].ending or self.container, "mkv"]

    @property
    def deep(self) -> bool:
        """Whether frames have more than 8 bits."""
        return self.bits > 8 or (self.codec != PNG and encoding.CODECS[self.codec].always_deep)


@dataclasses.dataclass(frozen=True)
class SourceVideo:
    """A video to restore."""

    about: decoding.Probe
    frames: Callable[[int], Iterable[tuple[int, np.ndarray]]]
    """Maps the number of frames to skip to the (time stamp, frame) of all others."""
    path: str | None = None
    """the local file with the sound; None for an image sequence"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one result and its by-products go, all as URLs without endings."""

    result: str
    parts: str
    preview: str | None
    """a frame before and after, for preview.html"""
    name: str
    """Name shown in progress lines."""


def open_video(path: str, about: decoding.Probe, sandbox: Sandbox, deep: bool) -> SourceVideo:
    """A video file, decoded in the sandbox."""

    def frames(skip: int) -> Iterator[tuple[int, np.ndarray]]:
        for stamp, frame in sandbox.stream(muxing.stamped_frames, path, skip, deep):
            if frame is not None:
                yield stamp, frame

    return SourceVideo(about, frames, path)


def open_sequence(urls: list[str], fps: float, sandbox: Sandbox, folder: str) -> SourceVideo:
    """Images as the frames of a video; each is fetched when it is needed."""

    def picture(url: str) -> np.ndarray:
        with storage.local_copy(url, folder) as path:
            try:
                return sandbox.call(decoding.load_image, path)
            except ValueError as error:
                raise ValueError(f"{os.path.basename(url)}: {error}") from None

    rate = encoding.Fraction(fps).limit_denominator(1001)
    height, width = picture(urls[0]).shape[:2]
    about = decoding.Probe(
        media="video", codec="sequence", pix_fmt="rgb24", bit_depth=8, width=width, height=height,
        coded_size=(width, height), rotation=0, time_base=1 / rate, num_frames=len(urls), fps=rate,
    )  # fmt: skip
    return SourceVideo(about, lambda skip: ((i, picture(urls[i])) for i in range(skip, len(urls))))


class Progress:
    """Prints a progress line now and then: frames, frames/s of this run, time left."""

    def __init__(self, name: str, total: int, done: int) -> None:
        """total: frames as the container says, 0 if it does not. done: by an earlier run."""
        self._name, self._total, self._first = name, total, done
        self._start = self._reported = time.monotonic()

    def report(self, done: int, at_end: bool = False) -> None:
        """done: frames so far, those of earlier runs included."""
        now = time.monotonic()
        if not at_end and now - self._reported < _REPORT_EVERY_S:
            return
        self._reported = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        line = f"{self._name}: {done}/{self._total or '?'} frames, {rate:.2f} frames/s"
        if self._total > done and rate and not at_end:
            left = int((self._total - done) / rate)
            line += f", eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class VideoJob:
    """One video on the way to its file."""

    restorer: Restorer
    source: SourceVideo
    size: tuple[int, int]
    """height and width of the result"""
    encoding: Encoding
    target: Target
    parts: RestoredParts
    sandbox: Sandbox
    folder: str
    """Local folder for temporary files."""

    @property
    def format(self) -> VideoFormat:
        """Format of the restored video, with the rate, time base and colours of the source."""
        about, how = self.source.about, self.encoding
        colours, (height, width) = encoding.Colours.of(about), self.size
        return VideoFormat(about.fps, width, height, how.codec, how.bits, how.crf, colours, about.time_base)

    def open_writer(self, path: str, number: int) -> "VideoWriter | PictureWriter":
        """A part's writer; `number` is its first frame's."""
        if self.encoding.codec == PNG:
            return PictureWriter(self.target.result, number)
        return VideoWriter(path, **vars(self.format))


def restore_video(job: VideoJob, state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Restore a video, continuing from an earlier job's `state`; returns its facts for the manifest."""
    stream = RestoreStream(job.restorer, job.size, job.encoding.deep)
    if state is not None:
        stream.load_state_dict(state)
    facts: dict[str, Any] = {"resumed_from_frame": stream.frames_out}
    restore_pictures(job, stream)
    facts["frames"] = stream.frames_out
    facts |= {"output": job.target.result} if job.encoding.codec == PNG else join_parts(job)
    job.parts.remove()
    return facts


def join_parts(job: VideoJob) -> dict[str, Any]:
    """Write the result: the restored parts with the source's sound."""
    source, endings = job.source, job.encoding.endings
    ending, copied, left = endings[0], 0, 0
    if source.path is not None:
        ending, copied, left = job.sandbox.call(muxing.choose_ending, source.path, endings)
    joined = os.path.join(job.folder, f"joined.{ending}")
    start = source.about.start_pts * source.about.time_base
    output = f"{job.target.result}.{ending}"
    with job.restorer.timed("write"):
        for _ in job.sandbox.stream(muxing.join, source.path, job.parts.local(), job.format, start, joined):
            pass
        storage.put_file(joined, output)
    return {"output": output, "streams_copied": copied, "streams_left": left}


def restore_pictures(job: VideoJob, stream: RestoreStream) -> None:
    """Write the parts that are missing, each frame at its source's time stamp."""
    restorer, about = job.restorer, job.source.about
    progress = Progress(job.target.name, about.num_frames, stream.frames_out)
    preview = Preview(job.target.preview, about.num_frames // 2)
    stamps: deque[int] = deque()  # of frames that are read but not yet written
    ending = "" if job.encoding.codec == PNG else encoding.CODECS[job.encoding.codec].ending_of_parts
    path = os.path.join(job.folder, f"part.{ending}")

    def write(restored: Iterator[np.ndarray]) -> bool:
        """Write one part of the frames that are ready; False if there are none."""
        batch = next(restored, None)
        if batch is None:
            return False
        first_pts, number = stamps[0], stream.frames_out - len(batch)
        with contextlib.ExitStack() as open_files:
            writer = job.open_writer(path, number)
            open_files.enter_context(writer)
            for frame in itertools.chain(batch, itertools.chain.from_iterable(restored)):
                with restorer.timed("write"):
                    writer.write(frame, stamps.popleft() - first_pts)
                preview.after(number, frame)
                number += 1
            with restorer.timed("write"):
                open_files.close()  # encoders keep some dozens of frames back
                if ending:
                    job.parts.put(path, first_pts - about.start_pts)
        progress.report(number)
        return True

    for number, (stamp, frame) in enumerate(
        restorer.timed_items("read", job.source.frames(stream.frames_out)), stream.frames_out
    ):
        stamps.append(stamp)
        preview.before(number, frame)
        if write(stream.push(frame)):
            with restorer.timed("write"):
                job.parts.save(stream.state_dict)
    write(stream.finish())
    progress.report(stream.frames_out, at_end=True)


class PictureWriter:
    """Writes frames as numbered PNG files, straight to their final place."""

    def __init__(self, url: str, number: int) -> None:
        self._url, self._number = url, number

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, frame: np.ndarray, pts: int) -> None:
        """Write the next frame; a folder of pictures has no time stamps, so `pts` is ignored."""
        self._number += 1
        storage.write_bytes(storage.join(self._url, f"{self._number:08d}.png"), encoding.png(frame))


class Preview:
    """Keeps one frame before and after, as small JPEG files for preview.html."""

    def __init__(self, url: str | None, number: int) -> None:
        """url: of the two files without `_lq.jpg` and `_restored.jpg`; None: none is wanted."""
        self._url, self._number = url, number

    def before(self, number: int, frame: np.ndarray) -> None:
        self._keep(number, frame, "lq")

    def after(self, number: int, frame: np.ndarray) -> None:
        self._keep(number, frame, "restored")

    def _keep(self, number: int, frame: np.ndarray, which: str) -> None:
        if self._url is None or number != self._number:
            return
        eight = frame if frame.dtype == np.uint8 else (frame >> 8).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(colour.shrink(eight, _PREVIEW_SIDE_PX)).save(sink, format="JPEG", quality=92)
        storage.write_bytes(f"{self._url}_{which}.jpg", sink.getvalue())


def restore_image(
    restorer: Restorer, path: str, size: tuple[int, int], target: Target, sandbox: Sandbox
) -> dict[str, Any]:
    """Restore a still picture; transparency is enlarged separately, and a grey picture stays grey."""
    picture, alpha, grey = sandbox.call(decoding.load_image_parts, path)
    (batch,) = restorer.restore([picture], size)
    restored = batch[0]
    preview = Preview(target.preview, 0)
    preview.before(0, picture)
    preview.after(0, restored)
    if grey:
        restored = cv2.cvtColor(restored, cv2.COLOR_RGB2GRAY)
    if alpha is not None:
        unit = torch.from_numpy(alpha)[None, None].float() / 255
        mask = (preprocess.resize(unit, *size)[0, 0] * 255).round().to(torch.uint8).numpy()
        colours = cv2.cvtColor(restored, cv2.COLOR_GRAY2RGB) if grey else restored
        restored = np.dstack([colours, mask])
    url = f"{target.result}.png"
    storage.write_bytes(url, encoding.png(restored))
    return {"output": url, "frames": 1}
