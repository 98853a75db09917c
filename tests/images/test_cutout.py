"""Images with transparency: what is hidden counts nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from faithdiff_core.cli import main
from faithdiff_core.images.color import ADAIN_EPS, fix_colors
from faithdiff_core.images.cutout import bleed, resize_cutout
from faithdiff_core.images.geometry import resize_lanczos
from faithdiff_core.images.reading import load_image

if TYPE_CHECKING:
    from conftest import Golden

SIZE = 48


def _disc(hidden: float, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """A patterned disc with a soft edge on a hidden colour: (1, 3, H, W) and alpha (1, 1, H, W)."""
    y, x = np.mgrid[0:size, 0:size]
    alpha = np.clip(size * 0.36 - np.hypot(x - size / 2 + 0.5, y - size / 2 + 0.5) + 0.5, 0, 1)
    pattern = np.stack([0.9 - 0.3 * (x / size), 0.6 + 0.2 * np.sin(x / 4), 0.3 + 0.2 * np.cos(y / 5)])
    colors = np.where(alpha > 0, pattern, hidden)
    return torch.from_numpy(colors)[None].float(), torch.from_numpy(alpha)[None, None].float()


def _over(colors: torch.Tensor, alpha: torch.Tensor, background: float) -> np.ndarray:
    return (colors * alpha + background * (1 - alpha))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("hidden", [0.0, 1.0])
@pytest.mark.parametrize("side", [4 * SIZE, 100, 20])
def test_resize_is_premultiplied(hidden: float, side: int) -> None:
    colors, alpha = _disc(hidden)
    got, opacity = resize_cutout(colors, alpha, side, side)
    assert opacity is not None
    plain = resize_lanczos(colors, side, side)  # as it was: a rim of the hidden colour
    within = ((opacity > 0.02) & (opacity < 1))[0, 0].numpy()
    for background in (0.0, 1.0):
        # Resizing is linear: laid over a background and resized is what resized and laid over it must be.
        flat = resize_lanczos(colors * alpha + background * (1 - alpha), side, side)[0].permute(1, 2, 0).numpy()
        error = np.abs(_over(got, opacity, background) - flat)
        assert error[within].max() < 1e-4
        assert error.max() < 0.1  # Lanczos overshoots by up to 9 %, alpha ends at 0 and 1
        if side > SIZE and background != hidden:
            assert np.abs(_over(plain, opacity, background) - flat)[within].max() > 0.1


def test_hidden_colours_count_nowhere() -> None:
    results = [resize_cutout(*_disc(hidden), 60, 70)[0] for hidden in (0.0, 0.5, 1.0)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    # Under the transparent corner the disc's colours go on.
    assert (results[0][0, :, 0, 0] - torch.tensor([0.75, 0.6, 0.3])).abs().max() < 0.25


@pytest.mark.parametrize("alpha", [None, 1.0, 0.0])
def test_without_transparency_nothing_changes(alpha: float | None) -> None:
    colors, _ = _disc(0.0)
    opacity = None if alpha is None else torch.full((1, 1, SIZE, SIZE), alpha)
    assert torch.equal(resize_cutout(colors, opacity, 30, 90)[0], resize_lanczos(colors, 30, 90))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 5), (64, 64)])
def test_bleeding_keeps_what_is_seen(size: tuple[int, int]) -> None:
    colors = torch.rand(2, 3, *size)
    alpha = (torch.rand(2, 1, *size) > 0.6).float()
    alpha[:, :, 0, 0] = 1
    out = bleed(colors, alpha)
    seen = alpha.bool().expand_as(colors)
    assert torch.equal(out[seen], colors[seen])
    for image, opacity, filled in zip(colors, alpha, out, strict=True):  # weighted averages stay between the seen
        shown = image[:, opacity[0] > 0]
        assert (filled >= shown.amin(1)[:, None, None] - 1e-5).all()
        assert (filled <= shown.amax(1)[:, None, None] + 1e-5).all()


def test_adain_is_over_what_is_seen() -> None:
    torch.manual_seed(0)
    content, style = torch.rand(2, 3, 20, 30), torch.rand(1, 3, 20, 30) * 0.5 + 0.2
    alpha = torch.zeros(2, 1, 20, 30)
    alpha[0, :, 3:15, 4:20] = 1
    alpha[1, :, :9, :] = 1
    got = fix_colors(content, style, "adain", alpha)
    for i in range(2):
        seen = alpha[i, 0] > 0
        for channel in range(3):
            own, wanted = content[i, channel][seen].double().numpy(), style[0, channel][seen].double().numpy()
            scale = np.sqrt(wanted.var(ddof=1) + ADAIN_EPS) / np.sqrt(own.var(ddof=1) + ADAIN_EPS)
            expected = (own - own.mean()) * scale + wanted.mean()
            assert np.abs(got[i, channel][seen].numpy() - expected).max() < 1e-5
    assert torch.equal(fix_colors(content, style, "adain", torch.ones_like(alpha)), fix_colors(content, style, "adain"))


@pytest.mark.parametrize("how", [("--color-fix", "adain"), ("--color-fix", "wavelet", "--passes", "2")])
def test_the_command_line(tmp_path: Path, tiny_sdxl: Path, golden: Golden, how: tuple[str, ...]) -> None:
    """Cut-outs that differ in hidden colours alone are restored to one image."""
    results = []
    for name, hidden in (("black", 0.0), ("white", 1.0)):
        colors, alpha = _disc(hidden, 24)
        values = (torch.cat([colors, alpha], 1)[0].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(values, "RGBA").save(tmp_path / f"{name}.png")
        out = tmp_path / f"{name}_out.png"
        words = ["restore", str(tmp_path / f"{name}.png"), "-o", str(out), "--model", str(tiny_sdxl), *how]
        words += ["--faithdiff", str(golden.model), "--steps", "1", "--cfg", "1", "--device", "cpu", "--dtype", "fp32"]
        assert main(words) == 0
        results.append(load_image(out))
    assert torch.equal(results[0].colors, results[1].colors)
    assert results[0].alpha is not None
    assert results[1].alpha is not None
    assert torch.equal(results[0].alpha, results[1].alpha)
