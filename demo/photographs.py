"""The images that the demo model learns from: photographs out of installed packages, and generated ones.

Nothing is downloaded here: the photographs come with scikit-image, scikit-learn and three packages of desktop
backgrounds, which `demo/model.yaml` names. Some photographs are held out and never seen in training.
"""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from faithdiff_core.images.formats import pillow_formats

GENERATED_SIDE = 384
"""Side of a generated image in pixels."""


def package_folder(name: str) -> str:
    """Folder of an installed Python package, without importing it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"The package {name} is needed for its photographs; install it with pip.")
    return str(Path(spec.origin).parent)


def find_photographs(patterns: Sequence[str], share: str) -> list[Path]:
    """Resolve the configuration's patterns to files.

    Args:
        patterns: globs; `{skimage}`, `{sklearn}` and `{share}` stand for folders.
        share: folder of the installed desktop backgrounds, /usr/share on Debian.

    Raises:
        FileNotFoundError: a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = pattern.replace("{share}", share)
        for package in ("skimage", "sklearn"):
            if "{" + package + "}" in path:
                path = path.replace("{" + package + "}", package_folder(package))
        found = sorted(glob.glob(path))
        if not found:
            raise FileNotFoundError(f"No file matches {path}; install the package that has it (see demo/model.yaml).")
        files += [Path(f) for f in found]
    return files


def load_photograph(path: Path, long_side: int) -> Image.Image:
    """Read a photograph as RGB, its long side at most `long_side` pixels; reducing it removes JPEG traces and noise."""
    with Image.open(path, formats=pillow_formats()) as opened:
        opened.draft("RGB", (2 * long_side, 2 * long_side))
        image = opened.convert("RGB")
    factor = long_side / max(image.size)
    if factor < 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def generated_image(seed: int) -> Image.Image:
    """Draw one image: smooth colours, a texture, shapes with sharp edges, and lines of text, as the seed has it."""
    rng = np.random.default_rng(seed)
    side = GENERATED_SIDE
    canvas = _texture(rng, side, smoothness=rng.uniform(1.6, 2.6))
    if rng.random() < 0.5:
        mask = (_texture(rng, side, 2.2)[..., :1] > 0.5).astype(np.float64)
        canvas = canvas * mask + _texture(rng, side, rng.uniform(0.8, 2.0)) * (1 - mask)
    if rng.random() < 0.3:
        y, x = np.mgrid[:side, :side] / side
        angle, wave = rng.uniform(0, np.pi), rng.uniform(6, 40)
        stripes = 0.5 + 0.5 * np.sin(2 * np.pi * wave * (x * np.cos(angle) + y * np.sin(angle)))
        canvas = canvas * (0.6 + 0.4 * stripes[..., None])
    big = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8)).resize(
        (2 * side, 2 * side), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(big)
    for _ in range(int(rng.integers(2, 14))):
        _shape(draw, rng, 2 * side)
    if rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 5))):
            text = "".join(chr(c) for c in rng.integers(ord("A"), ord("z") + 1, rng.integers(4, 16)))
            font = ImageFont.load_default(size=int(rng.integers(24, 90)))
            draw.text(tuple(rng.integers(0, int(1.5 * side), 2)), text, fill=_colour(rng), font=font)
    if rng.random() < 0.3:
        big = big.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 3))))
    return big.resize((side, side), Image.Resampling.LANCZOS)


def _texture(rng: np.random.Generator, side: int, smoothness: float) -> np.ndarray:
    """Coloured noise with a power law spectrum, like that of natural images, (side, side, 3) in [0, 1]."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / side) ** smoothness
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * amplitude, (side, side)) for _ in range(3)
    ]
    planes = [(p - p.mean()) / p.std() for p in planes]
    luminance = planes[0]
    # Channels of natural images go together, so the planes are mixed with a common one.
    mixed = np.stack([0.8 * luminance + rng.uniform(0, 0.5) * p for p in planes], axis=-1)
    return (rng.uniform(0.3, 0.7, 3) + rng.uniform(0.08, 0.25) * mixed).clip(0, 1)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return red, green, blue


def _shape(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    kind = rng.integers(0, 4)
    x, y = (int(v) for v in rng.integers(-side // 8, side, 2))
    w, h = (int(v) for v in rng.integers(side // 40, side // 3, 2))
    if kind == 0:
        draw.ellipse((x, y, x + w, y + h), fill=_colour(rng))
    elif kind == 1:
        draw.rectangle((x, y, x + w, y + h), fill=_colour(rng))
    elif kind == 2:
        points = [(x + int(rng.integers(0, w + 1)), y + int(rng.integers(0, h + 1))) for _ in range(4)]
        draw.polygon(points, fill=_colour(rng))
    else:
        x2, y2 = (int(v) for v in rng.integers(0, side, 2))
        draw.line((x, y, x2, y2), fill=_colour(rng), width=int(rng.integers(1, side // 40)))
