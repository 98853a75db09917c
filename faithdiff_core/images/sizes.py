"""Sizes of images, as numbers: the target size, shapes, and what formats can hold. It imports no torch."""

from __future__ import annotations

import math

from ..errors import SettingsError
from .formats import MAX_PIXELS, WEBP_SIDE

LARGEST_SIDE = {".jpg": 65500, ".jpeg": 65500, ".webp": WEBP_SIDE}
"""What libjpeg and libwebp can hold, in pixels."""

SHAPE_TOLERANCE = 0.02
"""How far the width to height of two images of one shape may differ, as a part of it: rounding of the smaller one's
sides."""


def same_shape(height: int, width: int, other_height: int, other_width: int) -> bool:
    """Whether one size is the other one scaled alike in both directions."""
    return abs(height * other_width - width * other_height) <= SHAPE_TOLERANCE * height * other_width


def target_size(
    height: int,
    width: int,
    *,
    scale: float | None = None,
    longest_side: int | None = None,
    megapixels: float | None = None,
) -> tuple[int, int]:
    """The size to enlarge (or reduce) an image to; the aspect ratio stays.

    Sides are rounded to the nearest pixel, halves up, and are at least 1.

    Args:
        height, width: of the image, in pixels.
        scale: factor on both sides; taken where neither of the others is given.
        longest_side: pixels of the longer side.
        megapixels: area in millions of pixels.

    Returns:
        (height, width).

    Raises:
        SettingsError: nothing or too much is given, a value is not positive, or the result has more than `MAX_PIXELS`.
    """
    if longest_side is not None and megapixels is not None:
        raise SettingsError("Give a longest side or a number of megapixels, not both.")
    if longest_side is not None:
        factor = check_positive(longest_side, what="The longest side") / max(height, width)
    elif megapixels is not None:
        factor = math.sqrt(check_positive(megapixels, what="The number of megapixels") * 1e6 / (height * width))
    elif scale is not None:
        factor = check_positive(scale, what="The scale")
    else:
        raise SettingsError("Give a scale, a longest side or a number of megapixels.")
    # The product is rounded first, so that 0.1 * 5 in binary counts as the half that it is.
    sides = [max(1, math.floor(round(side * factor, 6) + 0.5)) for side in (height, width)]
    if sides[0] * sides[1] > MAX_PIXELS:
        raise SettingsError(
            f"An image of {width} x {height} would become {sides[1]} x {sides[0]}, more than the {MAX_PIXELS} pixels "
            f"that are worked with. Choose a smaller scale."
        )
    return sides[0], sides[1]


def check_positive(value: float, *, what: str) -> float:
    """Check a number that has to be finite and above 0.

    Raises:
        SettingsError: it is not.
    """
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise SettingsError(f"{what} must be a positive number, got {value}.")
    return value
