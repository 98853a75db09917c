"""The figures of the row about tile grids, on images whose seams are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.rows_grid import PUBLISHED, SUGGESTED, seam_figure


def test_seam_figure_sees_seams_at_tile_borders_alone() -> None:
    generator = np.random.default_rng(0)
    reference = generator.integers(80, 160, (256, 320, 3)).astype(np.uint8)
    grids = PUBLISHED.of(Image.fromarray(reference), 128, seed=0)
    assert grids.at(1.0).columns == [0, 8, 16, 24]
    assert seam_figure(reference, reference, grids, 1.0) == pytest.approx(1.0)
    seam, elsewhere = reference.copy(), reference.copy()
    seam[:, 128:192] += 60
    elsewhere[:, 100:150] += 60
    assert seam_figure(seam, reference, grids, 1.0) > 1.05
    assert seam_figure(elsewhere, reference, grids, 1.0) < 1.0


def test_grids_are_those_of_the_result() -> None:
    image = Image.new("RGB", (4096, 4090))
    assert len(PUBLISHED.of(image, 1024, 0)) == 49
    assert len(SUGGESTED.of(image, 1024, 0)) == 25
