"""Noise: Gaussian, or Poisson (shot noise)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import cv2
import numpy as np
from scipy.special import ndtri, pdtr  # scipy.stats would take a second to import in every worker

from degradations.checks import Range, check_probability, check_range, check_step
from degradations.draws import ClipDraws
from degradations.operations.protocol import Example

# Steps of the Poisson table: 4096 quantiles of each grey level; noise in sixteenths of a grey level.
_QUANTILES = 4096
_FRACTION = 16


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
        """The frame with its noise added."""
        shape = frame.shape[:2] if self.grey[index] else frame.shape
        scaled = np.rint(self.sigma[index] * _normal_quantiles())
        table = scaled.clip(-127, 127).astype(np.int8) if self.sigma[index] <= 30 else scaled.astype(np.int16)
        noise = cv2.LUT(_random_uint16(self.seed, index, shape), table)
        if self.grey[index]:
            noise = cv2.merge((noise, noise, noise))
        return cv2.add(frame, noise, dtype=cv2.CV_8U)

    def summary(self) -> str:
        """The first frame's noise."""
        return f"gaussian {self.sigma[0]:.0f}{' grey' if self.grey[0] else ''}"


@dataclass(frozen=True)
class PoissonNoise:
    """Shot noise as in Real-ESRGAN: `scale * (Poisson(v n) / n - v)` for a pixel v in [0, 1].

    Here n is the number of different grey levels in the frame, rounded up to a power of two. With `grey` the
    noise is drawn from the grey frame and added to all three channels.
    """

    scale: tuple[float, ...]
    grey: tuple[bool, ...]
    seed: int

    def apply(self, frame: np.ndarray, index: int) -> np.ndarray:
        """The frame with its noise added."""
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

    def summary(self) -> str:
        """The first frame's noise."""
        return f"poisson {self.scale[0]:.1f}{' grey' if self.grey[0] else ''}"


@dataclass(frozen=True)
class NoiseConfig:
    """Gaussian or Poisson noise."""

    operations: ClassVar = (GaussianNoise, PoissonNoise)

    gaussian_sigma: Range
    """Range of the Gaussian noise's standard deviation, in grey levels from 0 to 255."""
    poisson_scale: Range
    """Range of the factor by which Poisson noise is multiplied; 1 leaves it as drawn."""
    probability: float = 1.0
    """Probability that a clip gets noise from this operation."""
    gaussian: float = 0.5
    """Probability that the noise is Gaussian; otherwise it is Poisson noise."""
    grey: float = 0.4
    """Probability that the three colour channels share the same noise."""
    gaussian_sigma_step: float = 0.1
    """Largest change of the Gaussian standard deviation from one frame to the next, in grey levels, when
    values walk over time."""
    poisson_scale_step: float = 0.005
    """Largest change of the Poisson noise's scale from one frame to the next, when values walk over time."""

    def __post_init__(self) -> None:
        check_probability("noise.probability", self.probability)
        check_probability("noise.gaussian", self.gaussian)
        check_probability("noise.grey", self.grey)
        check_range("noise.gaussian_sigma", self.gaussian_sigma, low=0, high=255)
        check_range("noise.poisson_scale", self.poisson_scale, low=0, high=255)
        check_step("noise.gaussian_sigma_step", self.gaussian_sigma_step)
        check_step("noise.poisson_scale_step", self.poisson_scale_step)

    def draw(self, clip: ClipDraws) -> list[GaussianNoise | PoissonNoise]:
        """One, or none; where frames are independent, both, each silent on the other's frames."""
        drawn: list[GaussianNoise | PoissonNoise] = []
        if not clip.happens(self.probability):
            return drawn
        gaussian = clip.choice({True: self.gaussian, False: 1.0 - self.gaussian})
        grey = clip.choice({True: self.grey, False: 1.0 - self.grey})
        if any(gaussian):
            sigma = clip.number(self.gaussian_sigma, self.gaussian_sigma_step)
            sigma = tuple(value if on else 0.0 for value, on in zip(sigma, gaussian, strict=True))
            drawn.append(GaussianNoise(sigma, grey, clip.seed()))
        if not all(gaussian):
            scale = clip.number(self.poisson_scale, self.poisson_scale_step)
            scale = tuple(0.0 if on else value for value, on in zip(scale, gaussian, strict=True))
            drawn.append(PoissonNoise(scale, grey, clip.seed()))
        return drawn

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """Both kinds, in colour and grey, at three strengths."""
        rows = []
        for grey in (False, True):
            name = "grey" if grey else "colour"
            sigmas = [
                (f"sigma {sigma}", [GaussianNoise((sigma,), (grey,), 1)]) for sigma in (5.0, 15.0, 30.0)
            ]
            rows.append(Example(f"Gaussian noise, {name}", sigmas))
            scales = [(f"scale {scale}", [PoissonNoise((scale,), (grey,), 1)]) for scale in (0.5, 1.5, 3.0)]
            rows.append(Example(f"Poisson noise, {name}", scales))
        return rows


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
