"""The command `evaluate`."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.cli import evaluate as command
from faithdiff_core.cli import main
from faithdiff_core.errors import ImageError, SettingsError
from faithdiff_core.evaluation import scores as module
from faithdiff_core.evaluation.metrics import PRESETS, metric_names


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
    assert module.evaluate(*folders, ["ssimc"]).scores["b"][0] == pytest.approx(expected, abs=1e-6)
    # The published one is on Y, rounded to 8 bits (pyiqa's `ssim`).
    result, truth = ((i @ np.array([0.299, 0.587, 0.114])).round()[..., None] for i in (result, truth))
    mx, my = blur(result), blur(truth)
    vx, vy, cov = blur(result**2) - mx**2, blur(truth**2) - my**2, blur(result * truth) - mx * my
    full = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    luminance = module.evaluate(*folders, ["ssim"]).scores["b"][0]
    assert luminance == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)
    assert abs(luminance - expected) > 1e-3


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
    module.write_csv({"results": evaluation}, tmp_path / "scores.csv")
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


def test_the_published_preset_names_the_published_variants(folders: tuple[Path, Path]) -> None:
    names = ["psnr", "ssim", "lpips", "dists", "clipiqa+_vitL14_512", "paq2piq", "niqe", "musiq", "maniqa-pipal", "fid"]
    assert list(PRESETS["faithdiff"]) == names
    evaluation = module.evaluate(*folders, PRESETS["faithdiff"][:2])
    assert evaluation.metrics == ["psnr", "ssim"]
    with pytest.raises(SettingsError, match=r"dists, fid compare with a reference"):
        module.evaluate(folders[0], None, ["dists", "niqe", "fid"])
    assert metric_names(["psnr", "ssim", "lpips"], "y") == ["psnry", "ssim", "lpips"]
    assert metric_names(["psnr", "ssim"], "rgb") == ["psnr", "ssimc"]


def test_psnr_on_y_and_without_a_border(folders: tuple[Path, Path]) -> None:
    result, truth = _arrays(folders, "b")
    difference = ((result - truth) @ np.array([0.299, 0.587, 0.114]))[4:-4, 4:-4]
    score = module.evaluate(*folders, ["psnry"], border=4).scores["b"][0]
    assert score == pytest.approx(10 * math.log10(255**2 / (difference**2).mean()), abs=1e-6)
    with pytest.raises(ImageError, match="border of 24"):
        module.evaluate(*folders, ["psnr"], border=24)


def test_several_folders_are_columns_with_intervals(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, truth = folders
    better = tmp_path / "better"
    better.mkdir()
    for name in "ab":
        mixed = (
            np.asarray(Image.open(results / f"{name}.png"), float) + np.asarray(Image.open(truth / f"{name}.png"))
        ) / 2
        Image.fromarray(mixed.round().astype(np.uint8)).save(better / f"{name}.png")
    files = ["--csv", str(tmp_path / "s.csv"), "--json", str(tmp_path / "s.json")]
    words = ["evaluate", str(results), str(better), "--reference", str(truth), "--metrics", "psnr,ssim", *files]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| metric | {results} | {better} |"
    row = lines[2].split(" | ")
    assert row[0] == "| psnr ↑"
    assert row[1].startswith("<u>")
    assert row[2].startswith("**")
    values = json.loads((tmp_path / "s.json").read_text())
    one, two = (values[str(better)]["images"][name]["psnr"] for name in "ab")
    assert values[str(better)]["mean"]["psnr"] == pytest.approx((one + two) / 2)
    # Student's t for two values: 12.7062 standard errors.
    half = values[str(better)]["interval_95"]["psnr"]
    assert half == pytest.approx(12.7062 * abs(one - two) / 2, rel=1e-4)
    assert f"± {half:.4f}" in row[2]
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [(r["results"], r["image"]) for r in rows][:3] == [(str(results), name) for name in ("a", "b", "mean")]


def test_nothing_measured_is_a_failure(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyiqa.py").write_text(
        "def create_metric(name, device):\n    raise ModuleNotFoundError('pkg_resources', name='pkg_resources')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "pyiqa", raising=False)
    assert main(["evaluate", str(folders[0]), "--metrics", "niqe"]) == 1
    said = capsys.readouterr()
    assert "setuptools<81" in said.out
    assert "nothing was measured" in said.err


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="pyiqa is not installed: no comparison with it")
def test_psnr_and_ssim_are_pyiqas(folders: tuple[Path, Path]) -> None:
    import pyiqa
    import torch

    for name in ("psnr", "psnry", "ssim", "ssimc"):
        metric = pyiqa.create_metric(name, device="cpu")
        ours = module.evaluate(*folders, [name]).scores
        for image in "ab":
            pair = [torch.from_numpy(i / 255).permute(2, 0, 1)[None].float() for i in _arrays(folders, image)]
            assert ours[image][0] == pytest.approx(float(metric(*pair)), abs=1e-3), name


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
    scored = module.evaluate(results, truth, ["psnr"])
    assert set(scored.failures) == {"c"}
    assert "64 x 48" in scored.failures["c"]
    assert "32 x 48" in scored.failures["c"]
    assert "c" not in scored.scores
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
