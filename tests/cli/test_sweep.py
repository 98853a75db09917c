"""The command `sweep` on a tiny model: its results, going on after a stop, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.cli import main
from faithdiff_core.engine.restoration import Restoration

if TYPE_CHECKING:
    from conftest import Golden

QUICK = ("--device", "cpu", "--dtype", "fp32", "--tile", "64", "--quiet")


@pytest.fixture
def model(tiny_sdxl: Path, golden: Golden) -> tuple[str, ...]:
    return ("--model", str(tiny_sdxl), "--faithdiff", str(golden.model), *QUICK)


def _image(path: Path, side: int = 24, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_sweep_stopped_and_continued(
    tmp_path: Path, model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        _image(tmp_path / "in" / f"{name}.png", seed=seed)
        _image(tmp_path / "hq" / f"{name}.png", 48, seed)
    out = tmp_path / "out"
    words = ["sweep", str(tmp_path / "in"), "-o", str(out), "--reference", str(tmp_path / "hq"), *model]
    words += ["--steps", "1,2", "--start", "lr,noise", "--cfg", "1", "--metrics", "psnr,blur", "--cell", "48"]
    restore, calls = Restoration.restore, 0

    def stopped(self: Restoration, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return restore(self, *args, **more)

    monkeypatch.setattr(Restoration, "restore", stopped)
    assert main(words) == 130
    assert "3 of 8 results are there" in capsys.readouterr().err
    first = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    assert len(first) == 3
    assert main(words) == 0
    assert calls == 4 + 5
    results = sorted((out / "images").rglob("*.png"))
    assert len(results) == 8
    assert {path: path.stat().st_mtime_ns for path in first} == first

    # Each result is what `restore` makes with these settings.
    monkeypatch.undo()
    alone = ["--steps", "2", "--start", "noise", "--cfg", "1", "-o", str(tmp_path / "one.png")]
    assert main(["restore", str(tmp_path / "in" / "b.png"), *model, *alone]) == 0
    swept = out / "images" / "b" / "steps-2_start-noise_seed-0.png"
    assert np.array_equal(_pixels(swept), _pixels(tmp_path / "one.png"))

    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == 8
    (row,) = [r for r in rows if r["file"] == "images/b/steps-2_start-noise_seed-0.png"]
    error = _pixels(swept).astype(float) - _pixels(tmp_path / "hq" / "b.png")
    assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / (error**2).mean()), abs=1e-5)
    assert "## Differences: start lr - start noise" in (out / "sweep.md").read_text()
    assert {name for name in os.listdir(out) if name != "images"} == {
        "sweep.csv",
        "sweep.md",
        "sheet.png",
        "tradeoff.png",
    }
    for name in ("sheet.png", "tradeoff.png"):
        assert _pixels(out / name).std() > 10

    # Only what changed is made again: a deleted file, then all of one image, then all that another setting changes.
    times = {path: path.stat().st_mtime_ns for path in results}
    swept.unlink()
    assert main(words) == 0
    assert [path for path in results if path.stat().st_mtime_ns != times[path]] == [swept]
    _image(tmp_path / "in" / "a.png", seed=7)
    times = {path: path.stat().st_mtime_ns for path in results}
    assert main(words) == 0
    assert {path.parent.name for path in results if path.stat().st_mtime_ns != times[path]} == {"a"}
    recipe = json.loads(Image.open(swept).info["faithdiff"])
    assert (recipe["steps"], recipe["start"], len(recipe["sweep"])) == (2, "noise", 16)


def test_what_a_mask_leaves_out_stays(tmp_path: Path, model: tuple[str, ...]) -> None:
    """Results are those of `restore` with the mask; another mask makes them again."""
    source, masks = _image(tmp_path / "a.png", 48), tmp_path / "masks"
    masks.mkdir()
    out = tmp_path / "out"
    given = ["--mask", str(masks / "a.png"), "--feather", "0", "--scale", "1", "--cfg", "1"]
    words = ["sweep", str(source), "-o", str(out), *model, *given, "--steps", "1,2", "--metrics", "blur"]
    swept = out / "images" / "a" / "steps-2_seed-0.png"
    for part in (np.s_[:24, :], np.s_[:, 32:]):
        white = np.zeros((48, 48), np.uint8)
        white[part] = 255
        Image.fromarray(white).save(masks / "a.png")
        assert main(words) == 0
        alone = ["--steps", "2", "--overwrite", "-o", str(tmp_path / "one.png")]
        assert main(["restore", str(source), *model, *given, *alone]) == 0
        assert np.array_equal(_pixels(swept), _pixels(tmp_path / "one.png"))
        kept = white == 0
        assert np.array_equal(_pixels(swept)[kept], _pixels(source)[kept])
        assert not np.array_equal(_pixels(swept)[~kept], _pixels(source)[~kept])
    times = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_seeds_alone_and_another_model(tmp_path: Path, tiny_sdxl: Path, golden: Golden) -> None:
    source, adapter = _image(tmp_path / "a.png"), tmp_path / "faithdiff.safetensors"
    adapter.write_bytes(golden.model.read_bytes())
    out = tmp_path / "out"
    words = ["sweep", str(source), "-o", str(out), "--model", str(tiny_sdxl), "--faithdiff", str(adapter), *QUICK]
    words += ["--steps", "1", "--cfg", "1", "--seed", "5", "--seeds", "2", "--metrics", "blur"]
    assert main(words) == 0
    assert "| seed | 5 | 6 |" in (out / "sweep.md").read_text()
    assert not (out / "tradeoff.png").exists()
    files = sorted((out / "images").rglob("*.png"))
    times = [path.stat().st_mtime_ns for path in files]
    os.utime(adapter, ns=(1, 1))  # a model that changed under its name makes other results
    assert main(words) == 0
    assert all(path.stat().st_mtime_ns != time for path, time in zip(files, times, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing is swept: give a setting several values"),
        (["--steps", "10,many"], "--steps takes int numbers, with commas between them, got 'many'"),
        (["--start", "lr,middle"], "--start takes one of lr, noise, with commas between them, got 'middle'"),
        (["--cfg", "2,50"], "--cfg must lie between 1 and 20, got 50"),
        (["--steps", "10,10"], "steps: the value 10 is given twice"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--seeds", "2", "--metrics", "psnr"], "psnr compare with a reference; give --reference"),
        (["--seeds", "2", "--metrics", "blur", "--plot", "psnr,blur"], "--plot takes two of the metrics blur"),
        (["--seeds", "2", "--crop", "1,2"], "--crop takes left,top,width,height"),
        (["--seeds", "2", "--reference", "hq.png"], "a.png becomes 48 x 48 pixels, its reference hq.png has 40 x 40"),
        (["--seeds", "2", "--mask", "none.png"], "There is no mask none.png"),
        (["--seeds", "2", "-o", "a.png"], "a.png is a file; a sweep writes a folder"),
    ],
)
def test_refusals_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _image(Path("a.png"))
    _image(Path("hq.png"), 40)
    metrics = () if "--metrics" in words else ("--metrics", "psnr" if "--reference" in words else "blur")
    assert main(["sweep", "a.png", "-o", "out", "--model", "m", "--faithdiff", "f", *metrics, *words]) in (1, 2)
    assert message in capsys.readouterr().err
