"""The two-stage degradation that makes low-quality images for training (Real-ESRGAN's process, paper section 4).

Blur, resize, noise and JPEG, twice, and a final sinc filter that makes the ringing of sharpened images. Every
range is a setting, and every draw comes from one generator, so a sample depends on its seed alone and not on the
worker that makes it.

Filtering and resizing are torch's, as in the published process (no antialiasing on reduction), JPEG is Pillow's (a real
encoder), the random numbers are NumPy's. The kernels are written here: libraries have Gaussian ones and, some,
generalised and sinc ones, but none has the plateau family, and half of a family of kernels from elsewhere would only
split the seeds.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, SettingsError

Range = tuple[float, float]

KernelKind = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]

MIN_SIDE = 8
"""Smallest side in pixels that a degraded image is allowed to have on its way."""


def _check_range(name: str, value: Range, low: float, high: float) -> None:
    if not (low <= value[0] <= value[1] <= high):
        raise SettingsError(f"{name} must be a range [from, to] within {low:g} to {high:g}, got {list(value)}.")


def _check_probability(name: str, value: float) -> None:
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

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
            raise SettingsError(f"kernel weights must be 0 or more, and one of them more than 0, got {self.weights}.")
        if not (self.size[0] % 2 and self.size[1] % 2 and 3 <= self.size[0] <= self.size[1] <= 51):
            raise SettingsError(f"kernel size must be two odd numbers from 3 to 51, got {list(self.size)}.")
        _check_range("betag", self.betag, 0.05, 20)
        _check_range("betap", self.betap, 0.05, 20)

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


@dataclass(frozen=True)
class Pass:
    """One pass of blur, resize, noise and JPEG.

    Attributes:
        blur_probability: how often the image is blurred at all.
        sinc_probability: how often the blur is a sinc filter.
        blur_sigma: standard deviation of the kernels in pixels.
        resize: range of the scale factor.
        resize_weights: how often it goes up, down, or keeps its size.
        gaussian_probability: how often the noise is Gaussian; Poisson otherwise.
        gaussian_sigma: of 255.
        poisson_scale: factor on Poisson noise.
        grey_probability: how often the noise is the same in all channels.
        jpeg_quality: 1 to 100.
    """

    blur_probability: float
    sinc_probability: float
    blur_sigma: Range
    resize: Range
    resize_weights: tuple[float, float, float]
    gaussian_probability: float
    gaussian_sigma: Range
    poisson_scale: Range
    grey_probability: float
    jpeg_quality: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("blur_probability", "sinc_probability", "gaussian_probability", "grey_probability"):
            _check_probability(name, getattr(self, name))
        _check_range("blur_sigma", self.blur_sigma, 0.01, 50)
        _check_range("resize", self.resize, 0.05, 8)
        _check_range("gaussian_sigma", self.gaussian_sigma, 0, 255)
        _check_range("poisson_scale", self.poisson_scale, 0, 100)
        _check_range("jpeg_quality", self.jpeg_quality, 1, 100)
        if min(self.resize_weights) < 0 or sum(self.resize_weights) <= 0:
            raise SettingsError(f"resize_weights must be three numbers, not all 0, got {list(self.resize_weights)}.")


FIRST_PASS = Pass(1.0, 0.1, (0.2, 3.0), (0.3, 1.5), (0.2, 0.7, 0.1), 0.5, (1, 15), (0.05, 2.0), 0.4, (60, 95))
SECOND_PASS = Pass(0.5, 0.1, (0.2, 1.5), (0.6, 1.2), (0.3, 0.4, 0.3), 0.5, (1, 12), (0.05, 1.0), 0.4, (60, 100))


@dataclass(frozen=True)
class DegradationConfig:
    """The whole process; the defaults are FaithDiff's.

    Attributes:
        scale: how many times smaller the result is.
        kernels: which blur kernels are drawn.
        first, second: the passes; `second: null` leaves the second one out.
        final_sinc_probability: how often the final sinc filter runs.
    """

    scale: int = 4
    kernels: KernelMix = field(default_factory=KernelMix)
    first: Pass = FIRST_PASS
    second: Pass | None = SECOND_PASS
    final_sinc_probability: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 16:
            raise SettingsError(f"scale must be a whole number from 1 to 16, got {self.scale}.")
        _check_probability("final_sinc_probability", self.final_sinc_probability)


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
    size = _draw_size(rng, mix)
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
    if kind.startswith("generalized"):
        return gaussian_kernel(size, sigma_x, sigma_y, angle, beta=_draw_beta(rng, mix.betag))
    if kind.startswith("plateau"):
        return gaussian_kernel(size, sigma_x, sigma_y, angle, beta=_draw_beta(rng, mix.betap), plateau=True)
    return gaussian_kernel(size, sigma_x, sigma_y, angle)


def _draw_size(rng: np.random.Generator, mix: KernelMix) -> int:
    return int(rng.integers(mix.size[0] // 2, mix.size[1] // 2 + 1)) * 2 + 1


def _draw_beta(rng: np.random.Generator, bounds: Range) -> float:
    """Half of the draws below 1 and half above it, where the range has both sides."""
    low, high = bounds
    if low < 1 < high:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))


def filter_image(image: Tensor, kernel: NDArray[np.float64]) -> Tensor:
    """Convolve every channel with a kernel; the border is mirrored, or repeated where the image is too small for
    that.

    Args:
        image: (C, H, W).
        kernel: (k, k), k odd.
    """
    half = kernel.shape[0] // 2
    mode = "reflect" if min(image.shape[-2:]) > half else "replicate"
    padded = F.pad(image[:, None], (half, half, half, half), mode=mode)
    return F.conv2d(padded, torch.from_numpy(kernel).to(image)[None, None])[:, 0]


def _resize(image: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
    mode = ("area", "bilinear", "bicubic")[rng.integers(0, 3)]
    if mode == "area":
        return F.interpolate(image[None], (height, width), mode="area")[0]
    return F.interpolate(image[None], (height, width), mode=mode, align_corners=False)[0]


def _noise(image: Tensor, rng: np.random.Generator, settings: Pass) -> Tensor:
    """Add Gaussian or Poisson noise; the image is in [0, 1]."""
    gaussian = rng.random() < settings.gaussian_probability
    grey = rng.random() < settings.grey_probability
    strength = rng.uniform(*(settings.gaussian_sigma if gaussian else settings.poisson_scale))
    channels = 1 if grey else image.shape[0]
    if gaussian:
        noise = rng.standard_normal((channels, *image.shape[1:])) * (strength / 255)
    else:
        levels = (image.clamp(0, 1) * 255).round().numpy().astype(np.float64)
        if grey:
            levels = np.tensordot(np.array([0.299, 0.587, 0.114]), levels, axes=1)[None].round()
        # As many photons as there are grey levels, to the next power of two: few levels make a coarse noise.
        photons = 2.0 ** math.ceil(math.log2(max(2, len(np.unique(levels)))))
        noise = (rng.poisson(levels / 255 * photons) / photons - levels / 255) * strength
    return image + torch.from_numpy(noise).to(image)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    to_image(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as opened:
        return to_tensor(opened)


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit image; values outside are clipped."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def to_tensor(original: Image.Image) -> Tensor:
    """An image to (3, H, W) in [0, 1], float32."""
    return torch.from_numpy(np.array(original.convert("RGB"))).permute(2, 0, 1).float() / 255


def degrade(original: Image.Image, config: DegradationConfig, rng: np.random.Generator) -> Image.Image:
    """Make a low-quality image.

    Args:
        original: the high-quality image, RGB.
        config: the ranges to draw from.
        rng: source of all draws; the same state gives the same result.

    Returns:
        An image `config.scale` times smaller (sides rounded up), 8 bits, with its JPEG traces.

    Raises:
        ImageError: the image is too small for the scale.
    """
    width, height = -(-original.width // config.scale), -(-original.height // config.scale)
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"The image of {original.width} x {original.height} pixels is too small to be degraded at scale "
            f"{config.scale}: expected at least {MIN_SIDE * config.scale} pixels a side."
        )
    image = to_tensor(original)
    passes = [config.first] if config.second is None else [config.first, config.second]
    for settings in passes:
        last = settings is passes[-1]
        if rng.random() < settings.blur_probability:
            image = filter_image(
                image, draw_kernel(rng, config.kernels, settings.blur_sigma, settings.sinc_probability)
            )
        # The second factor is relative to the final size, as in the published process.
        base = (height, width) if len(passes) == 2 and last else (original.height, original.width)
        factor = _draw_factor(rng, settings)
        size = (max(MIN_SIDE, round(base[0] * factor)), max(MIN_SIDE, round(base[1] * factor)))
        image = _resize(image, *size, rng)
        image = _noise(image, rng, settings)
        quality = int(rng.integers(settings.jpeg_quality[0], settings.jpeg_quality[1] + 1))
        if not last:
            image = _jpeg(image, quality)
            continue
        jpeg_first = rng.random() < 0.5
        if jpeg_first:
            image = _jpeg(image, quality)
        image = _resize(image, height, width, rng)
        if rng.random() < config.final_sinc_probability:
            image = filter_image(image, sinc_kernel(_draw_size(rng, config.kernels), rng.uniform(math.pi / 3, math.pi)))
        if not jpeg_first:
            image = _jpeg(image, quality)
    return to_image(image)


def _draw_factor(rng: np.random.Generator, settings: Pass) -> float:
    weights = np.array(settings.resize_weights)
    way = ("up", "down", "keep")[rng.choice(3, p=weights / weights.sum())]
    low, high = settings.resize
    if way == "up":
        return float(rng.uniform(max(1.0, low), max(1.0, high)))
    if way == "down":
        return float(rng.uniform(min(1.0, low), min(1.0, high)))
    return 1.0
