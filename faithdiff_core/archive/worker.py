"""What a worker does: read an image, have it worked on, write the result, and say in a row what became of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import reason_of
from ..images.names import folder_problem, name_problem, source_problem
from .manifest import Row
from .storage import is_url, join, read, read_optional, write
from .task import Given, Task
from .work_list import Item


@dataclass(frozen=True)
class Report:
    """What a worker hands back for an item.

    Attributes:
        row: for the manifest.
        thumbnails: JPEG files in base64, before and after; empty where none were wanted or could be made.
    """

    row: Row
    thumbnails: tuple[str, ...] = ()


class Worker:
    """Works on items with what is loaded once.

    Args:
        task: what is done to every image.
        out: the output folder, path or URL.
        name: of this worker, for the rows.
        overwrite: results that are there do not count.

    Raises:
        FaithDiffError: what the task needs cannot be loaded.
    """

    def __init__(self, task: Task, out: str, name: str, overwrite: bool = False) -> None:
        self.task = task
        self.out = out
        self.name = name
        self.overwrite = overwrite
        self.engine = task.start()

    def work(self, item: Item) -> Report:
        """Do one item; a failure is a row like any other."""
        started = time.monotonic()
        row: Row = {
            "name": item.name,
            "source": item.source,
            "state": "done",
            "worker": self.name,
            "settings": self.task.digest,
            "stamp": item.stamp,
        }
        images: list[Any] = []
        try:
            self._do(item, row, images)
        # Decoders and models of other packages raise whatever they like, and the other images are still to be done.
        except Exception as error:
            row["state"] = "failed"
            row["error"] = reason_of(error).splitlines()[0]
        failed = row["state"] == "failed"
        if failed:
            self.engine.free_memory()  # behind the except block, which holds the failed call's tensors
        row["seconds"] = round(time.monotonic() - started, 3)
        row["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Report(row, tuple(map(self.engine.thumbnail, images)) if item.thumbnail or failed else ())

    def _do(self, item: Item, row: Row, images: list[Any]) -> None:
        """Do the work, and put into `row` and `images` (before and after) what there is until something fails."""
        self._check(item)
        content = read(item.source)
        row["bytes_read"] = len(content)
        name = _file_name(item.source)
        image = self.engine.read(content, name)
        images.append(image)
        given = Given(name, item.name, self._texts(item.source), self._mask(item.mask))
        if self._done_before(item, image, given):
            row["skipped"] = True
            return
        result = self.engine.work(image, given)
        for file, made in result.files:
            write(join(self.out, file), made)
        images.append(result.image)
        row["height"], row["width"] = result.size
        row["bytes_written"] = sum(len(made) for _, made in result.files)
        row["notes"] = list(result.notes)

    def _check(self, item: Item) -> None:
        """Say in the ordinary command's words what cannot work, before the work."""
        problem = "" if is_url(item.source) else source_problem(Path(item.source))
        if not problem and not is_url(self.out):
            target = Path(join(self.out, item.name))
            problem = folder_problem(target.parent) or name_problem(target)
        if problem:
            raise OSError(problem)

    def _texts(self, source: str) -> dict[str, bytes]:
        stem = os.path.splitext(source)[0]
        found = {suffix: read_optional(stem + suffix) for suffix in self.task.caption_suffixes}
        return {suffix: content for suffix, content in found.items() if content is not None}

    def _mask(self, mask: str) -> tuple[str, bytes] | None:
        return (_file_name(mask), read(mask)) if mask else None

    def _done_before(self, item: Item, image: Any, given: Given) -> bool:
        """Whether the result is there, though no row says so: a run was killed between the two."""
        if not item.unknown_result or self.overwrite:
            return False
        content = read_optional(join(self.out, item.name))
        return content is not None and self.engine.is_result(content, image, given)


def _file_name(address: str) -> str:
    return PurePosixPath(address).name if is_url(address) else Path(address).name
