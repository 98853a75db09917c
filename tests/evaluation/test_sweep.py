"""Sweeps: tables against figures worked out by hand, the sheet's pixels, the plot's points."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.errors import SettingsError
from faithdiff_core.evaluation.contact_sheet import SheetImage, contact_sheets
from faithdiff_core.evaluation.metrics import blur
from faithdiff_core.evaluation.sweep import Axis, Layout, SweepResult, file_stem, points
from faithdiff_core.evaluation.sweep_tables import sweep_csv, sweep_markdown
from faithdiff_core.evaluation.tradeoff import plot_tradeoff

STEPS, CFG, START = Axis("steps", (10, 20, 30)), Axis("cfg", (2.0, 5.0)), Axis("start", ("lr", "noise"))


def _results(axes: list[Axis], images: str = "ab", seeds: int = 2) -> list[SweepResult]:
    """Scores that tell image, seed and point apart: psnr = 100 image + 10 index of the point + seed."""
    return [
        SweepResult(
            image, point, seed, Path("images") / image / "x.png", {"psnr": 100.0 * i + 10 * p + seed, "lpips": p / 10}
        )
        for i, image in enumerate(images)
        for p, point in enumerate(points(axes))
        for seed in range(seeds)
    ]


def test_two_axes_are_laid_out_as_table_10() -> None:
    axes = [CFG, STEPS]
    text = sweep_markdown(
        axes, _results(axes), {"psnr": False, "lpips": True}, {"musiq": "no weights"}, ("psnr", "lpips")
    )
    lines = text.splitlines()
    top = lines.index("## psnr ↑ / lpips ↓")
    # The mean over images 0 and 1 and seeds 0 and 1 adds 50.5 to ten times the point's index.
    assert lines[top + 2 : top + 6] == [
        "| cfg \\ steps | 10 | 20 | 30 |",
        "|---|---|---|---|",
        "| 2 | 50.5000 / 0.0000 | 60.5000 / 0.1000 | 70.5000 / 0.2000 |",
        "| 5 | 80.5000 / 0.3000 | 90.5000 / 0.4000 | 100.5000 / 0.5000 |",
    ]
    # Two images, 100 apart: t(0.975, 1) * (100 / sqrt 2) / sqrt 2 = 12.7062 * 50.
    best = lines[lines.index("## psnr ↑") + 5]
    assert best == "| 5 | 80.5000 ± 635.3102 | <u>90.5000 ± 635.3102</u> | **100.5000 ± 635.3102** |"
    lower = lines[lines.index("## lpips ↓") + 4]
    assert lower.startswith("| 2 | **0.0000 ± 0.0000** | <u>0.1000 ± 0.0000</u> |")
    assert "missing: musiq: no weights" in lines


def test_an_axis_of_two_values_gives_differences_as_table_11() -> None:
    axes = [STEPS, START]
    lines = sweep_markdown(axes, _results(axes, "a"), {"psnr": False}, {}).splitlines()
    top = lines.index("## Differences: start lr - start noise")
    # Each point of `noise` follows that of `lr`: 10 less, for every image and seed alike.
    assert lines[top + 2 : top + 8] == [
        "| steps | Δ psnr ↑ |",
        "|---|---|",
        *(f"| {label} | -10.0000 ± 0.0000 |" for label in ("10", "20", "30", "mean")),
    ]
    only = sweep_markdown([START], _results([START], "a", seeds=1), {"psnr": False}, {})
    assert "| lr - noise | -10.0000 |" in only
    assert "| start | lr | noise |" in only


def test_further_axes_have_tables_of_their_own_and_failures_no_means() -> None:
    axes = [STEPS, CFG, START]
    results = _results(axes, "a", seeds=1)
    results[0] = SweepResult("a", results[0].point, 0, Path("x.png"), {}, "out of memory")
    text = sweep_markdown(axes, results, {"psnr": False}, {})
    assert "## psnr ↑, start lr" in text
    assert "## psnr ↑, start noise" in text
    assert "| 2 | - | 40.0000 | <u>80.0000</u> |" in text
    assert "failed: a, steps 10, cfg 2, start lr, seed 0: out of memory" in text
    rows = list(csv.DictReader(io.StringIO(sweep_csv(axes, results, ["psnr"]))))
    assert len(rows) == 12
    assert (rows[0]["psnr"], rows[0]["failure"]) == ("", "out of memory")
    assert (rows[5]["steps"], rows[5]["cfg"], rows[5]["start"], rows[5]["psnr"]) == ("20", "2", "noise", "50.000000")


def test_names_of_files_differ_where_points_do() -> None:
    assert file_stem([STEPS, START], (10, "lr"), 3) == "steps-10_start-lr_seed-3"
    texts = Axis("text", ("a/b", "a:b", "é" * 300, "é" * 301))
    names = [file_stem([texts], point) for point in points([texts])]
    assert len(set(names)) == 4
    assert all(name.isascii() and len(name) < 140 and not set(name) & set('/\\:*?"<>|') for name in names)
    with pytest.raises(SettingsError, match="steps: the value 10 is given twice"):
        Axis("steps", (10, 20, 10))


def _solid(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (200, 150)) -> Path:
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    image[100:140, 20:60] = colour  # the only place where results differ
    Image.fromarray(image).save(path)
    return path


def test_the_sheet_shows_every_result_in_its_row_and_column(tmp_path: Path) -> None:
    axes = [STEPS, CFG]
    colours = {point: (20 * i, 255 - 30 * i, 100 + 10 * i) for i, point in enumerate(points(axes))}
    files = {point: _solid(tmp_path / f"{i}.png", colour) for i, (point, colour) in enumerate(colours.items())}
    lost = (20, 5.0)
    source = tmp_path / "in.png"
    Image.new("RGB", (100, 75), (1, 2, 3)).save(source)
    reference = _solid(tmp_path / "hq.png", (250, 250, 0))
    shown = {**files, lost: tmp_path / "none.png"}
    (sheet,) = contact_sheets(axes, [SheetImage("photo", source, shown, reference)], cell=48)
    pixels = np.asarray(sheet)

    def where(colour: tuple[int, int, int]) -> tuple[float, float]:
        rows, columns = np.nonzero((pixels == colour).all(axis=2))
        assert rows.size >= 1000, colour  # the part was found: its 40 x 40 pixels, some of them under a tag
        return float(rows.mean()), float(columns.mean())

    centres = {point: where(colour) for point, colour in colours.items() if point != lost}
    top, bottom = centres[10, 2.0][0], centres[10, 5.0][0]
    assert bottom - top >= 48
    for (steps, cfg), (y, x) in centres.items():
        assert y == pytest.approx(top if cfg == 2.0 else bottom)
        assert x == pytest.approx(centres[steps, 2.0][1])
    assert centres[10, 2.0][1] < centres[20, 2.0][1] < centres[30, 2.0][1]
    assert not (pixels == colours[lost]).all(axis=2).any()
    assert where((221, 221, 221))[0] == pytest.approx(bottom, abs=5)  # the place of the lost one is grey
    assert where((250, 250, 0))[1] < centres[10, 2.0][1]
    assert where((1, 2, 3))[1] < centres[10, 2.0][1]


def test_a_sheets_part_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {(v,): _solid(tmp_path / f"{v}.png", (v, 0, 0)) for v in (10, 20)}
    image = SheetImage("photo", _solid(tmp_path / "in.png", (90, 90, 90)), files)
    axis = [Axis("steps", (10, 20))]
    (sheet,) = contact_sheets(axis, [image], cell=64, crop=(100, 0, 32, 16))
    pixels = np.asarray(sheet).astype(int)
    assert (pixels == 90).all(axis=2).sum() >= 5 * 32 * 32  # twice as large: 32 x 16 fits two times into a cell
    (elsewhere,) = contact_sheets(axis, [image], cell=64)
    coloured = [int((x[..., 0] > x[..., 1] + 5).sum()) for x in (pixels, np.asarray(elsewhere).astype(int))]
    assert coloured[1] - coloured[0] >= 2 * 40 * 40  # what differs is shown where it is not cropped away
    with pytest.raises(SettingsError, match="does not lie within the results of photo, which have 200 x 150 pixels"):
        list(contact_sheets(axis, [image], crop=(190, 0, 32, 16)))
    monkeypatch.setattr("faithdiff_core.evaluation.contact_sheet.PAGE_HEIGHT", 400)
    pages = list(contact_sheets(axis, [image] * 5, cell=64))
    assert [page.height <= 400 + 48 for page in pages] == [True] * len(pages)
    assert len(pages) > 1
    assert list(contact_sheets(axis, [SheetImage("photo", files[10,], {(10,): None})])) == []


def test_the_plot_has_its_points_and_better_is_up_and_right() -> None:
    layout = Layout.of([STEPS, CFG])
    means = {point: (20.0 + i, 0.5 - i / 20) for i, point in enumerate(points(layout.axes))}
    means[30, 5.0] = (math.inf, 0.1)
    figure = plot_tradeoff(layout, means, ("psnr", "lpips"), {"psnr": False, "lpips": True}, (20, 5.0))
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert np.asarray(lines["cfg 2"].get_xdata()).tolist() == [20, 22, 24]
    assert np.asarray(lines["cfg 5"].get_xdata()).tolist() == [21, 23]
    assert not axes.xaxis_inverted()
    assert axes.yaxis_inverted()
    assert "ring marks the published settings" in axes.get_title()
    assert {text.get_text() for text in axes.texts} == {"10", "20", "30"}


def test_blur_orders_images_by_their_blur() -> None:
    from scipy.ndimage import gaussian_filter
    from skimage import data

    sharp = data.chelsea()[:128, :128]
    scores = [blur(gaussian_filter(sharp, (sigma, sigma, 0))) for sigma in (0.01, 1, 3)]
    assert scores == sorted(scores)
    assert scores[2] - scores[0] > 0.2
