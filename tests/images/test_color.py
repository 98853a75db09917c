"""Colour correction beyond the recorded cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from faithdiff_core import ColorFix, SettingsError, adain, fix_colors, wavelet
from faithdiff_core.images.color import low_frequencies


def images(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(seed))


def test_adain_takes_mean_and_deviation() -> None:
    content, style = images(2) * 0.5, images(2, 30, 20, seed=1) * 0.8 + 0.1
    fixed = adain(content, style).numpy()
    for axis in (0, 1):
        for channel in range(3):
            mean, deviation = style[axis, channel].numpy().mean(), style[axis, channel].numpy().std(ddof=1)
            np.testing.assert_allclose(fixed[axis, channel].mean(), mean, atol=1e-5)
            np.testing.assert_allclose(fixed[axis, channel].std(ddof=1), deviation, atol=1e-3)


@pytest.mark.parametrize("method", [ColorFix.ADAIN, ColorFix.WAVELET])
def test_an_image_keeps_its_own_colors(method: ColorFix) -> None:
    content = images(1)
    torch.testing.assert_close(fix_colors(content, content, method), content, rtol=0, atol=1e-5)


def test_low_frequencies_are_a_separable_blur() -> None:
    """Against numpy: each level pads by edges and applies [1 2 1] / 4 at distance 2^level on both axes."""
    x = images(1, 12, 17)
    expected = x[0].double().numpy()
    for level in range(3):
        r = 2**level
        for axis in (1, 2):
            padding = [(0, 0), (0, 0), (0, 0)]
            padding[axis] = (r, r)
            wide = np.pad(expected, padding, mode="edge")
            n = expected.shape[axis]
            parts = [wide.take(range(start, start + n), axis) for start in (0, r, 2 * r)]
            expected = 0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
    np.testing.assert_allclose(low_frequencies(x, 3)[0].numpy(), expected, atol=1e-6)


def test_wavelet_follows_local_colors() -> None:
    content, style = torch.full((1, 3, 256, 64), 0.5), torch.full((1, 3, 256, 64), 0.2)
    style[:, :, 128:] = 0.8
    fixed = wavelet(content, style)
    torch.testing.assert_close(fixed[:, :, :60], style[:, :, :60], atol=1e-5, rtol=0)
    torch.testing.assert_close(fixed[:, :, 196:], style[:, :, 196:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", list(ColorFix))
def test_batches_are_images_apart(method: ColorFix) -> None:
    content, style = images(3), images(3, seed=1)
    together = fix_colors(content, style, method)
    apart = torch.cat([fix_colors(c, s, method) for c, s in zip(content.split(1), style.split(1), strict=True)])
    assert torch.equal(together, apart)
    shared = fix_colors(content, style[:1], method)
    assert torch.equal(shared, fix_colors(content, style[:1].expand(3, -1, -1, -1), method))


def test_tiny_and_flat_images_stay_finite() -> None:
    for size in ((1, 1), (1, 7), (3, 2)):
        for method in ColorFix:
            assert torch.isfinite(fix_colors(torch.zeros(1, 3, *size), torch.ones(1, 3, *size), method)).all()


def test_none_changes_nothing() -> None:
    content = images(1)
    assert fix_colors(content, content * 0, "none") is content


def test_bad_arguments() -> None:
    x = images(2)
    with pytest.raises(SettingsError, match=r"\['adain', 'wavelet', 'none'\], got 'lab'"):
        fix_colors(x, x, "lab")
    with pytest.raises(SettingsError, match=r"2 result\(s\) of 3 channels, got shape \(3, 3, 40, 56\)"):
        fix_colors(x, images(3))
    with pytest.raises(SettingsError, match=r"got \(40, 56\) and \(40, 55\)"):
        wavelet(x, x[..., :55])
