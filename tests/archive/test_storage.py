"""Archives by URL: in memory, and on a slow store whose connections drop."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from support.archive import files, rows

from faithdiff_core.archive import manifest, storage
from faithdiff_core.cli import main
from faithdiff_core.errors import ImageError

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
FILES = ("--model", str(MODEL), "--faithdiff", str(MODEL / "faithdiff.safetensors"))
WORDS = (*FILES, "--steps", "1", "--cfg", "1", "--device", "cpu", "--dtype", "fp32", "--captions")


class SlowFiles(LocalFileSystem):
    """The local disk with latency; every seventh request fails once."""

    protocol = "slow"
    requests = count(1)

    def _delay(self) -> None:
        time.sleep(0.002)
        if next(self.requests) % 7 == 0:
            raise ConnectionResetError("the store dropped the connection")

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("slow://").rstrip("/")

    def ls(self, path: str, detail: bool = False, **kw: Any) -> Any:
        self._delay()
        return super().ls(path, detail, **kw)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kw: Any) -> Any:
        self._delay()
        return super().cat_file(path, start, end, **kw)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kw: Any) -> Any:
        self._delay()
        return super().pipe_file(path, value, mode, **kw)


@pytest.fixture(scope="module", autouse=True)
def _slow_store() -> None:
    fsspec.register_implementation("slow", SlowFiles, clobber=True)


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty file system in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {
    "a.png": _png(0),
    "deep/er/b.png": _png(1),
    "deep/b.txt": b"not this one",
    "deep/er/b.txt": b"A harbour.",
    "empty.png": b"",
}


def test_the_same_files_wherever_they_are(
    memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_PART_ROWS", 2)
    scans = tmp_path / "scans"
    for name, content in IMAGES.items():
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        (scans / name).write_bytes(content)
        memory.pipe_file(f"/scans/{name}", content)
    assert main(["restore", str(scans), "-o", str(tmp_path / "plain"), *WORDS]) == 1
    capsys.readouterr()
    expected = files(tmp_path / "plain")
    assert set(expected) == {"a.png", "deep/er/b.png"}

    slow = tmp_path / "slow"
    for source, out, folder in (
        ("memory://scans", "memory://out", None),
        (f"slow://{scans}", f"slow://{slow}", slow),
        (scans.as_uri(), (tmp_path / "uri").as_uri(), tmp_path / "uri"),
    ):
        assert main(["restore", source, "-o", out, *WORDS]) == 1
        counts, failed = capsys.readouterr().err.splitlines()[-2:]
        assert counts == "2 restored, 0 skipped (done before), 1 failed"
        assert failed.endswith("empty.png is empty (0 bytes).")
        if folder is None:
            folder = tmp_path / "copied"
            memory.get("/out", str(folder), recursive=True)
        assert files(folder) == expected
        assert set(rows(folder)) == {"a.png", "deep/er/b.png", "empty.png"}
        assert {"manifest.jsonl", "summary.html"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "manifest").exists() or not any((folder / "manifest").iterdir())
        # A run that was killed leaves its rows in parts.
        first = rows(folder)["a.png"]
        log = manifest.RowLog(storage.as_address(out), "manifest.jsonl", "manifest")
        log.add({**first, "seconds": 99.0})
        log.close()
        assert main(["restore", source, "-o", out, *WORDS]) == 1
        assert "0 restored, 2 skipped (done before), 1 failed" in capsys.readouterr().err


def test_patterns_and_single_images(memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        memory.pipe_file(f"/in/{name}", _png(0))
    found = [entry.address for entry in storage.find("memory://in/*.png")]
    assert found == ["memory://in/a.png", "memory://in/b.png"]
    assert [entry.name for entry in storage.find("memory://in/a.png")] == ["a.png"]
    assert main(["restore", "memory://in/none.png", "memory://in/a.png", "-o", str(tmp_path), *WORDS]) == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]
    assert "failed: memory://in/none.png: there is no such file" in capsys.readouterr().err


def test_listings(memory: Any, tmp_path: Path) -> None:
    """A folder is passed over with all that is in it; stamps change with the content."""
    for name in ("a", "b/c", "out/d", "out/e/f"):
        memory.pipe_file(f"/in/{name}", b"1")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for folder in ("memory://in", str(tmp_path)):
        listed = {entry.name: entry for entry in storage.walk(folder, storage.join(folder, "out"))}
        assert set(listed) == {"a", "b/c"}
        assert storage.read(listed["b/c"].address) == b"1"
        storage.write(listed["a"].address, b"22")
        assert storage.stamp_of(listed["a"].address) != listed["a"].stamp
        assert storage.stamp_of(storage.join(folder, "none")) == ""
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(list(storage.walk(str(tmp_path)))) == 4


def test_nothing_is_left_of_what_cannot_be_written(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(type(memory), "mv", full)
    with pytest.raises(PermissionError, match="read-only"):
        storage.write("memory://out/a.png", b"1")
    assert memory.find("/") == []
    with pytest.raises(ImageError, match="there is no such file"):
        storage.read("memory://out/a.png")


def test_half_a_row_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"name": "a"}\n{"name": "b", "sta')
    log = manifest.RowLog(str(tmp_path), "manifest.jsonl", "parts")
    log.add({"name": "c"})
    log.close()
    assert [row["name"] for row in log.rows()] == ["a", "c"]
    log.replace(iter([{"name": "d"}]))
    assert [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()] == [{"name": "d"}]
