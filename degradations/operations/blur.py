"""Blur: convolution with a kernel of a drawn family."""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, get_args

import numpy as np

from degradations.checks import Range, check_distribution, check_probability, check_range, check_step
from degradations.draws import ClipDraws
from degradations.kernels import KernelKind, blur
from degradations.operations.protocol import Example

KERNEL_KINDS: tuple[str, ...] = get_args(KernelKind)


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
        """The frame filtered by its kernel."""
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

    def summary(self) -> str:
        """The first frame's kernel."""
        if self.kind[0] == "sinc":
            return f"sinc {self.omega_rad[0]:.1f}"
        return f"{self.kind[0]} {self.sigma_x_px[0]:.1f}"


def _kernels() -> dict[str, float]:
    """The six families with shares .45, .25, .12, .03, .12 and .03 of what sinc leaves, nine tenths."""
    shares = (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)
    return dict(zip(KERNEL_KINDS, shares, strict=True))


@dataclass(frozen=True)
class BlurConfig:
    """Blur with a kernel from a randomly drawn family."""

    operations: ClassVar = (Blur,)

    sigma_px: Range
    """Range from which each of the kernel's two standard deviations is drawn, in pixels of the frame at the
    point where it is blurred."""
    probability: float = 1.0
    """Probability that a clip is blurred by this operation."""
    kernels: dict[str, float] = field(default_factory=_kernels)
    """Probability of each kernel family (iso, aniso, generalized_iso, generalized_aniso, plateau_iso,
    plateau_aniso, sinc); the values sum to 1."""
    sizes_px: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Kernel sides to draw from, in pixels; each is odd, at least 3 and equally probable."""
    beta_generalized: Range = (0.5, 4.0)
    """Range of the shape parameter of the generalized Gaussian kernels."""
    beta_plateau: Range = (1.0, 2.0)
    """Range of the shape parameter of the plateau kernels."""
    omega_rad: Range | None = None
    """Range of the sinc kernels' cut-off in radians per pixel; null means [pi/3, pi] for kernel sides below
    13 and [pi/5, pi] from there on."""
    sigma_step_px: float = 0.02
    """Largest change of either standard deviation from one frame to the next, in pixels, when values walk
    over time."""
    rotation_step_rad: float = 0.31416
    """Largest change of the kernel's rotation from one frame to the next, in radians, when values walk over
    time."""
    beta_generalized_step: float = 0.05
    """Largest change of the generalized Gaussians' shape parameter from one frame to the next, when values
    walk over time."""
    beta_plateau_step: float = 0.1
    """Largest change of the plateau kernels' shape parameter from one frame to the next, when values walk
    over time."""
    omega_step_rad: float = 0.0628
    """Largest change of the sinc cut-off from one frame to the next, in radians per pixel, when values walk
    over time."""

    def __post_init__(self) -> None:
        check_probability("blur.probability", self.probability)
        check_range("blur.sigma_px", self.sigma_px, low=1e-3, high=1000)
        check_distribution("blur.kernels", self.kernels, KERNEL_KINDS)
        if not self.sizes_px or any(size < 3 or size % 2 == 0 for size in self.sizes_px):
            raise ValueError(f"blur.sizes_px: {list(self.sizes_px)}: kernels have an odd side of 3 or more")
        check_range("blur.beta_generalized", self.beta_generalized, low=1e-3, high=100)
        check_range("blur.beta_plateau", self.beta_plateau, low=1e-3, high=100)
        if self.omega_rad is not None:
            check_range("blur.omega_rad", self.omega_rad, low=1e-3, high=2 * math.pi)
        for item in fields(self):
            if "_step" in item.name:
                check_step(f"blur.{item.name}", getattr(self, item.name))

    def draw(self, clip: ClipDraws) -> list[Blur]:
        """One blur, or none."""
        return [self._draw(clip)] if clip.happens(self.probability) else []

    def _draw(self, clip: ClipDraws) -> Blur:
        kind: tuple[KernelKind, ...] = clip.choice(self.kernels)  # type: ignore[arg-type]
        size_px = clip.choice(dict.fromkeys(self.sizes_px, 1.0))
        return Blur(
            kind=kind,
            size_px=size_px,
            sigma_x_px=clip.number(self.sigma_px, self.sigma_step_px),
            sigma_y_px=clip.number(self.sigma_px, self.sigma_step_px),
            rotation_rad=clip.number((-math.pi, math.pi), self.rotation_step_rad),
            beta=clip.by_kind(kind, lambda kind: self._beta(clip, kind)),
            omega_rad=clip.by_kind(size_px, lambda size: self._omega(clip, size)),
        )

    def _beta(self, clip: ClipDraws, kind: str) -> tuple[float, ...]:
        if kind.startswith("plateau"):
            return clip.number(self.beta_plateau, self.beta_plateau_step)
        return clip.number(self.beta_generalized, self.beta_generalized_step)

    def _omega(self, clip: ClipDraws, size: int) -> tuple[float, ...]:
        widest = (math.pi / 3, math.pi) if size < 13 else (math.pi / 5, math.pi)
        return clip.number(self.omega_rad or widest, self.omega_step_rad)

    @staticmethod
    def examples(clip: np.ndarray, fps: float) -> list[Example]:
        """Every family at three strengths."""
        rows = [
            Example(f"Blur, {kind}", [(f"sigma {sigma}", [_still(kind, sigma)]) for sigma in (0.6, 1.5, 3.0)])
            for kind in KERNEL_KINDS
            if kind != "sinc"
        ]
        sinc = [(f"omega {omega}", [_still("sinc", 1.0, omega)]) for omega in (2.8, 1.6, 0.7)]
        return [*rows, Example("Sinc (ringing)", sinc)]


def _still(kind: str, sigma: float, omega: float = 2.0) -> Blur:
    """One kernel, for one frame."""
    return Blur((kind,), (21,), (sigma,), (sigma / 3,), (0.8,), (1.5,), (omega,))  # type: ignore[arg-type]
