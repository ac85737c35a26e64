"""From a decoded frame's coded pixels to displayed or measured ones: orientation, pixel aspect, range.

The converters keep swscale's context between the frames of one stream.
"""

from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

# Without ACCURATE_RND swscale takes a shortcut that repeats chroma: 8x faster, up to 30 of 255 off.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED
_HD_HEIGHT = 720  # without a stated colour matrix, players assume BT.709 from here on, BT.601 below


class Geometry:
    """How a decoded frame becomes a displayed one: turned by quarter turns and with square pixels."""

    def __init__(self, frame: VideoFrame, sample_aspect: Fraction | None) -> None:
        self.coded = (frame.width, frame.height)
        self.quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise
        aspect = sample_aspect or Fraction(1)
        self.sample_aspect = aspect if Fraction(1, 10) <= aspect <= 10 else Fraction(1)
        width, height = self.coded
        # Only the side that grows is changed, so that no pixel is lost.
        if self.sample_aspect > 1:
            width = round(width * self.sample_aspect)
        elif self.sample_aspect < 1:
            height = round(height / self.sample_aspect)
        self.upright = (width, height)
        self.displayed = (height, width) if self.quarter_turns % 2 else (width, height)


class RgbConverter:
    """Decoded frames of one stream to displayed RGB; keeps swscale's context between frames."""

    def __init__(self, max_side: int | None = None, deep: bool = False) -> None:
        """max_side: shrink (quickly, not finely) so that no side is longer. deep: uint16 instead of uint8."""
        self._reformatter = VideoReformatter()
        self._max_side = max_side
        # Planar, then interleaved: twice as fast as straight to rgb24, the same values.
        self._format = "gbrp16le" if deep else "gbrp"

    def __call__(self, frame: VideoFrame, stream: Any) -> np.ndarray:
        """RGB `(H, W, 3)` of full range."""
        geometry = Geometry(frame, stream.sample_aspect_ratio)
        width, height = geometry.upright
        interpolation = EXACT
        if self._max_side and max(width, height) > self._max_side:
            scale = self._max_side / max(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            interpolation = Interpolation.AREA
        colours: dict[str, Any] = {}
        if frame.colorspace == UNSPECIFIED_COLORSPACE:
            hd = frame.height >= _HD_HEIGHT or frame.width >= 1280
            colours["src_colorspace"] = Colorspace.ITU709 if hd else Colorspace.ITU601
        if frame.color_trc in HDR_TRANSFERS:
            colours |= {"dst_color_trc": ColorTrc.IEC61966_2_1, "dst_color_primaries": ColorPrimaries.BT709}
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=self._format,
            dst_color_range=ColorRange.JPEG,
            interpolation=interpolation,
            threads=1,
            **colours,
        ).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, geometry.quarter_turns)) if geometry.quarter_turns else rgb


# Formats whose first plane is 8-bit luma, and what makes its limited range full: swscale takes twice as long.
_LUMA_FIRST = ("yuv420p", "yuv422p", "yuv444p", "nv12")
_FULL_RANGE = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)


class LumaConverter:
    """Decoded frames of one stream to full-range luma as coded (not turned or made square): to measure."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._rgb = RgbConverter()

    def __call__(self, frame: VideoFrame, stream: Any, max_side: int | None = None) -> np.ndarray:
        """uint8 `(H, W)`; with max_side, shrunk so that no side is longer."""
        if frame.color_trc in HDR_TRANSFERS or frame.format.is_rgb:
            grey = cv2.cvtColor(self._rgb(frame, stream), cv2.COLOR_RGB2GRAY)
            return shrink(grey, max_side) if max_side else grey
        scale = min(1.0, (max_side or frame.width) / max(frame.width, frame.height)) if max_side else 1.0
        if scale == 1.0 and frame.format.name in _LUMA_FIRST:
            plane = frame.planes[0]
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            limited = frame.color_range != ColorRange.JPEG
            return cv2.LUT(rows[:, : frame.width], _FULL_RANGE) if limited else rows[:, : frame.width].copy()
        return self._reformatter.reformat(
            frame,
            width=max(1, round(frame.width * scale)),
            height=max(1, round(frame.height * scale)),
            format="gray",
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA,
            threads=1,
        ).to_ndarray()


def shrink(picture: np.ndarray, max_side: int) -> np.ndarray:
    """The picture, made smaller by area averaging so that no side is longer than max_side."""
    height, width = picture.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
