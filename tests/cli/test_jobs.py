"""What every command that writes images keeps: originals, whole files, and the run going."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.atomic import write_atomically
from faithdiff_core.captions.files import caption_beside
from faithdiff_core.cli import main
from faithdiff_core.cli.jobs import attempt
from faithdiff_core.errors import ImageError
from faithdiff_core.images.batch import Job, Report, find_jobs, left_out, possible


def _image(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path, "PNG")
    return path


def test_degrade_never_overwrites_originals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = _image(tmp_path / "in" / "a.png")
    before = original.read_bytes()
    (tmp_path / "link.png").symlink_to(original)
    for source, target in [(original, original), (original.parent, original.parent), (original, tmp_path / "link.png")]:
        assert main(["degrade", str(source), "-o", str(target)]) == 2
        assert "Choose another" in capsys.readouterr().err
    assert original.read_bytes() == before


def test_degrade_again_takes_no_results_as_inputs(tmp_path: Path) -> None:
    _image(tmp_path / "in" / "a.png")
    out = tmp_path / "in" / "out"
    for _ in range(2):
        assert main(["degrade", str(tmp_path / "in"), "-o", str(out), "--seed", "1"]) == 0
    assert sorted(path.name for path in out.rglob("*")) == ["a.png"]


def test_degrade_goes_on_after_a_bad_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "c.png"):
        _image(tmp_path / "in" / name)
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    (tmp_path / "in" / "d.psd").write_bytes(b"x")
    assert main(["degrade", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    err = capsys.readouterr().err
    assert "2 degraded, 1 failed" in err
    assert "left out 1 file(s) of formats that are not read (.psd)" in err


def test_evaluate_goes_on_after_a_bad_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("result", "truth"):
        _image(tmp_path / folder / "a.png")
        _image(tmp_path / folder / "small.png", 5)
    (tmp_path / "result" / "b.png").write_bytes(b"no image")
    _image(tmp_path / "truth" / "b.png")
    _image(tmp_path / "truth" / "unused.png")
    for folder in ("result", "truth"):
        (tmp_path / folder / "raw.cr2").write_bytes(b"x")
    words = ["evaluate", str(tmp_path / "result"), "--reference", str(tmp_path / "truth"), "--metrics", "psnr,ssim"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    for folder in ("result", "truth"):
        assert f"{tmp_path / folder}: left out 1 file(s) of formats that are not read (.cr2)." in err
    assert f"{tmp_path / 'result'}: no result for 1 reference(s): unused" in err
    assert "| a | inf | 1.0000 |" in out
    assert "failed: b: b.png is not an image that can be read" in out
    assert "failed: small: ssim needs images of at least 11 x 11 pixels, got 5 x 5" in out
    (tmp_path / "file").touch()
    assert main([*words, "--csv", str(tmp_path / "file" / "x" / "s.csv")]) == 2
    assert "cannot be made" in capsys.readouterr().err
    _image(tmp_path / "truth" / "a.webp")
    assert main(words) == 1
    assert "a.png and" in (err := capsys.readouterr().err)
    assert "a.webp have the same name but for their endings" in err


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), ZeroDivisionError("odd"), KeyError("odd")])
def test_no_kind_of_error_ends_a_run(tmp_path: Path, error: Exception) -> None:
    def work(job: Job, progress: object) -> list[str]:
        raise error

    report = Report()
    attempt(Job(tmp_path / "a.png", tmp_path / "b.png"), work, report, "[1/1] a.png", quiet=True)
    assert "odd" in report.failures[0][1]


def test_folders_and_names_are_tried_before_the_work(tmp_path: Path) -> None:
    source = _image(tmp_path / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match=r"Results cannot be written: the folder .* cannot be made"):
        possible([Job(source, tmp_path / "file" / "x" / "a.png")], Report())
    report = Report()
    long = Job(source, tmp_path / ("n" * 300 + ".png"))
    lost = Job(tmp_path / "none.png", tmp_path / "c.png")
    good = Job(source, tmp_path / "new" / "a.png")
    assert possible([long, lost, good, Job(source, tmp_path / "file" / "a.png")], report) == [good]
    assert [reason.split(",")[0] for _, reason in report.failures[:2]] == [
        "the result's name has 304 bytes",
        "there is no such file",
    ]
    assert not (tmp_path / "new").exists()


def test_results_whose_names_differ_in_case_alone_stay_apart(tmp_path: Path) -> None:
    for name in ("x/p.png", "y/P.png", "z/p.jpg"):
        _image(tmp_path / name)
    words = [str(tmp_path / name) for name in ("x/p.png", "y/P.png", "z/p.jpg")]
    names = [job.target.name for job in find_jobs(words, tmp_path / "out", ".png")]
    assert names == ["p.png.png", "P.png_2.png", "p.jpg.png"]
    assert len({name.casefold() for name in names}) == 3


def test_left_out_files_are_found(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    for name in ("b.cr2", "out/c.cr2", "._a.psd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert left_out([str(tmp_path)], tmp_path / "out") == {".cr2": 1}


def test_a_name_that_the_console_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "照片.png", os.fsdecode(b"gr\xfc\xdfe.png")):
        _image(tmp_path / "in" / name)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert main(["degrade", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    console.flush()
    assert b"\\u7167\\u7247.png" in console.buffer.getvalue()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk: writing stops in the middle
    try:
        with pytest.raises(OSError, match="large"):
            write_atomically(tmp_path / "a.png", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert list(tmp_path.iterdir()) == []


def test_a_caption_from_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfThe image features a cat.\r\n")
    assert caption_beside(tmp_path / "a.png") == "The image features a cat."
    assert caption_beside(tmp_path / "b.png") is None


def test_a_seed_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["restore", str(tmp_path), "-o", str(tmp_path / "out"), "--model", "m", "--faithdiff", "f"]
    assert main([*words, "--seed", str(2**64)]) == 2
    assert "--seed must be below 2^64" in capsys.readouterr().err
