"""What is said where the packages of an extra are not installed; each time in a Python that cannot import them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.blocked import run_without

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"
FAITHDIFF = str(MODEL / "faithdiff.safetensors")

BESIDE_COMFYUI = ("accelerate", "cv2", "datasets", "diffusers", "peft", "pyiqa", "skimage", "tensorboard")
"""The packages of the extras that ComfyUI does not bring."""

BESIDE_TORCH = (*BESIDE_COMFYUI, "numpy", "PIL", "safetensors", "scipy", "tqdm", "transformers", "yaml")

COMMANDS = """
import contextlib, io, json, sys
from faithdiff_core.cli import main
said = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
        code = main(words)
    said.append([code, text.getvalue()])
print(json.dumps(said))
"""


def run_commands(missing: tuple[str, ...], *commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes of commands where packages are missing, and all that they wrote."""
    done = run_without(missing, COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return [(code, text) for code, text in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """An image with 8 bits, one with 16, and a configuration of a training."""
    import cv2
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    cv2.imwrite(str(tmp_path / "eight.png"), pixels.astype(np.uint8))
    cv2.imwrite(str(tmp_path / "sixteen.png"), (pixels * 257).astype(np.uint16))
    stage = "{stage: 1, steps: 1, learning_rate: 1.0e-3}"
    (tmp_path / "train.yaml").write_text(f"base: b\noutput: o\ndata: {{folder: {tmp_path}}}\nstages: [{stage}]\n")
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def restore(image: str) -> list[str]:
    """The words that restore an image with the demo model."""
    return ["restore", image, "-o", f"{image}.png", "--model", str(MODEL), "--faithdiff", FAITHDIFF]


def test_commands_where_only_comfyui_is_installed(files: dict[str, str], tmp_path: Path) -> None:
    score = ["evaluate", files["eight"], "--reference", files["eight"], "--metrics"]
    info, convert, degraded, restored, trained, psnr, lpips = run_commands(
        BESIDE_COMFYUI,
        ["info", FAITHDIFF],
        ["convert", FAITHDIFF, "-o", str(tmp_path)],
        ["degrade", files["sixteen"], "-o", str(tmp_path / "low.png")],
        restore(files["eight"]),
        ["train", files["train"]],
        [*score, "psnr"],
        [*score, "lpips"],
    )
    assert info[0] == convert[0] == 0
    for (code, text), package, extra in (
        (degraded, "opencv-python-headless", "engine"),
        (restored, "accelerate", "engine"),
        (trained, "accelerate", "train"),
        (psnr, "scikit-image", "metrics"),
    ):
        assert code == 1
        assert package in text
        assert f'".[{extra}]"' in text
    assert '".[metrics]"' in lpips[1]


def test_commands_where_only_torch_is_installed(files: dict[str, str], tmp_path: Path) -> None:
    commands = {
        ("info", FAITHDIFF): "engine",
        ("convert", FAITHDIFF, "-o", str(tmp_path)): "engine",
        tuple(restore(files["eight"])): "engine",
        ("degrade", files["eight"], "-o", str(tmp_path / "low.png")): "train",
        ("train", files["train"]): "train",
        ("evaluate", files["eight"]): "metrics",
    }
    for (words, extra), (code, text) in zip(
        commands.items(), run_commands(BESIDE_TORCH, *map(list, commands)), strict=True
    ):
        last = text.splitlines()[-1]
        assert code == 1, words
        assert last.startswith("error: "), last
        assert f'".[{extra}]"' in last, last


def test_the_package_without_torch() -> None:
    done = run_without(("torch",), "import faithdiff_core.cli")
    assert done.returncode == 1
    assert "MissingPackageError: FaithDiff needs PyTorch." in done.stderr.splitlines()[-1]
    assert '".[engine]"' in done.stderr.splitlines()[-1]


def test_an_import_of_our_own_that_fails_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the package must not send its user to install something."""
    from faithdiff_core import cli

    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("a command", "no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["info"])
