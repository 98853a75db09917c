"""The command `caption`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import captioners as tiny_captioners

from faithdiff_core.captions.captioner import load_captioner
from faithdiff_core.cli import main
from faithdiff_core.images.reading import load_image


def test_it_writes_the_captioners_answer_beside_each_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_captioners.make_git(tmp_path / "model")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "deep/b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
    (folder / "c.txt").write_text("By hand.")
    (folder / "d.png").write_bytes(b"no image")
    words = ["caption", str(folder), "--model", str(model), "--max-new-tokens", "8", "--prompt", ""]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "d.png" in said.err
    assert "1 of 3 images" in said.err
    captioner = load_captioner(model)
    for name in ("a", "deep/b"):
        expected = captioner.caption(load_image(folder / f"{name}.png").colors, "", 8)
        assert (folder / f"{name}.txt").read_text() == f"{expected}\n"
    assert (folder / "c.txt").read_text() == "By hand."
    (folder / "d.png").unlink()
    assert main(words) == 0
    assert "all 3 images have captions" in capsys.readouterr().out
