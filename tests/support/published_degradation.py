"""The published degradation, written again from its description for comparison; slow and plain.

Two passes of blur, resize, noise and JPEG after Real-ESRGAN (Wang et al. 2021, section 3), with FaithDiff's ranges.
Every part is computed in another way than in `faithdiff_core.training`: kernels by inverse covariance matrices, filters
by SciPy, JPEG by SciPy's DCT.
"""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from scipy.ndimage import correlate
from scipy.special import j1

from faithdiff_core.training.degradation import DegradationConfig, degrade
from faithdiff_core.training.jpeg import CHROMINANCE, LUMINANCE

Image = NDArray[np.float64]
"""(height, width, 3), RGB in [0, 1]."""

STATISTICS = ("PSNR to the reduced original", "gradient", "Laplacian", "colour gradient", "mean shift")
"""What `statistics` gives, in this order; the last four in 8-bit units."""

FAMILIES = (
    (0.45, "normal", True),
    (0.25, "normal", False),
    (0.12, "general", True),
    (0.03, "general", False),
    (0.12, "plateau", True),
    (0.03, "plateau", False),
)
"""Weight, shape and whether the kernel is round, of each family of kernels."""


def _split(rng: np.random.Generator, low: float, high: float) -> float:
    return rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)


def _sinc(size: int, cutoff: float) -> NDArray[np.float64]:
    half = size // 2
    kernel = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            r = math.hypot(row - half, column - half)
            kernel[row, column] = cutoff * j1(cutoff * r) / (2 * math.pi * r) if r else cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _kernel(rng: np.random.Generator, largest_sigma: float) -> NDArray[np.float64]:
    size = int(rng.choice(np.arange(7, 22, 2)))
    if rng.random() < 0.1:
        return _sinc(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    weights = np.array([family[0] for family in FAMILIES])
    _, family, isotropic = FAMILIES[rng.choice(len(FAMILIES), p=weights / weights.sum())]
    one = rng.uniform(0.2, largest_sigma)
    two, angle = (one, 0.0) if isotropic else (rng.uniform(0.2, largest_sigma), rng.uniform(-math.pi, math.pi))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag([one**2, two**2]) @ turn.T)
    axis = np.arange(size) - size // 2
    places = np.stack(np.meshgrid(axis, axis), -1)
    distance = np.einsum("hwi,ij,hwj->hw", places, inverse, places)
    if family == "plateau":
        kernel = 1 / (1 + distance ** _split(rng, 1.0, 2.0))
    else:
        kernel = np.exp(-0.5 * distance ** (_split(rng, 0.5, 4.0) if family == "general" else 1.0))
    return kernel / kernel.sum()


def _filter(image: Image, kernel: NDArray[np.float64]) -> Image:
    return np.stack([correlate(image[..., c], kernel, mode="mirror") for c in range(3)], -1)


def _resize(image: Image, height: int, width: int, rng: np.random.Generator) -> Image:
    mode = rng.choice(["area", "bilinear", "bicubic"])
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    options = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(planes, (height, width), mode=str(mode), **options)[0].permute(1, 2, 0).numpy()


def _factor(rng: np.random.Generator, up: float, down: float, low: float, high: float) -> float:
    way = rng.random()
    return rng.uniform(1, high) if way < up else rng.uniform(low, 1) if way < up + down else 1.0


def _noise(image: Image, rng: np.random.Generator, sigma: float, poisson: float) -> Image:
    gaussian, grey = rng.random() < 0.5, rng.random() < 0.4
    if gaussian:
        noise = rng.normal(0, rng.uniform(1, sigma) / 255, (*image.shape[:2], 1 if grey else 3))
        return (image + noise).clip(0, 1)
    level = (image.clip(0, 1) * 255).round() / 255
    if grey:
        level = ((level @ [0.2989, 0.587, 0.114]) * 255).round()[..., None] / 255
    photons = 2 ** math.ceil(math.log2(len(np.unique(level))))
    return (image + (rng.poisson(level * photons) / photons - level) * rng.uniform(0.05, poisson)).clip(0, 1)


