"""The operations of a degradation, as values: every parameter is drawn, nothing is random but the noise.

A field that is a tuple holds one value per frame. Every operation takes and gives (H, W, 3) uint8
RGB frames; the noise comes from the operation's own seed and the frame's number, so that applying
an operation again gives the same bytes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from scipy.special import ndtri, pdtr  # scipy.stats would take a second to import in every worker

from degradations.codecs import Encoder, Recompressed, recompress
from degradations.kernels import KernelKind, blur

Interpolation = Literal["area", "bilinear", "bicubic"]

_INTERPOLATIONS = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

# Steps of the Poisson table: 4096 quantiles of each grey level; noise in sixteenths of a grey level.
_QUANTILES = 4096
_FRACTION = 16


@dataclass(frozen=True)
class Blur:
    """Convolution with a kernel of `kernels.make_kernel`. A kind without `beta` or `omega_rad` ignores it."""

    kind: tuple[KernelKind, ...]
    size_px: tuple[int, ...]
    sigma_x_px: tuple[float, ...]
    sigma_y_px: tuple[float, ...]
    rotation_rad: tuple[float, ...]
    beta: tuple[float, ...]
    omega_rad: tuple[float, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        return blur(
            frame,
            self.kind[index],
            self.size_px[index],
            self.sigma_x_px[index],
            self.sigma_y_px[index],
            self.rotation_rad[index],
            self.beta[index],
            self.omega_rad[index],
        )


@dataclass(frozen=True)
class Resize:
    """`cv2.resize` to a size, with INTER_AREA, INTER_LINEAR or INTER_CUBIC."""

    interpolation: tuple[Interpolation, ...]
    height_px: tuple[int, ...]
    width_px: tuple[int, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        height, width = self.height_px[index], self.width_px[index]
        if frame.shape[:2] == (height, width):
            return frame
        return cv2.resize(frame, (width, height), interpolation=_INTERPOLATIONS[self.interpolation[index]])


@dataclass(frozen=True)
class GaussianNoise:
    """Additive N(0, sigma^2), sigma in grey levels of 255; `grey` noise is the same in the three channels.

    Drawn as a 16-bit quantile, so it ends at 4.3 sigma. On whole grey levels the rounded noise and
    the rounded sum are the same thing, hence whole numbers throughout.
    """

    sigma: tuple[float, ...]
    grey: tuple[bool, ...]
    seed: int

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        shape = frame.shape[:2] if self.grey[index] else frame.shape
        scaled = np.rint(self.sigma[index] * _normal_quantiles())
        table = scaled.clip(-127, 127).astype(np.int8) if self.sigma[index] <= 30 else scaled.astype(np.int16)
        noise = cv2.LUT(_random_uint16(self.seed, index, shape), table)
        if self.grey[index]:
            noise = cv2.merge((noise, noise, noise))
        return cv2.add(frame, noise, dtype=cv2.CV_8U)


@dataclass(frozen=True)
class PoissonNoise:
    """Shot noise as Real-ESRGAN has it: `scale * (Poisson(v n) / n - v)` for a pixel v in [0, 1], where n is
    the number of different grey levels in the frame, rounded up to a power of two.

    `grey` noise is drawn from the grey frame and added to the three channels.
    """

    scale: tuple[float, ...]
    grey: tuple[bool, ...]
    seed: int

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        source = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if self.grey[index] else frame
        histogram = cv2.calcHist([source.reshape(source.shape[0], -1)], [0], None, [256], [0, 256])
        levels = 1 << (int(np.count_nonzero(histogram)) - 1).bit_length()
        where = source.astype(np.int32)
        where *= _QUANTILES
        where += _random_uint16(self.seed, index, source.shape) >> 4
        noise = np.take(_poisson_table(levels), where)
        if self.grey[index]:
            noise = cv2.merge((noise, noise, noise))
        return cv2.addWeighted(frame, 1.0, noise, self.scale[index] / _FRACTION, 0.0, dtype=cv2.CV_8U)


@dataclass(frozen=True)
class Jpeg:
    """JPEG (libjpeg-turbo through OpenCV, 4:2:0) at a quality from 1 to 100, and back."""

    quality: tuple[int, ...]

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.quality[index]])
        assert done
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        assert decoded is not None
        return decoded


@dataclass(frozen=True)
class VideoCodec:
    """The whole clip through an encoder at about `bits_per_pixel` (see `codecs.recompress`).

    In bits a pixel, not in bits a second: RealBasicVSR's 1e4 to 1e5 bits a frame are for 256x256.
    """

    encoder: Encoder
    bits_per_pixel: float
    fps: float

    def apply_clip(self, frames: list[np.ndarray]) -> Recompressed:
        return recompress(frames, self.encoder, self.bits_per_pixel, self.fps)


@dataclass(frozen=True)
class UnsharpMask:
    """Sharpening of the truth: frame + weight (frame - blurred) where that difference passes the threshold.

    RealBasicVSR and Real-ESRGAN: a 51x51 kernel with OpenCV's sigma for it, 8 pixels, weight 0.5,
    threshold 10 of 255; the mask of what passes is blurred likewise.
    """

    sigma_px: float = 8.0
    weight: float = 0.5
    threshold: float = 10.0

    def apply(self, frame: np.ndarray) -> np.ndarray:
        blurred = _wide_gaussian(frame, self.sigma_px)
        _, mask = cv2.threshold(cv2.absdiff(frame, blurred), self.threshold, 255, cv2.THRESH_BINARY)
        mask = _wide_gaussian(mask, self.sigma_px)
        sharp = cv2.addWeighted(frame, 1 + self.weight, blurred, -self.weight, 0)
        brighter = cv2.multiply(
            cv2.subtract(sharp, frame), mask, scale=1 / 255
        )  # apart, so that both stay uint8
        darker = cv2.multiply(cv2.subtract(frame, sharp), mask, scale=1 / 255)
        return cv2.subtract(cv2.add(frame, brighter), darker)


def sharpen_truth(frames: np.ndarray, mask: UnsharpMask | None = None) -> np.ndarray:
    """`frames` (T, H, W, 3) uint8 after the unsharp mask: what recipes with `sharpen_truth` train towards."""
    mask = mask or UnsharpMask()
    return np.stack([mask.apply(frame) for frame in frames])


def _wide_gaussian(frame: np.ndarray, sigma_px: float) -> np.ndarray:
    """A Gaussian of 4 pixels or more on a quarter of the size: 8 times faster than 51 taps.

    The box that shrinks and the triangle that grows again are part of the wanted variance:
    (4^2 - 1) / 12 and 4^2 / 6.
    """
    height, width = frame.shape[:2]
    small = cv2.resize(frame, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    variance = (sigma_px**2 - (4**2 - 1) / 12 - 4**2 / 6) / 4**2
    small = cv2.GaussianBlur(small, (0, 0), float(np.sqrt(max(variance, 0.01))))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _random_uint16(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform 16-bit numbers of one frame's noise: SFC64 gives them at 0.3 ns each."""
    count = int(np.prod(shape))
    bits = np.random.SFC64(np.random.SeedSequence((seed, index)))
    return bits.random_raw((count + 3) // 4).view(np.uint16)[:count].reshape(shape)


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """(65536,) quantiles of N(0, 1) at the middles of equal steps, scaled to a variance of exactly 1."""
    quantiles = ndtri((np.arange(65536) + 0.5) / 65536)
    return quantiles / quantiles.std()


@lru_cache(maxsize=9)
def _poisson_table(levels: int) -> np.ndarray:
    """(256 * 4096,) int16: quantiles of Poisson noise at each grey level, in sixteenths of a grey level.

    Each level's row is corrected to the exact mean and variance, which the missing tails
    (beyond 1 in 8192) would otherwise lower. 2 MB and 40 ms for each power of two.
    """
    middle = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    table = np.zeros((256, _QUANTILES), np.float64)
    for value in range(1, 256):
        rate = value / 255 * levels
        row = pdtr(np.arange(int(rate + 8 * np.sqrt(rate) + 10)), rate).searchsorted(middle) - rate
        row -= row.mean()
        row *= np.sqrt(rate) / row.std()
        table[value] = row / levels * 255
    return np.rint(table * _FRACTION).clip(-32768, 32767).astype(np.int16).ravel()


FrameOperation = Blur | Resize | GaussianNoise | PoissonNoise | Jpeg
Operation = FrameOperation | VideoCodec
