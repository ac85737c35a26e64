"""The one list of file endings for videos and images, and the order of numbered names."""

import os
import re

# fmt: off
VIDEO_ENDINGS = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob",
    ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".3gp", ".gif", ".ivf", ".y4m",
})
# fmt: on
IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
MEDIA_ENDINGS = VIDEO_ENDINGS | IMAGE_ENDINGS


def ending_of(name: str) -> str:
    """The ending of a path or URL in lower case, with its dot; "" for none."""
    return os.path.splitext(name)[1].lower()


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame_2.png before frame_10.png."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
