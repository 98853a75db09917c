"""The command line, on a tiny model: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.photographs import photograph

from faithdiff_core.cli import COMMANDS, main
from faithdiff_core.cli import restore as restore_command
from faithdiff_core.engine import RestoreSettings, restoration
from faithdiff_core.engine.description import option
from faithdiff_core.errors import SettingsError
from faithdiff_core.images.batch import Job, find_jobs
from faithdiff_core.images.geometry import resize_lanczos
from faithdiff_core.images.reading import load_image
from faithdiff_core.weights.conversion import convert

if TYPE_CHECKING:
    from conftest import Golden

QUICK = ("--steps", "1", "--cfg", "1", "--tile", "512", "--overlap", "0", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def model(tiny_sdxl: Path, golden: Golden) -> tuple[str, ...]:
    return ("--model", str(tiny_sdxl), "--faithdiff", str(golden.model), *QUICK)


def _noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _image(path: Path, height: int = 24, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_noise(height, width, 3)).save(path)
    return path


def _recipe(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text["faithdiff"])


class TestRestore:
    def test_a_photograph(self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        photograph = importlib.resources.files("skimage") / "data" / "rocket.jpg"
        out = tmp_path / "rocket.png"
        assert main(["restore", str(photograph), "-o", str(out), *model, "--prompt", "a rocket", "--seed", "7"]) == 0
        with Image.open(str(photograph)) as before, Image.open(out) as after:
            assert before.size == (640, 427)
            assert (after.size, after.mode) == ((1280, 854), "RGB")
            small = np.asarray(after.resize(before.size, Image.Resampling.BOX)).astype(float)
            # The tiny model restores nothing, but colours are about the photograph's.
            assert np.abs(small.mean((0, 1)) - np.asarray(before).mean((0, 1))).max() < 10
        recipe = _recipe(out)
        assert (recipe["seed"], recipe["prompt"], recipe["width"], recipe["height"]) == (7, "a rocket", 1280, 854)
        assert (recipe["steps"], recipe["cfg"], recipe["tile"], recipe["faithdiff"]) == (
            1, 1.0, 512, "faithdiff_tiny.safetensors",
        )  # fmt: skip
        assert capsys.readouterr().out.splitlines()[-1] == "1 restored, 0 skipped (done before), 0 failed"

    def test_odd_images_keep_size_and_mode(self, tmp_path: Path, model: tuple[str, ...]) -> None:
        folder, out = tmp_path / "in", tmp_path / "out"
        folder.mkdir()
        rgba = _noise(20, 12, 4)
        for name, image in {
            "thin.png": Image.fromarray(_noise(50, 1, 3)),
            "wide.png": Image.fromarray(_noise(37, 3000, 3)),
            "rgba.png": Image.fromarray(rgba),
            "grey.png": Image.fromarray(rgba[..., 0]),
            "la.png": Image.fromarray(rgba).convert("LA"),
            "palette.gif": Image.fromarray(rgba[..., :3]).quantize(8),
            "cmyk.jpg": Image.fromarray(rgba, "CMYK"),
            "bits.png": Image.fromarray(rgba[..., 0] > 99),
            "deep_grey.png": Image.fromarray(_noise(9, 13, dtype=np.uint16)),
        }.items():
            image.save(folder / name)
        assert cv2.imwrite(str(folder / "deep.png"), _noise(9, 13, 3, dtype=np.uint16))
        assert main(["restore", str(folder), "-o", str(out), *model, "--start", "noise"]) == 0
        found = {}
        for path in out.iterdir():
            loaded = load_image(path)
            with Image.open(path) as image:
                found[path.name] = (image.size, loaded.bits, loaded.grey, loaded.alpha is not None)
        assert found == {
            "thin.png": ((2, 100), 8, False, False),
            "wide.png": ((6000, 74), 8, False, False),
            "rgba.png": ((24, 40), 8, False, True),
            "grey.png": ((24, 40), 8, True, False),
            "la.png": ((24, 40), 8, True, True),
            "palette.png": ((24, 40), 8, False, False),
            "cmyk.png": ((24, 40), 8, False, False),
            "bits.png": ((24, 40), 8, True, False),
            "deep_grey.png": ((26, 18), 16, True, False),
            "deep.png": ((26, 18), 16, False, False),
        }
        alpha = resize_lanczos(torch.from_numpy(rgba[..., 3:] / 255.0).permute(2, 0, 1)[None].float(), 40, 24)
        restored = load_image(out / "rgba.png").alpha
        assert restored is not None
        assert (restored - alpha[0]).abs().max() <= 0.51 / 255

    def test_one_bad_file_does_not_stop_the_others(
        self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "in"
        for name in ("a.png", "c.png"):
            _image(folder / name)
        (folder / "b.png").write_bytes(b"not an image")
        words = [str(folder), str(tmp_path / "none.png"), "-o", str(tmp_path / "out"), *model]
        assert main(["restore", *words]) == 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
        lines = capsys.readouterr().err.splitlines()
        assert lines[-3] == "2 restored, 0 skipped (done before), 2 failed"
        assert lines[-2] == f"failed: {tmp_path / 'none.png'}: there is no such file"
        assert lines[-1].startswith(f"failed: {folder / 'b.png'}: b.png is not an image that can be read")

    def test_results_that_are_too_small_do_not_stop_the_others(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The demo's model has too few channels to normalize a single latent pixel."""
        for name, side in (("a.png", 24), ("b.png", 3), ("c.png", 24)):
            _image(tmp_path / "in" / name, side, side)
        folder = Path(__file__).parents[2] / "demo" / "model"
        words = ["--model", str(folder), "--faithdiff", str(folder / "faithdiff.safetensors"), *QUICK, "--scale", "1"]
        assert main(["restore", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *words]) == 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
        said = capsys.readouterr().err
        assert "b.png would become 3 x 3 pixels, too few for this model. Choose a scale that gives 16 pixels" in said
        assert "2 restored, 0 skipped (done before), 1 failed" in said

    @pytest.mark.parametrize("how", ["chunks", "cut"])
    def test_a_long_prompt_is_no_wall_of_text(
        self, tmp_path: Path, model: tuple[str, ...], capfd: pytest.CaptureFixture[str], how: str
    ) -> None:
        words = ["--prompt", "a cat on a red chair, " * 200, "--long-prompt", how, "--quiet"]
        assert main(["restore", str(_image(tmp_path / "a.png")), "-o", str(tmp_path / "out"), *model, *words]) == 0
        assert capfd.readouterr() == ("", "")

    def test_an_output_that_is_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, file = _image(tmp_path / "in" / "a.png"), tmp_path / "notes"
        file.write_text("keep")
        given = ["--model", "m", "--faithdiff", "f"]
        assert main(["restore", str(source), "-o", str(file), *given]) == 2
        assert f"{file} is one file" in capsys.readouterr().err
        assert main(["restore", str(source), "-o", str(file / "b.png"), *given]) == 1
        assert f"the folder {file} cannot be written to" in capsys.readouterr().err
        assert main(["degrade", str(source.parent), "-o", str(file)]) == 2
        assert file.read_text() == "keep"

    def test_done_is_not_done_again(
        self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, out = tmp_path / "in", tmp_path / "in" / "out"
        _image(folder / "a.jpg")
        _image(folder / "deep" / "b.png")
        words = ["restore", str(folder), "-o", str(out), *model]
        assert main(words) == 0
        files = [out / "a.png", out / "deep" / "b.png"]
        times = [path.stat().st_mtime_ns for path in files]
        assert sorted(path for path in out.rglob("*") if path.is_file()) == files
        _image(folder / "c.png")
        capsys.readouterr()
        assert main(words) == 0
        assert [path.stat().st_mtime_ns for path in files] == times
        assert capsys.readouterr().out.splitlines()[-1] == "1 restored, 2 skipped (done before), 0 failed"
        assert main([*words, "--overwrite", "--quiet"]) == 0
        assert all(path.stat().st_mtime_ns > time for path, time in zip(files, times, strict=True))
        assert capsys.readouterr().out == ""

    def test_nothing_to_do_loads_no_model(self, tmp_path: Path) -> None:
        _image(tmp_path / "a.png")
        _image(tmp_path / "out" / "a.png")
        words = [
            "restore",
            str(tmp_path / "a.png"),
            "-o",
            str(tmp_path / "out"),
            "--model",
            "none",
            "--faithdiff",
            "none",
        ]
        assert main(words) == 0

    def test_a_stop_keeps_what_is_done(
        self,
        tmp_path: Path,
        model: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("a.png", "b.png", "c.png"):
            _image(tmp_path / name)

        def load_until_stopped(path: Path) -> Any:
            if path.name == "b.png":
                raise KeyboardInterrupt
            return load_image(path)

        monkeypatch.setattr(restoration, "load_image", load_until_stopped)
        assert main(["restore", str(tmp_path / "*.png"), "-o", str(tmp_path / "out"), *model]) == 130
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
        assert capsys.readouterr().out.splitlines()[-1].startswith("1 restored")

    def test_captions_beside_the_images(self, tmp_path: Path, model: tuple[str, ...]) -> None:
        folder, out = tmp_path / "in", tmp_path / "out"
        for name in ("a.png", "b.png"):
            _image(folder / name)
        (folder / "a.txt").write_text("The image features a cat. It sleeps. It purrs.\n", encoding="utf-8")
        words = ["restore", str(folder), "-o", str(out), *model, "--prompt", "a dog", "--captions"]
        assert main(words) == 0
        assert _recipe(out / "a.png")["prompt"] == "The image features a cat. It sleeps. It purrs."
        assert _recipe(out / "b.png")["prompt"] == "a dog"
        assert main([*words, "--overwrite", "--trim-captions"]) == 0
        assert _recipe(out / "a.png")["prompt"] == "A cat. It sleeps."
        assert _recipe(out / "b.png")["prompt"] == "a dog"

    def test_a_mask(self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        """White is restored; beyond the soft edge every pixel of the file stays."""
        source, out = _image(tmp_path / "a.png", 48, 64), tmp_path / "out.png"
        mask = Image.new("L", (32, 24), 0)
        mask.paste(255, (0, 0, 8, 24))
        mask.save(tmp_path / "mask.png")
        words = ["restore", str(source), "-o", str(out), *model, "--scale", "1", "--mask", str(tmp_path / "mask.png")]
        assert main([*words, "--feather", "8"]) == 0
        before, after = np.asarray(Image.open(source)), np.asarray(Image.open(out))
        assert (before[:, 28:] == after[:, 28:]).all()
        assert (before[:, :12] != after[:, :12]).mean() > 0.5
        assert (_recipe(out)["mask"], _recipe(out)["feather"]) == ("mask.png", 8)
        Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
        assert main([*words, "--overwrite"]) == 1
        assert "The mask mask.png is 32 x 32, and a.png is 64 x 48: another shape" in capsys.readouterr().err

    def test_the_adapter_with_its_unet_is_the_whole_file(
        self, tmp_path: Path, tiny_sdxl: Path, golden: Golden, model: tuple[str, ...]
    ) -> None:
        loaded = _image(tmp_path / "a.png")
        unet, adapter = convert(golden.model, tmp_path, "fp32")
        parts = ("--model", str(tiny_sdxl), "--faithdiff", str(adapter), "--unet", str(unet), *QUICK)
        results = []
        for number, (which, seed) in enumerate([(model, 1), (parts, 1), (model, 2)]):
            out = tmp_path / f"{number}.png"
            assert main(["restore", str(loaded), "-o", str(out), *which, "--seed", str(seed)]) == 0
            results.append(load_image(out).colors)
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    @pytest.mark.parametrize(
        ("how", "size"),
        [(("--scale", "1.5"), (48, 36)), (("--longest-side", "40"), (40, 30)), (("--megapixels", "0.003"), (63, 47))],
    )
    def test_sizes(self, tmp_path: Path, model: tuple[str, ...], how: tuple[str, ...], size: tuple[int, int]) -> None:
        out = tmp_path / "b.webp"
        assert main(["restore", str(_image(tmp_path / "a.png")), "-o", str(out), *model, *how, "--passes", "2"]) == 0
        with Image.open(out) as image:
            assert (image.size, image.format) == (size, "WEBP")

    def test_a_result_that_is_too_large_is_named(
        self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        loaded = _image(tmp_path / "a.png", 24, 32)
        assert main(["restore", str(loaded), "-o", str(tmp_path / "out"), *model, "--scale", "1000"]) == 1
        assert "An image of 32 x 24 would become 32000 x 24000" in capsys.readouterr().err

    def test_metadata_holds_every_setting_as_it_was_given(self, tmp_path: Path, model: tuple[str, ...]) -> None:
        given = {"start": "noise", "color_fix": "none", "strength": 0.5, "encoder_tile": 512, "encoder_overlap": 0.125}
        words = [word for name, value in given.items() for word in (option(name), str(value))]
        out = tmp_path / "b.png"
        assert main(["restore", str(_image(tmp_path / "a.png")), "-o", str(out), *model, *words]) == 0
        recipe = _recipe(out)
        names = {item.name for item in fields(RestoreSettings)} - {"size", "scale"}
        assert names <= recipe.keys()
        assert {name: recipe[name] for name in given} == given
        settings = RestoreSettings(**{name: recipe[name] for name in names})
        assert settings.method() == {name: recipe[name] for name in names}

    def test_a_photographs_metadata_is_kept_but_for_what_is_stripped(
        self, tmp_path: Path, model: tuple[str, ...]
    ) -> None:
        source = tmp_path / "a.jpg"
        source.write_bytes(photograph("JPEG", _noise(16, 24, 3)))
        found = {}
        for words in ((), ("--strip-location",), ("--strip-metadata",)):
            out = tmp_path / f"out{''.join(words)}"
            assert main(["restore", str(source), "-o", str(out), "--format", "tif", *model, *words]) == 0
            with Image.open(out / "a.tif") as image:
                block = image.getexif()
                assert image.size == (32, 48)
                assert "faithdiff" in block[0x010D if "CW 5" in block.values() else 0x010E]
                found[words] = (block.get(0x0110), bool(block.get_ifd(0x8825)), 700 in block, block.get(0x011A))
        assert found == {
            (): ("CW 5", True, True, 300),
            ("--strip-location",): ("CW 5", False, True, 300),
            ("--strip-metadata",): (None, False, False, 72),  # TIFF requires one; 72 says that none is known
        }

    def test_transparency_and_jpeg_is_found_out_first(
        self, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Image.fromarray(_noise(8, 8, 4)).save(tmp_path / "a.png")
        assert main(["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "a.jpg"), *model]) == 1
        assert "JPEG cannot hold the image's transparency" in capsys.readouterr().err
        assert not (tmp_path / "a.jpg").exists()


class TestJobs:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("a.jpg", "a.png", "sub/b.webp", "sub/notes.txt", ".hidden.png", "c.tiff"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("inputs", "output", "targets"),
        [
            (["c.tiff"], "x.jpg", {"c.tiff": "x.jpg"}),
            (["c.tiff"], "x", {"c.tiff": "x/c.png"}),
            (["c.tiff"], "sub", {"c.tiff": "sub/c.png"}),
            (["sub"], "x", {"sub/b.webp": "x/b.png"}),
            (["sub/*.webp", "sub"], "x", {"sub/b.webp": "x/b.png"}),
            (["**/*.webp"], "x", {"sub/b.webp": "x/b.png"}),
            (["a.jpg", "a.png"], "x", {"a.jpg": "x/a.jpg.png", "a.png": "x/a.png.png"}),
            (["sub/notes.txt"], "x", {"sub/notes.txt": "x/notes.png"}),
            (["missing[1].png", "c.tiff"], "x", {"c.tiff": "x/c.png"}),
            (
                ["."],
                "x",
                {"a.jpg": "x/a.jpg.png", "a.png": "x/a.png.png", "c.tiff": "x/c.png", "sub/b.webp": "x/sub/b.png"},
            ),
        ],
    )
    def test_targets(self, folder: Path, inputs: list[str], output: str, targets: dict[str, str]) -> None:
        jobs = find_jobs(inputs, Path(output), ".png")
        assert jobs == [Job(Path(source), Path(target)) for source, target in targets.items()]

    @pytest.mark.parametrize(
        ("inputs", "output", "message"),
        [
            (["*.bmp"], "x", r"There is no image in \*.bmp"),
            (["a.jpg", "c.tiff"], "x.png", "x.png is one file, but there are 2 images"),
            (["a.jpg"], "x.bmp", "images are written as .png, .jpg, .jpeg, .webp, .tif, .tiff, not as .bmp"),
            (["a.png"], "a.png", "would overwrite the input"),
            (["a.png"], ".", "would overwrite the input"),
            (["."], ".", "is the folder of the inputs"),
            (["sub", "sub/../sub/b.webp"], "x", "Several images would be written to"),
        ],
    )
    def test_refusals(self, folder: Path, inputs: list[str], output: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_jobs(inputs, Path(output), ".png")


class TestBadArguments:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--tile", "100"], "error: --tile must be a multiple of 8 pixels and at least 64, got 100"),
            (["--overlap", "1"], "overlap must lie between 0 and 0.9"),
            (["--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
            (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
            (["--cfg", "0.5"], "cfg must lie between 1 and 20, got 0.5"),
            (["--strength", "-1"], "strength must be 0 or more"),
            (["--tile-batch", "0"], "--tile-batch must be a whole number from 1"),
            (["--encoder-overlap", "0.95"], "--encoder-overlap must lie between 0 and 0.9"),
            (["--vae-tile", "7"], "--vae-tile must be a multiple of 8"),
            (["--passes", "0"], "passes must be a whole number from 1 to 8, got 0"),
            (["--passes", "-1"], "passes must be a whole number from 1 to 8, got -1"),
            (["--passes", "1000000000"], "passes must be a whole number from 1 to 8, got 1000000000"),
            (["--steps", "9" * 5000], "argument --steps: invalid int value: '999"),
            (["--scale", "9" * 5000], "--scale must be a positive number, got inf"),
            (["-o", "~nosuchuser/x"], "~nosuchuser/x: no home folder was put in place of the ~"),
            (["--seed", "-3"], "--seed must be 0 or more, got -3"),
            (["--scale", "0"], "--scale must be a positive number, got 0"),
            (["--longest-side", "-1"], "--longest-side must be a positive number"),
            (["--scale", "2", "--megapixels", "4"], "not allowed with argument"),
            (["--start", "middle"], "argument --start: invalid choice"),
            (["--color-fix", "sepia"], "argument --color-fix: invalid choice"),
            (["--dtype", "int8"], "argument --dtype: invalid choice"),
            (["--device", "tpu"], "argument --device: invalid choice"),
            (["--offload", "disk"], "argument --offload: invalid choice"),
            (["--format", "bmp"], "argument --format: invalid choice"),
            (["--trim-captions"], "--trim-captions needs --captions"),
            (["--mask", "nowhere.png"], "There is no mask nowhere.png"),
            (["--feather", "-1"], "--feather must be 0 or more, got -1"),
            (["--scheduler", "Nonsense"], "scheduler must be one of"),
            (["--unknown"], "unrecognized arguments: --unknown"),
        ],
    )
    def test_restore(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        loaded = _image(tmp_path / "a.png")
        given = ["--model", "m", "--faithdiff", "f", "-o", str(tmp_path / "out")]
        assert main(["restore", str(loaded), *given, *words]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said) < 4000

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "the following arguments are required: COMMAND"),
            (["enlarge"], "invalid choice: 'enlarge'"),
            (["restore", "a.png"], "the following arguments are required: -o/--output, --model, --faithdiff"),
            (["convert"], "the following arguments are required: FILE"),
            (["convert", "a.bin", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        ],
    )
    def test_others(self, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert main(words) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("lora", "path", "weight"),
        [
            ("style.safetensors", "style.safetensors", 1.0),
            ("style.safetensors:0.5", "style.safetensors", 0.5),
            ("style.safetensors:-1", "style.safetensors", -1.0),
            (r"C:\style.safetensors", r"C:\style.safetensors", 1.0),
            (r"C:\style.safetensors:0.7", r"C:\style.safetensors", 0.7),
        ],
    )
    def test_lora_words(self, lora: str, path: str, weight: float) -> None:
        assert restore_command._lora(lora) == (Path(path), weight)

    def test_a_missing_model_is_a_failure(
        self, tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["restore", str(_image(tmp_path / "a.png")), "-o", str(tmp_path / "out"), "--faithdiff"]
        assert main([*words, "none.bin", "--model", "m"]) == 1
        assert "error: There is no file none.bin" in capsys.readouterr().err
        assert main([*words, str(golden.model), "--model", str(tmp_path / "none.safetensors")]) == 1
        assert "none.safetensors" in capsys.readouterr().err


class TestWeightsCommands:
    def test_convert(self, tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["convert", str(golden.model), "-o", str(tmp_path), "--dtype", "bf16"]
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [re.sub(r" \(.*", "", line) for line in lines] == [
            str(tmp_path / "faithdiff_tiny_unet.safetensors"),
            str(tmp_path / "faithdiff_tiny_adapter.safetensors"),
        ]
        assert main(words) == 2
        assert "exists already" in capsys.readouterr().err
        assert main([*words, "--force"]) == 0

    def test_info(self, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(golden.model)]) == 0
        out = capsys.readouterr().out
        assert "faithdiff_tiny.safetensors is a full FaithDiff file" in out
        assert "unet: 408 tensors" in out
        assert main(["info", str(golden.model), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["kind"] == "full"
        assert facts["parts"]["alignment"]["sizes"]["layers"] == 2
        assert facts["parts"]["lq_encoder"]["dtypes"] == ["fp16"]

    def test_info_of_another_file(self, golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(golden.vae)]) == 0
        assert capsys.readouterr().out.startswith("vae_tiny.safetensors is a VAE.\n  ComfyUI loads it with Load VAE;")
        path = tmp_path / "unknown.safetensors"
        save_file({"layer.weight": torch.zeros(3)}, path)
        assert main(["info", str(path)]) == 1
        assert "has none of FaithDiff's tensors; its first ones are layer.weight" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"faithdiff_core {command}" in out
    assert len(out.splitlines()) > 4


def test_as_a_program(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "faithdiff_core", *words], capture_output=True, text=True)

    listing = run("--help")
    assert listing.returncode == 0
    assert all(f"    {name}" in listing.stdout for name in COMMANDS)
    failed = run("info", str(tmp_path / "none.bin"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: There is no file")


def test_settings_errors_are_the_arguments_fault() -> None:
    assert issubclass(SettingsError, ValueError)
