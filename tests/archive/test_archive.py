"""Runs over archives in one process: the ordinary command's files, a manifest, and nothing done twice."""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import tifffile
import torch
from comfy_host.installation import NO_BROWSER, find_browser
from PIL import Image
from support.archive import files, rows
from support.blocked import run_without

from faithdiff_core.archive.cluster import places
from faithdiff_core.archive.manifest import RowLog
from faithdiff_core.archive.progress import RunProgress, duration
from faithdiff_core.archive.restoring import RestoreTask, is_out_of_memory, recorded_recipe, smaller_tiles
from faithdiff_core.archive.storage import walk
from faithdiff_core.archive.summary import write_summary
from faithdiff_core.archive.work_list import Item, WorkList
from faithdiff_core.archive.worker import Worker
from faithdiff_core.captions.tile_captions import ImageText
from faithdiff_core.cli import main
from faithdiff_core.engine import RestoreSettings
from faithdiff_core.engine.restoration import ModelFiles, Restoration
from faithdiff_core.errors import SettingsError
from faithdiff_core.images.batch import find_jobs
from faithdiff_core.images.listing import Entry
from faithdiff_core.images.reading import decode_image

if TYPE_CHECKING:
    from conftest import Golden

QUICK = ("--steps", "1", "--cfg", "1", "--overlap", "0", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def model(tiny_sdxl: Path, golden: Golden) -> tuple[str, ...]:
    return ("--model", str(tiny_sdxl), "--faithdiff", str(golden.model), *QUICK)


def noise(seed: int, height: int = 16, width: int = 24, dtype: type = np.uint8) -> np.ndarray:
    """Random RGB values."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype, endpoint=True)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four images, two of one name, one deep; a caption; and a file that is no image."""
    folder = tmp_path / "scans"
    (folder / "1912").mkdir(parents=True)
    Image.fromarray(noise(0)).save(folder / "a.png")
    Image.fromarray(noise(1)).save(folder / "a.jpg")
    Image.fromarray(noise(2)).save(folder / "1912" / "b.png")
    tifffile.imwrite(folder / "deep.tif", noise(3, dtype=np.uint16), photometric="rgb")
    (folder / "1912" / "b.txt").write_text("A harbour.\r\nSun.")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "raw.cr2").touch()
    return folder


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_ordinary_commands_files_and_nothing_twice(
    scans: Path, tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    words = ["restore", str(scans), "--captions", "--format", "tif", *model]
    assert main([*words, "-o", str(plain)]) == 1
    expected = capsys.readouterr()
    assert main([*words, "-o", str(out), "--workers", "1"]) == 1
    got = capsys.readouterr()
    assert expected.err.splitlines()[-2:] == got.err.splitlines()[-2:]
    assert "left out 1 file(s) of formats that are not read (.cr2)" in got.err
    assert files(out) == files(plain)
    assert sorted(files(out)) == ["1912/b.tif", "a.jpg.tif", "a.png.tif", "deep.tif"]
    assert tifffile.imread(out / "deep.tif").dtype == np.uint16
    first = rows(out)
    assert {name: row["state"] for name, row in first.items()} == {
        "1912/b.tif": "done", "a.jpg.tif": "done", "a.png.tif": "done", "deep.tif": "done", "broken.tif": "failed"
    }  # fmt: skip
    assert first["broken.tif"]["error"].startswith("broken.png is not an image that can be read")
    assert {"worker", "seconds", "settings", "finished"} <= first["deep.tif"].keys()
    recipe = recorded_recipe((out / "1912" / "b.tif").read_bytes())
    assert recipe is not None
    assert recipe["prompt"] == "A harbour.\nSun."

    def again(*more: str) -> tuple[set[str], str]:
        """Names of the files that another run writes, and its last count."""
        times = {name: (out / name).stat().st_mtime_ns for name in files(out)}
        main([*words, "-o", str(out), "--workers", "1", *more])
        said = "".join(capsys.readouterr())
        counts = next(line for line in reversed(said.splitlines()) if " restored, " in line)
        return {name for name in files(out) if times.get(name) != (out / name).stat().st_mtime_ns}, counts

    assert again() == (set(), "0 restored, 4 skipped (done before), 1 failed")
    # Killed between the result and its row; in the middle of a row; a result that someone removed; a new caption.
    lines = (out / "manifest.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"deep.tif"' not in line]
    (out / "manifest.jsonl").write_text("\n".join(kept) + '\n{"name": "deep.tif", "sta')
    (out / "a.jpg.tif").unlink()
    (scans / "1912" / "b.txt").write_text("A harbour at night.")
    assert again() == ({"a.jpg.tif", "1912/b.tif"}, "2 restored, 2 skipped (done before), 1 failed")
    assert rows(out).keys() == first.keys()
    assert rows(out)["deep.tif"]["skipped"]
    assert again("--seed", "3")[0] == {"1912/b.tif", "a.jpg.tif", "a.png.tif", "deep.tif"}
    words[1] = str(scans / "1912" / "*.png")  # a new caption of an image that is named, or of a pattern
    assert again("--seed", "3", "--overwrite")[0] == {"b.tif"}
    assert again("--seed", "3")[0] == set()
    (scans / "1912" / "b.txt").write_text("A harbour in the fog.")
    assert again("--seed", "3")[0] == {"b.tif"}
    assert rows(out).keys() == (first.keys() - {"broken.tif"}) | {"b.tif"}  # what runs over other inputs made
    words[1] = str(scans)
    assert again("--seed", "3", "--overwrite")[0] == {"1912/b.tif", "a.jpg.tif", "a.png.tif", "deep.tif"}


def test_masks_and_attribution_maps_are_the_ordinary_commands(
    tmp_path: Path, model: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a folder of masks, of which the longer name decides, by path and by URL; what changes is done again."""
    scans, masks, plain = tmp_path / "scans", tmp_path / "masks", tmp_path / "plain"
    for folder in (scans, scans / "deep", masks, masks / "deep"):
        folder.mkdir(exist_ok=True)
    for number, name in enumerate(("a", "deep/a")):
        Image.fromarray(noise(number)).save(scans / f"{name}.png")
        white = np.zeros((16, 24), np.uint8)
        white[:, 8 * number : 8 + 8 * number] = 255
        Image.fromarray(white).save(masks / f"{name}.tif")
    memory = fsspec.filesystem("memory")
    memory.put(f"{masks}/", "/masks/", recursive=True)
    words = ["restore", str(scans), "--scale", "1", "--feather", "2", "--prompt", "a cat", "--attribute", "cat", *model]
    assert main([*words, "--mask", str(masks), "-o", str(plain)]) == 0
    expected = files(plain)
    assert sorted(expected) == ["a.attribution.png", "a.png", "deep/a.attribution.png", "deep/a.png"]
    for place in (str(masks), "memory://masks"):
        out = tmp_path / "out" / place[:2].strip("/")
        again = [*words, "--mask", place, "--workers", "1", "-o", str(out)]
        assert main(again) == 0
        assert files(out) == expected
        capsys.readouterr()
        assert main(again) == 0
        assert "0 restored, 2 skipped (done before), 0 failed" in capsys.readouterr().out
    (out / "a.attribution.png").unlink()
    memory.pipe_file("/masks/deep/a.tif", (masks / "a.tif").read_bytes())
    assert main(again) == 0
    assert "2 restored, 0 skipped (done before), 0 failed" in capsys.readouterr().out
    changed = {name for name, content in files(out).items() if content != expected[name]}
    assert changed == {"deep/a.png"} | {name for name in changed if name == "deep/a.attribution.png"}
    Image.fromarray(noise(5)).save(scans / "b.png")
    assert main(again) == 2
    assert f"There is no mask for {scans / 'b.png'} in memory://masks" in capsys.readouterr().err


def test_half_a_result_is_none(tmp_path: Path, tiny_sdxl: Path, golden: Golden) -> None:
    restoration = Restoration(ModelFiles(tiny_sdxl, golden.model, device="cpu"), RestoreSettings(steps=1, cfg=1.0))
    pipeline, image = restoration.files.load(), decode_image(_png(noise(0)), "a.png")
    for suffix in ("png", "tif", "jpg", "webp"):
        content = restoration.make(pipeline, image, "a.png", Path(f"a.{suffix}"), ImageText("Käse")).content
        assert recorded_recipe(content) == restoration.recipe("a.png", image, ImageText("Käse"))
        assert recorded_recipe(content[: len(content) // 2]) is None
    assert recorded_recipe(_png(noise(0))) is None


def test_names_are_those_of_the_ordinary_command(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "a.png",
        "A.JPG",
        "b.jpg",
        "b_2.jpg",
        "B.png",
        "c/d.png",
        "C/d.png",
        "c/D_2.gif",
        "e.jpg",
        "ü.png",
    ]
    for name in (*names, "x\udcfc.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    jobs = find_jobs([str(tmp_path / "in")], tmp_path / "out", ".png")
    work = WorkList()
    work.add(walk(str(tmp_path / "in")))
    work.name_results(".png")
    found = {item.source: item.name for item in work.open_items()}
    assert found == {str(job.source): job.target.relative_to(tmp_path / "out").as_posix() for job in jobs}
    work.close()
    work = WorkList()
    work.add([Entry("/x/a.jpg", "a.jpg", ""), Entry("/y/a.jpg", "a.jpg", "")])
    with pytest.raises(SettingsError, match=r"Several images would be written to a\.jpg\.png"):
        work.name_results(".png")
    work.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{in}", "-o", "{in}"], "is the folder of the inputs"),
        (["{in}/a.png", "-o", "{in}"], "would overwrite the input"),
        (["{in}", "-o", "{in}/b.png"], "is named like an image"),
        (["{in}/none", "-o", "{in}/out", "--gpus-per-worker", "1"], "--gpus-per-worker needs several workers"),
        (["{in}/empty", "-o", "{in}/out"], "There is no image in"),
        (["{in}", "-o", "{in}/out", "--mask", "{in}/none.png"], "There is no mask"),
        (["{in}/a.png", "{in}/b.png", "-o", "{in}/out", "--mask", "{in}/a.png"], "is one mask, but there are 2 images"),
        (["{in}", "-o", "{in}/out", "--workers", "0"], "expected a number of processes, ray or ray:ADDRESS, got 0"),
        (["nosuch://x/y", "-o", "{in}/out"], "nosuch://x/y cannot be opened"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    given = [word.replace("{in}", str(tmp_path)) for word in words]
    assert main(["restore", "--workers", "1", "--model", "m", "--faithdiff", "f", *given]) == 2
    assert message in capsys.readouterr().err


class LittleMemory(ModelFiles):
    """A pipeline on a device whose memory holds tiles of 512 pixels."""

    def load(self) -> Any:
        pipeline = super().load()

        def call(images: torch.Tensor, settings: RestoreSettings, **options: Any) -> torch.Tensor:
            if settings.tile > 512 or images.shape[-1] > 32:
                torch.empty(2**60)  # a real failure to allocate
            return pipeline(images, settings, **options)

        return call


def test_out_of_memory(tmp_path: Path, tiny_sdxl: Path, golden: Golden) -> None:
    """The image is restored with smaller tiles, once; what does not fit even so is a failure like any other."""
    settings = RestoreSettings(steps=1, cfg=1.0)
    restoration = Restoration(LittleMemory(tiny_sdxl, golden.model, dtype="fp32", device="cpu"), settings)
    worker = Worker(RestoreTask(restoration), str(tmp_path / "out"), "here")
    for name, width in (("a", 24), ("b", 40)):
        Image.fromarray(noise(0, width=width)).save(tmp_path / f"{name}.png")
    small = worker.work(Item(1, str(tmp_path / "a.png"), "a.png", ""))
    assert small.row["state"] == "done"
    assert small.row["notes"] == ["memory ran out; it was restored with smaller tiles (512 px, VAE 512 px)"]
    recipe = recorded_recipe((tmp_path / "out" / "a.png").read_bytes())
    assert recipe is not None
    assert recipe["tile"] == 512
    large = worker.work(Item(2, str(tmp_path / "b.png"), "b.png", ""))
    assert large.row["state"] == "failed"
    assert "allocate" in large.row["error"]
    assert len(large.thumbnails) == 1
    least = smaller_tiles(smaller_tiles(smaller_tiles(replace(settings, tile=64, encoder_tile=None, vae_tile=None))))
    assert smaller_tiles(least).tile == least.tile
    assert not is_out_of_memory(RuntimeError("a tile is out of its grid"))


class _Table(HTMLParser):
    """The page's first table: classes of rows, and the texts and numbers of small images in them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "tr" and found.get("class"):
            self.rows.append((str(found["class"]), 0, ""))
        if tag == "img":
            state, images, text = self.rows[-1]
            self.rows[-1] = (state, images + 1, text)

    def handle_data(self, data: str) -> None:
        if self.rows:
            state, images, text = self.rows[-1]
            self.rows[-1] = (state, images, text + data)


def test_the_summary_page(tmp_path: Path) -> None:
    work, small = WorkList(), RowLog(str(tmp_path), "thumbnails.jsonl", "parts")
    names = [f"{number}.png" for number in range(6)]
    work.add([Entry(f"/in/{name}", name, "1") for name in [*names, "<b>&.png"]])
    work.name_results(".png")
    for name in names[:5]:
        work.finish({"name": name, "state": "done", "seconds": 1.5, "width": 100, "height": 50, "worker": "w"})
        small.add({"name": name, "images": ["QQ==", "QQ=="]})
    work.finish({"name": "<b>&.png", "state": "failed", "error": "it is <corrupted>", "seconds": 0.1, "worker": "w"})
    small.close()
    write_summary(str(tmp_path), work, small)
    work.close()
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    table = _Table()
    table.feed(page)
    assert [(state, images) for state, images, _ in table.rows] == [("failed", 0)] + [("done", 2)] * 5
    assert "<b>&.pngit is <corrupted>" in table.rows[0][2]
    assert "6 of 7 images are shown" in page
    assert "<dt>Not tried yet</dt><dd>1</dd>" in page
    assert "http" not in page


def test_the_page_sorts_by_numbers(tmp_path: Path) -> None:
    """In a browser: a second click on a heading turns the order around."""
    found = find_browser()
    if found is None:
        pytest.skip(NO_BROWSER)
    work, small = WorkList(), RowLog(str(tmp_path), "thumbnails.jsonl", "parts")
    seconds = [0.5, 19.2, 0.12, 100.5, 2.0]
    work.add([Entry(f"/in/{number}.png", f"{number}.png", "1") for number in range(len(seconds))])
    work.name_results(".png")
    for number, each in enumerate(seconds):
        work.finish({"name": f"{number}.png", "state": "done", "seconds": each, "worker": "w"})
        small.add({"name": f"{number}.png", "images": []})
    small.close()
    write_summary(str(tmp_path), work, small)
    work.close()
    page = tmp_path / "summary.html"
    click = "document.evaluate(\"//button[.='Seconds']\", document, null, 9).singleNodeValue.click();"
    page.write_text(page.read_text() + f"<script>{click}{click}</script>")
    command = [str(found[0]), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    rows = done.stdout.partition("<tbody>")[2].partition("</tbody>")[0]
    order = re.findall(r'class="number" data-value="([^"]+)">[^<]+<', rows)
    assert [float(value) for value in order] == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("node", "gpus", "expected"),
    [
        ({"CPU": 8.0}, 0.0, 8),
        ({"CPU": 8.0, "GPU": 2.0}, 0.0, 8),
        ({"CPU": 8.0, "GPU": 2.0}, 1.0, 2),
        ({"CPU": 8.0, "GPU": 2.0}, 0.5, 4),
        ({"CPU": 8.0, "GPU": 2.0}, 0.4, 4),  # not 5: no part of a GPU is on two
        ({"CPU": 8.0, "GPU": 1.0}, 1 / 3, 3),
        ({"CPU": 8.0, "GPU": 3.0}, 2.0, 1),
        ({"CPU": 2.0, "GPU": 4.0}, 1.0, 2),
        ({"CPU": 8.0}, 1.0, 0),
    ],
)
def test_places_for_workers(node: dict[str, float], gpus: float, expected: int) -> None:
    assert places(node, 1.0, gpus) == expected


def test_progress() -> None:
    progress = RunProgress(10, quiet=True)
    for number in range(4):
        progress.add({"state": "failed" if number == 0 else "done", "worker": f"w{number % 2}", "seconds": 2.0})
    assert progress.line().startswith("4 of 10: 3 done, 1 failed; ")
    assert progress.by_worker() == ["w0: 1 done, 1 failed, 2.00 s each", "w1: 2 done, 0 failed, 2.00 s each"]
    assert [duration(seconds) for seconds in (4.4, 65, 7260, 90000)] == ["4 s", "1 min 5 s", "2 h 1 min", "1 d 1 h"]


def test_what_is_not_installed(tmp_path: Path) -> None:
    """Messages name the extra; the ordinary command needs neither Ray nor fsspec."""
    Image.fromarray(noise(0)).save(tmp_path / "a.png")
    given = ["--model", "none", "--faithdiff", "none"]
    commands = [
        ["restore", str(tmp_path), "-o", str(tmp_path / "out"), "--workers", "2", *given],
        ["restore", "s3://x/y", "-o", str(tmp_path / "out"), *given],
        ["restore", str(tmp_path), "-o", str(tmp_path / "out"), *given],
    ]
    code = f"from faithdiff_core.cli import main; print([main(words) for words in {commands!r}])"
    done = run_without(("ray", "fsspec"), code)
    said = done.stderr.splitlines()
    assert done.stdout.splitlines()[-1] == "[1, 1, 1]"
    assert said[0].startswith("error: --workers 2 needs Ray; install the extra `cluster`")
    assert said[1].startswith("error: s3://x/y: URLs need fsspec; install the extra `cluster`")
    assert "There is no file none" in said[2]
