"""Blur kernels of the degradation: the Gaussian family, its generalised and plateau forms, and the sinc filter.

They are written here because libraries have Gaussian ones and, some, generalised and sinc ones, but none has the
plateau family, and half of a family of kernels from elsewhere would only split the seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError

Range = tuple[float, float]

KernelKind = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]


def check_range(name: str, value: Range, low: float, high: float) -> None:
    if not (low <= value[0] <= value[1] <= high):
        raise SettingsError(f"{name} must be a range [from, to] within {low:g} to {high:g}, got {list(value)}.")


def check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise SettingsError(f"{name} is a probability, 0 to 1, got {value}.")


@dataclass(frozen=True)
class KernelMix:
    """Which blur kernels are drawn.

    Attributes:
        iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso: weights of the families.
        size: smallest and largest side in pixels, odd.
        betag: shape of the generalised Gaussian; below 1 has heavier tails, above 1 lighter ones.
        betap: shape of the plateau.
        split_at_one: draw half of the shapes from the range up to 1 and half from 1 on, also where the range begins
            at 1 (published: half of the plateaus have exactly 1). Without it, only a range with both sides is split.
    """

    iso: float = 0.45
    aniso: float = 0.25
    generalized_iso: float = 0.12
    generalized_aniso: float = 0.03
    plateau_iso: float = 0.12
    plateau_aniso: float = 0.03
    size: tuple[int, int] = (7, 21)
    betag: Range = (0.5, 4.0)
    betap: Range = (1.0, 2.0)
    split_at_one: bool = True

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
            raise SettingsError(f"kernel weights must be 0 or more, and one of them more than 0, got {self.weights}.")
        if not (self.size[0] % 2 and self.size[1] % 2 and 3 <= self.size[0] <= self.size[1] <= 51):
            raise SettingsError(f"kernel size must be two odd numbers from 3 to 51, got {list(self.size)}.")
        check_range("betag", self.betag, 0.05, 20)
        check_range("betap", self.betap, 0.05, 20)

    @property
    def weights(self) -> dict[KernelKind, float]:
        """Weights by family, as given."""
        return {
            "iso": self.iso,
            "aniso": self.aniso,
            "generalized_iso": self.generalized_iso,
            "generalized_aniso": self.generalized_aniso,
            "plateau_iso": self.plateau_iso,
            "plateau_aniso": self.plateau_aniso,
        }


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, angle: float, *, beta: float = 1.0, plateau: bool = False
) -> NDArray[np.float64]:
    """A blur kernel of the Gaussian family, summing to 1.

    With d the squared Mahalanobis distance from the centre: exp(-d^beta / 2), generalised for beta other than 1, or
    1 / (1 + d^beta) for the plateau family.

    Args:
        size: side in pixels, odd.
        sigma_x, sigma_y: standard deviations along the kernel's axes, in pixels.
        angle: of these axes, in radians.
        beta: shape, above 0.
        plateau: the family with a flat top.
    """
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    along, across = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    distance = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    kernel = 1 / (1 + distance**beta) if plateau else np.exp(-0.5 * distance**beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> NDArray[np.float64]:
    """The circular low-pass filter cut to `size`, summing to 1; it rings at edges.

    Args:
        size: side in pixels, odd.
        cutoff: in radians per pixel, up to pi.
    """
    from scipy.special import j1

    axis = np.arange(size) - size // 2
    radius = np.hypot(*np.meshgrid(axis, axis))
    safe = np.where(radius == 0, 1.0, radius)
    kernel = np.where(radius == 0, cutoff**2 / (4 * math.pi), cutoff * j1(cutoff * safe) / (2 * math.pi * safe))
    return kernel / kernel.sum()


def draw_kernel(rng: np.random.Generator, mix: KernelMix, sigma: Range, sinc_probability: float) -> NDArray[np.float64]:
    """Draw a blur kernel.

    Args:
        rng: source of all draws.
        mix: families and sizes.
        sigma: range of the standard deviations in pixels.
        sinc_probability: how often it is a sinc filter instead.
    """
    size = draw_size(rng, mix)
    if rng.random() < sinc_probability:
        # Small kernels cannot hold slow oscillations.
        return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    names = list(mix.weights)
    weights = np.array(list(mix.weights.values()))
    kind = names[rng.choice(len(names), p=weights / weights.sum())]
    sigma_x = sigma_y = rng.uniform(*sigma)
    angle = 0.0
    if kind.endswith("aniso"):
        sigma_y, angle = rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)
    shape = {"generalized": mix.betag, "plateau": mix.betap}.get(kind.split("_")[0])
    beta = 1.0 if shape is None else draw_beta(rng, shape, mix.split_at_one)
    return gaussian_kernel(size, sigma_x, sigma_y, angle, beta=beta, plateau=kind.startswith("plateau"))


def draw_size(rng: np.random.Generator, mix: KernelMix) -> int:
    return int(rng.integers(mix.size[0] // 2, mix.size[1] // 2 + 1)) * 2 + 1


def draw_beta(rng: np.random.Generator, bounds: Range, split_at_one: bool = True) -> float:
    """Half of the draws up to 1 and half from 1 on, where the range has 1 in it."""
    low, high = bounds
    inside = low <= 1 <= high if split_at_one else low < 1 < high
    if inside:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))
