"""The command `evaluate`."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.cli import evaluate as command
from faithdiff_core.errors import ImageError, SettingsError
from faithdiff_core.evaluation import scores as module


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    truth, results = tmp_path / "truth", tmp_path / "results"
    truth.mkdir()
    results.mkdir()
    for name, sigma in (("a", 5), ("b", 20)):
        clean = rng.integers(60, 190, (48, 64, 3)).astype(np.float64)
        noisy = clean + rng.normal(0, sigma, clean.shape)
        Image.fromarray(clean.astype(np.uint8)).save(truth / f"{name}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(results / f"{name}.png")
    return results, truth


def _arrays(folders: tuple[Path, Path], name: str) -> tuple[np.ndarray, np.ndarray]:
    result, truth = (np.asarray(Image.open(f / f"{name}.png"), dtype=np.float64) for f in folders)
    return result, truth


def test_psnr_is_its_formula(folders: tuple[Path, Path]) -> None:
    scores = module.evaluate(*folders, ["psnr"]).scores
    for name in "ab":
        result, truth = _arrays(folders, name)
        assert scores[name][0] == pytest.approx(10 * math.log10(255**2 / ((result - truth) ** 2).mean()), abs=1e-6)


def test_ssim_is_its_formula(folders: tuple[Path, Path]) -> None:
    from scipy.ndimage import gaussian_filter

    result, truth = _arrays(folders, "b")

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(result), blur(truth)
    vx, vy, cov = blur(result**2) - mx**2, blur(truth**2) - my**2, blur(result * truth) - mx * my
    full = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    # scikit-image leaves the border of the window's radius out.
    expected = full[5:-5, 5:-5].mean()
    assert module.evaluate(*folders, ["ssim"]).scores["b"][0] == pytest.approx(expected, abs=1e-6)


def test_equal_images_score_perfectly(folders: tuple[Path, Path]) -> None:
    evaluation = module.evaluate(folders[1], folders[1], ["psnr", "ssim"])
    assert evaluation.means == [math.inf, pytest.approx(1)]


def test_missing_metrics_are_named_and_not_guessed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["psnr", "musiq", "paq2piq"]
    evaluation = module.evaluate(*folders, names)
    assert set(evaluation.metrics) | set(evaluation.missing) == set(names)
    text = module.table(evaluation)
    for name in evaluation.missing:
        assert f"missing: {name}: " in text
    module.write_csv(evaluation, tmp_path / "scores.csv")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [r["image"] for r in rows] == ["a", "b", "mean"]
    assert float(rows[2]["psnr"]) == pytest.approx((float(rows[0]["psnr"]) + float(rows[1]["psnr"])) / 2, abs=1e-5)
    assert all(r[name] == "" for r in rows for name in evaluation.missing)


def test_a_metric_whose_weights_fail_is_missing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A package of pyiqa's name that fails as a machine without network does.
    (tmp_path / "pyiqa.py").write_text(
        "def create_metric(name, device):\n    raise OSError('no route to the weights')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "pyiqa", raising=False)
    evaluation = module.evaluate(*folders, ["ssim", "lpips", "niqe"])
    assert evaluation.metrics == ["ssim"]
    assert evaluation.missing.keys() == {"lpips", "niqe"}
    assert "no route" in evaluation.missing["niqe"]


def test_wrong_input_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    results, truth = folders
    with pytest.raises(SettingsError, match="reference"):
        module.evaluate(results, None, ["psnr"])
    with pytest.raises(SettingsError, match=r"Unknown metric.*psn"):
        module.evaluate(results, truth, ["psn"])
    Image.new("RGB", (64, 48)).save(results / "c.png")
    with pytest.raises(ImageError, match=r"no reference.*c"):
        module.evaluate(results, truth, ["psnr"])
    Image.new("RGB", (32, 48)).save(truth / "c.png")
    with pytest.raises(ImageError, match=r"64 x 48.*32 x 48"):
        module.evaluate(results, truth, ["psnr"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no images"):
        module.evaluate(tmp_path / "empty", truth, ["psnr"])


def test_the_command_prints_a_table(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = [
        str(folders[0]),
        "--reference",
        str(folders[1]),
        "--metrics",
        "psnr,ssim",
        "--csv",
        str(tmp_path / "s.csv"),
    ]
    assert command.run(parser.parse_args(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| image | psnr | ssim |"
    assert lines[-1].startswith("| mean |")
    assert len(lines) == 5
    assert (tmp_path / "s.csv").is_file()
