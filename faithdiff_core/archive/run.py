"""A run over an archive: list, restore what is not done, keep the manifest, write the summary page."""

from __future__ import annotations

import itertools
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..errors import ImageError, SettingsError
from ..images.formats import WRITE_SUFFIXES, left_out_note, read_suffixes
from ..images.listing import Entry, check_other_folder, expand, only_images
from ..images.masks import check_one_mask
from ..images.names import folder_problem
from .manifest import MANIFEST, PARTS, THUMBNAILS, Row, RowLog
from .progress import RunProgress
from .storage import as_address, find, is_folder, is_leftover, is_url, join, remove, stamp_of, walk
from .summary import MOST_ROWS, write_summary
from .task import Task
from .work_list import Item, WorkList
from .worker import Report, Worker

Reports = Callable[[Callable[[], Iterator[Item]]], Iterator[Report]]
"""Works on all items that are open (given by a function), and yields what became of them in the order of their ends."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        done, skipped: number of images that were restored, and of those that were done before.
        failures: addresses of images with the reasons why they failed.
        stopped: Ctrl-C ended it.
    """

    done: int
    skipped: int
    failures: list[tuple[str, str]]
    stopped: bool


@dataclass(frozen=True)
class Archive:
    """What is to be restored, and where to.

    Attributes:
        inputs: images, folders, patterns and URLs of these.
        out: folder of the results, path or URL.
        suffix: ending of results, such as ".png".
        task: what is done to every image.
        masks: a mask for a single image, or a folder of masks, path or URL; empty for none.
        overwrite: do everything again.
        quiet: write about failures alone.
    """

    inputs: Sequence[str]
    out: str
    suffix: str
    task: Task
    masks: str = ""
    overwrite: bool = False
    quiet: bool = False

    def run(self, reports: Reports | None = None) -> Outcome:
        """Restore all that is not done.

        Args:
            reports: works on the items; this process by default.

        Raises:
            FaithDiffError: nothing is found, the output cannot be written, or the models cannot be loaded.
        """
        work = WorkList()
        manifest, small = RowLog(self.out, MANIFEST, PARTS), RowLog(self.out, THUMBNAILS, PARTS + "-thumbnails")
        try:
            self._plan(work, manifest)
            try:
                return self._work(work, manifest, small, reports or self._here)
            finally:
                manifest.close()
                small.close()
                rows = itertools.chain(work.rows(), work.other_rows())
                manifest.replace(cast("Iterator[dict[str, object]]", rows))
                write_summary(self.out, work, small)
        finally:
            work.close()

    def _plan(self, work: WorkList, manifest: RowLog) -> None:
        """List the inputs, and find out which are done.

        Raises:
            SettingsError: there are none, or a result would overwrite one.
            ImageError: the output folder cannot be written to.
        """
        if self.out.lower().endswith(WRITE_SUFFIXES) and not is_folder(self.out):
            raise SettingsError(f"{self.out} is named like an image; with --workers or URLs give a folder.")
        others: Counter[str] = Counter()
        for word in map(as_address, self.inputs):
            work.add(_listed(word, self.out, others))
            if suffixes := self.task.caption_suffixes:
                work.add_texts(self._texts(word), suffixes)
        total, _ = work.counts()
        if not total:
            raise SettingsError(
                f"There is no image in {', '.join(self.inputs)}: no file with one of the endings "
                f"{', '.join(read_suffixes())}."
            )
        work.name_results(self.suffix)
        if source := work.overwritten(lambda name: join(self.out, name)):
            raise SettingsError(f"The result would overwrite the input {source}. Choose another folder or name.")
        if not is_url(self.out) and (problem := folder_problem(Path(self.out))):
            raise ImageError(f"Results cannot be written: {problem}")
        self._add_masks(work, total)
        work.add_rows(cast("Iterator[Row]", manifest.rows()))
        if is_folder(self.out):
            work.add_results(self._results())
        if not self.overwrite:
            work.mark_finished(self.task.digest, self.task.names)
            if (number := work.outdated()) and not self.quiet:
                sys.stderr.write(f"{number} result(s) were made with other settings or of other images; done again\n")
        if note := left_out_note(others):
            sys.stderr.write(note + "\n")

    def _texts(self, word: str) -> Iterator[Entry]:
        """The captions beside the images that a word of the command line stands for, and other files of a folder."""
        if is_folder(word):
            yield from walk(word, self.out)
            return
        for entry in _listed(word, self.out, Counter()):
            for suffix in self.task.caption_suffixes:
                text = os.path.splitext(entry.address)[0] + suffix
                if stamp := stamp_of(text):
                    yield Entry(text, text, stamp)

    def _add_masks(self, work: WorkList, total: int) -> None:
        """Give the images their masks.

        Raises:
            SettingsError: one has none, or a mask would serve several.
        """
        if not self.masks:
            return
        if is_folder(self.masks):
            work.add_masks(self.masks, only_images(walk(self.masks), Counter()))
            return
        stamp = stamp_of(self.masks)
        check_one_mask(self.masks, total, bool(stamp))
        work.set_mask(Entry(self.masks, self.masks, stamp))

    def _results(self) -> Iterator[str]:
        """Names of the files in the output folder; what a killed process was writing is removed."""
        for entry in walk(self.out):
            if is_leftover(entry.name):
                remove(entry.address)
            else:
                yield entry.name

    def _work(self, work: WorkList, manifest: RowLog, small: RowLog, reports: Reports) -> Outcome:
        total, todo = work.counts()
        progress = RunProgress(todo, quiet=self.quiet)
        stopped = False
        try:
            if todo:
                every = max(1, todo // MOST_ROWS)
                for report in reports(lambda: work.open_items(every)):
                    self._note(report, work, manifest, small, progress)
        except KeyboardInterrupt:
            stopped = True
        progress.clear()
        if not self.quiet and len(progress.workers) > 1:
            sys.stdout.write("\n".join(progress.by_worker()) + "\n")
        failures = [(row["source"], row["error"]) for row in work.rows(("failed",), "work.finished")]
        return Outcome(progress.done, total - todo + progress.skipped, failures, stopped)

    def _note(self, report: Report, work: WorkList, manifest: RowLog, small: RowLog, progress: RunProgress) -> None:
        """Put a report down in the manifest, and tell of it."""
        row = report.row
        if not work.finish(row):
            return
        manifest.add(cast("dict[str, object]", row))
        if report.thumbnails and (row["state"] == "done" or progress.failed < MOST_ROWS):
            small.add({"name": row["name"], "images": report.thumbnails})
        progress.add(row)
        label = f"[{progress.finished}/{progress.total}] {row['name']}"
        progress.clear()
        if row["state"] == "failed":
            sys.stderr.write(f"{label}: failed: {row['error']}\n")
        for note in row.get("notes", ()):
            sys.stderr.write(f"{label}: {note}\n")
        if row["state"] == "done" and not self.quiet:
            sys.stdout.write(f"{label} -> {join(self.out, row['name'])}\n")
            sys.stdout.flush()
        progress.show()

    def _here(self, items: Callable[[], Iterator[Item]]) -> Iterator[Report]:
        """Work on the items in this process."""
        worker = Worker(self.task, self.out, f"{platform.node()}/{os.getpid()}", self.overwrite)
        for item in items():
            yield worker.work(item)


def _listed(word: str, out: str, left_out: Counter[str]) -> Iterator[Entry]:
    """The images that a word of the command line stands for; those of a folder that are not read go into `left_out`."""
    if not is_url(word):
        yield from expand(word, "" if is_url(out) else out, left_out)
    elif is_folder(word):
        check_other_folder(word.rstrip("/") == out.rstrip("/"), out)
        yield from only_images(walk(word, out), left_out)
    else:
        yield from find(word)
