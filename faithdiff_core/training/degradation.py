"""The two-stage degradation that makes low-quality images for training (Real-ESRGAN's process, paper section 4).

Blur, resize, noise and JPEG, twice, and a final sinc filter that makes the ringing of sharpened images. Every
range is a setting, and every draw comes from one generator, so a sample depends on its seed alone and not on the
worker that makes it.

Filtering and resizing are torch's, as in the published process (no antialiasing on reduction), the random numbers are
NumPy's. JPEG is the published process's transform (`jpeg.py`) or Pillow's encoder.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, SettingsError
from .jpeg import jpeg_transform
from .kernels import KernelMix, Range, check_probability, check_range, draw_kernel, draw_size, sinc_kernel

MIN_SIDE = 8
"""Smallest side in pixels that a degraded image is allowed to have on its way."""


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
        gaussian_sigma: in 8-bit units (0-255).
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
            check_probability(name, getattr(self, name))
        check_range("blur_sigma", self.blur_sigma, 0.01, 50)
        check_range("resize", self.resize, 0.05, 8)
        check_range("gaussian_sigma", self.gaussian_sigma, 0, 255)
        check_range("poisson_scale", self.poisson_scale, 0, 100)
        check_range("jpeg_quality", self.jpeg_quality, 1, 100)
        if not all(0 <= weight < math.inf for weight in self.resize_weights) or not any(self.resize_weights):
            raise SettingsError(
                f"resize_weights must be three finite numbers from 0, not all 0, got {list(self.resize_weights)}."
            )


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
        jpeg: `published` is the training code's transform, which repeats chroma samples and has fractional qualities;
            `encoder` is a real encoder and decoder (Pillow's), which interpolates chroma: nearer to users' images, and
            27 % less colour detail.
        clip_noise: clip the image to its range after noise, as published, and not only at the end.
    """

    scale: int = 4
    kernels: KernelMix = field(default_factory=KernelMix)
    first: Pass = FIRST_PASS
    second: Pass | None = SECOND_PASS
    final_sinc_probability: float = 0.8
    jpeg: Literal["published", "encoder"] = "published"
    clip_noise: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 16:
            raise SettingsError(f"scale must be a whole number from 1 to 16, got {self.scale}.")
        check_probability("final_sinc_probability", self.final_sinc_probability)


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


def _jpeg(rng: np.random.Generator, settings: Pass, kind: str) -> Callable[[Tensor], Tensor]:
    """Draw a quality; gives what compresses an image with it."""
    low, high = settings.jpeg_quality
    if kind == "published":
        quality = float(rng.uniform(low, high))
        return lambda image: jpeg_transform(image.clamp(0, 1), quality)
    whole = int(rng.integers(low, high + 1))
    return lambda image: _encoded(image, whole)


def _encoded(image: Tensor, quality: int) -> Tensor:
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
        if config.clip_noise:
            image = image.clamp(0, 1)
        compress = _jpeg(rng, settings, config.jpeg)
        if not last:
            image = compress(image)
            continue
        jpeg_first = rng.random() < 0.5
        if jpeg_first:
            image = compress(image)
        image = _resize(image, height, width, rng)
        if rng.random() < config.final_sinc_probability:
            image = filter_image(image, sinc_kernel(draw_size(rng, config.kernels), rng.uniform(math.pi / 3, math.pi)))
        if not jpeg_first:
            image = compress(image)
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