def jpeg(image: Image, quality: float) -> Image:
    """The published JPEG: chroma repeated, nothing rounded to 8 bits."""
    factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    height, width = image.shape[:2]
    red, green, blue = np.moveaxis(
        np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge") * 255, -1, 0
    )
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = []
    for plane, table in (
        (luma - 128, LUMINANCE),
        ((blue - luma) / 1.772, CHROMINANCE),
        ((red - luma) / 1.402, CHROMINANCE),
    ):
        if table is CHROMINANCE:
            plane = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean((1, 3))
        steps = np.array(table) * factor
        rebuilt = np.empty_like(plane)
        for top in range(0, plane.shape[0], 8):
            for left in range(0, plane.shape[1], 8):
                block = np.s_[top : top + 8, left : left + 8]
                rebuilt[block] = idctn((dctn(plane[block], norm="ortho") / steps).round() * steps, norm="ortho")
        planes.append(rebuilt if table is LUMINANCE else rebuilt.repeat(2, 0).repeat(2, 1))
    luma, cb, cr = planes[0] + 128, planes[1], planes[2]
    red, blue = luma + 1.402 * cr, luma + 1.772 * cb
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return (np.stack([red, green, blue], -1)[:height, :width] / 255).clip(0, 1)


def published(image: Image, rng: np.random.Generator) -> Image:
    """A low-quality image, four times smaller."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    out = _filter(image, _kernel(rng, 3.0))
    factor = _factor(rng, 0.2, 0.7, 0.3, 1.5)
    out = _resize(out, int(image.shape[0] * factor), int(image.shape[1] * factor), rng)
    out = jpeg(_noise(out, rng, 15, 2.0), rng.uniform(60, 95))
    if rng.random() < 0.5:
        out = _filter(out, _kernel(rng, 1.5))
    factor = _factor(rng, 0.3, 0.4, 0.6, 1.2)
    out = _resize(out, int(height * factor), int(width * factor), rng)
    out = _noise(out, rng, 12, 1.0)
    quality, first = rng.uniform(60, 100), rng.random() < 0.5
    out = jpeg(out, quality) if first else out
    out = _resize(out, height, width, rng)
    if rng.random() < 0.8:
        out = _filter(out, _sinc(int(rng.choice(np.arange(7, 22, 2))), rng.uniform(math.pi / 3, math.pi)))
    out = out if first else jpeg(out.clip(0, 1), quality)
    return (out.clip(0, 1) * 255).round() / 255


def statistics(low: Image, original: Image) -> tuple[float, ...]:
    """Five numbers of a low-quality image: see `STATISTICS`."""
    height, width = low.shape[:2]
    reduced = original.reshape(height, original.shape[0] // height, width, original.shape[1] // width, 3).mean((1, 3))
    grey = low.mean(-1)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    colour = low - low.mean(-1, keepdims=True)
    return (
        10 * math.log10(1 / ((low - reduced) ** 2).mean()),
        255 * float(np.abs(np.diff(grey, axis=1)).mean()),
        255 * float(laplacian.std()),
        255 * float(np.diff(colour, axis=1).std()),
        255 * float(low.mean() - reduced.mean()),
    )


def photographs(count: int, side: int = 256) -> list[np.ndarray]:
    """Parts of photographs, (side, side, 3) in [0, 1]."""
    from skimage import data

    rng, wholes = np.random.default_rng(0), (data.astronaut(), data.coffee(), data.chelsea())
    parts = []
    for index in range(count):
        whole = wholes[index % 3]
        top, left = (int(rng.integers(0, whole.shape[axis] - side + 1)) for axis in (0, 1))
        parts.append(whole[top : top + side, left : left + side] / 255)
    return parts


def compare(count: int) -> dict[str, NDArray[np.float64]]:
    """Statistics of low-quality images by the process that made them, (count, 5) each."""
    found: dict[str, list[tuple[float, ...]]] = {"published": [], "ours": [], "encoder": []}
    for index, image in enumerate(photographs(count)):
        original = PIL.Image.fromarray((image * 255).round().astype(np.uint8))
        found["published"].append(statistics(published(image, np.random.default_rng([1, index])), image))
        for name, config in (("ours", DegradationConfig()), ("encoder", DegradationConfig(jpeg="encoder"))):
            low = degrade(original, config, np.random.default_rng([2, index]))
            found[name].append(statistics(np.asarray(low) / 255, image))
    return {name: np.array(rows) for name, rows in found.items()}
