"""What a video file carries beside its pictures: time stamps, sound, subtitles. No Ray, no torch: these
functions run in the sandbox, where the foreign file is opened."""

from collections.abc import Iterator

import av
import numpy as np

from pipeline import encoding, media


def stamped_frames(path: str) -> Iterator[tuple[int, np.ndarray]]:
    """(time stamp in ticks of the stream's time base, displayed RGB frame, uint8 (H, W, 3)) of a video."""
    convert = media.RgbConverter()
    for stamp, frame, stream in media.decode_video(path):
        yield stamp, convert(frame, stream)


def copy_sound(
    source: str, pictures: str, target_without_ending: str, endings: list[str]
) -> tuple[str, int, int]:
    """Join the pictures with the source's sound and subtitles, nothing encoded again.

    Takes the first container of `endings` that can hold every stream, else the last. Returns the file, the
    streams copied and the streams left behind; without any to copy the file is `pictures` itself.
    """
    with av.open("file:" + source) as opened:
        wanted = len(opened.streams.audio) + len(opened.streams.subtitles)
    if not wanted:
        return pictures, 0, 0
    target, copied = pictures, 0
    for ending in endings:
        target = f"{target_without_ending}.{ending}"
        copied = encoding.copy_audio(source, pictures, target)
        if copied == wanted:
            break
    return target, copied, wanted - copied
