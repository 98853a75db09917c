"""Captions of images' parts on the command line: `caption --tiles` writes them, `--captions tiles` takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from support.archive import files
from tiny_models import captioners as tiny_captioners

from faithdiff_core.captions.captioner import load_captioner
from faithdiff_core.captions.tile_captions import TileCaptions, read_tile_captions
from faithdiff_core.captions.trim import trim_caption
from faithdiff_core.cli import main
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.images.reading import load_image
from faithdiff_core.tiling.layout import grid_layout

if TYPE_CHECKING:
    from conftest import Golden

HEIGHT, WIDTH = 72, 136
METHOD = ("--steps", "1", "--cfg", "1", "--tile", "64", "--device", "cpu", "--dtype", "fp32")
WORDS = (*METHOD, "--scale", "1", "--prompt", "a harbour", "--captions", "tiles", "--tile-mix", "0.5")


@pytest.fixture
def model(tiny_sdxl: Path, golden: Golden) -> tuple[str, ...]:
    return ("--model", str(tiny_sdxl), "--faithdiff", str(golden.model))


def _image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def _captions(*captions: str, height: int = HEIGHT, width: int = WIDTH) -> TileCaptions:
    return TileCaptions(height, width, grid_layout(height, width, len(captions), 1), captions)


def _recipe(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text["faithdiff"])


def test_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The captioner's answer for each part; what is there is kept, and what is missing is added."""
    model = tiny_captioners.make_git(tmp_path / "model")
    image, folder = _image(tmp_path / "images" / "a.png"), tmp_path / "images"
    (folder / "a.txt").write_text("By hand.")
    words = ["caption", str(folder), "--model", str(model), "--max-new-tokens", "6", "--prompt", ""]
    assert main([*words, "--tiles", "2x1", "--tile-overlap", "0.25"]) == 0
    assert (folder / "a.txt").read_text() == "By hand."
    layout = grid_layout(HEIGHT, WIDTH, 2, 1, overlap=0.25)
    captioner = load_captioner(model)
    expected = tuple(captioner.caption(crop, "", 6) for crop in layout.crops(load_image(image).colors))
    got = read_tile_captions((folder / "a.tiles.json").read_bytes(), "a.tiles.json")
    assert (got.captions, got.height, got.width) == (tuple(map(str.strip, expected)), HEIGHT, WIDTH)
    assert got.layout.pixel_boxes(HEIGHT, WIDTH) == layout.pixel_boxes(HEIGHT, WIDTH)
    assert main([*words, "--tiles", "64"]) == 0
    assert "all 1 images have captions" in capsys.readouterr().out
    assert main([*words, "--tiles", "64", "--overwrite"]) == 0
    sides = {(tile["width"], tile["height"]) for tile in json.loads((folder / "a.tiles.json").read_text())["tiles"]}
    assert sides == {(64, 64)}
    for bad in ("0x2", "1x2x3", "two"):
        assert main([*words, "--tiles", bad]) == 2
        assert f"expected COLUMNSxROWS, such as 3x2, or a side in pixels, got {bad}" in capsys.readouterr().err
    assert main([*words, "--tiles", "2x2", "--tile-overlap", "1"]) == 2


def test_restore(
    tmp_path: Path, model: tuple[str, ...], tiny_sdxl: Path, golden: Golden, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline's result, in the ordinary command and in an archive's, which sees that captions have changed."""
    folder, out, archive = tmp_path / "in", tmp_path / "out", tmp_path / "archive"
    image = _image(folder / "a.png")
    _image(folder / "none.png")
    captions = _captions("The image shows a sky. Blue. Far.", "The image shows a harbour.")
    (folder / "a.tiles.json").write_bytes(b"\xef\xbb\xbf" + captions.to_json())
    words = ["restore", str(folder), *model, *WORDS, "--trim-captions"]
    assert main([*words, "-o", str(out)]) == 1
    assert "none.png: There is no none.tiles.json beside the image. Write it with `caption" in capsys.readouterr().err
    pipeline = FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    expected = pipeline(
        load_image(image).colors[None],
        prompt="a harbour",
        seed=0,
        scale=1.0,
        steps=1,
        cfg=1.0,
        tile=64,
        tile_captions=captions.each(trim_caption),
        tile_mix=0.5,
    )[0]
    assert (load_image(out / "a.png").colors - expected).abs().max() < 0.51 / 255
    recipe = _recipe(out / "a.png")
    assert (recipe["prompt"], recipe["tile_mix"]) == ("a harbour", 0.5)
    assert recipe["tile_captions"]["tiles"][0]["caption"] == "A sky. Blue."

    def archived() -> str:
        assert main([*words, "-o", str(archive), "--workers", "1"]) == 1
        said = capsys.readouterr().err
        assert "none.tiles.json" in said
        return said

    assert "1 restored, 0 skipped" in archived()
    assert files(archive) == files(out)
    assert "0 restored, 1 skipped" in archived()
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/captioned", recursive=True)
    assert main([words[0], "memory://captioned", *words[2:], "-o", "memory://restored"]) == 1
    assert memory.cat("/restored/a.png") == (out / "a.png").read_bytes()
    (folder / "a.tiles.json").write_bytes(_captions("Sky at night.", "A harbour.").to_json())
    assert "1 restored, 0 skipped" in archived()
    assert not torch.equal(load_image(archive / "a.png").colors, load_image(out / "a.png").colors)


def test_sweep(tmp_path: Path, model: tuple[str, ...]) -> None:
    """Other captions are other results."""
    image, out = _image(tmp_path / "a.png"), tmp_path / "out"
    words = ["sweep", str(image), "-o", str(out), *model, *WORDS, "--seeds", "2", "--metrics", "blur"]
    digests = []
    for first in ("sky", "sky", "sea"):
        (tmp_path / "a.tiles.json").write_bytes(_captions(first, "harbour").to_json())
        assert main(words) == 0
        results = sorted((out / "images").rglob("*.png"))
        assert len(results) == 2
        digests.append([_recipe(file)["sweep"] for file in results])
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_captions_alone_is_followed_by_an_image(tmp_path: Path, model: tuple[str, ...]) -> None:
    image = _image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A cat.")
    words = [*METHOD, "--scale", "1", "-o", str(tmp_path / "out.png")]
    assert main(["restore", *model, *words, "--captions", str(image)]) == 0
    assert _recipe(tmp_path / "out.png")["prompt"] == "A cat."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile-mix", "0.5"], "--tile-mix needs --captions tiles"),
        (["--captions", "tiles", "--tile-mix", "1.5"], "--tile-mix must lie between 0 and 1, got 1.5"),
        (["--captions", "tiles", "--attribute", "cat", "--prompt", "cat"], "--attribute shows words of one prompt"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    image = _image(tmp_path / "a.png")
    assert main(["restore", str(image), "-o", "out", "--model", "m", "--faithdiff", "f", *words]) == 2
    assert message in capsys.readouterr().err
