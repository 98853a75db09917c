"""A run over an archive: list, restore what is not done, keep the manifest, write the summary page."""

from __future__ import annotations

import glob
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..engine.restoration import Restoration
from ..errors import ImageError, SettingsError
from ..images.formats import is_readable, left_out_note, read_suffixes
from ..images.names import folder_problem, real_path
from ..images.writing import WRITE_SUFFIXES
from .manifest import MANIFEST, PARTS, THUMBNAILS, Row, RowLog
from .progress import RunProgress
from .storage import Entry, as_address, find, is_folder, is_leftover, is_url, join, remove, stamp_of, walk
from .summary import MOST_ROWS, write_summary
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
        restoration: what is done to every image.
        overwrite: do everything again.
        quiet: write about failures alone.
    """

    inputs: Sequence[str]
    out: str
    suffix: str
    restoration: Restoration
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
                manifest.replace(cast("Iterator[dict[str, object]]", work.rows()))
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
            if self.restoration.captions and is_folder(word):
                work.add_texts(walk(word, self.out), self.restoration.caption_suffixes)
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
        work.add_rows(cast("Iterator[Row]", manifest.rows()))
        if is_folder(self.out):
            work.add_results(self._results())
        if not self.overwrite:
            work.mark_finished(self.restoration.digest)
            if (number := work.outdated()) and not self.quiet:
                sys.stderr.write(f"{number} result(s) were made with other settings or of other images; done again\n")
        if note := left_out_note(map(Path, others.elements())):
            sys.stderr.write(note + "\n")

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
        worker = Worker(self.restoration, self.out, f"{platform.node()}/{os.getpid()}", self.overwrite)
        for item in items():
            yield worker.work(item)


def _listed(word: str, out: str, others: Counter[str]) -> Iterator[Entry]:
    """The images that a word of the command line stands for; those of a folder that are not read go into `others`."""
    if is_folder(word):
        same = word.rstrip("/") == out.rstrip("/") if is_url(word) else real_path(Path(word)) == real_path(Path(out))
        if same:
            raise SettingsError(f"{out} is the folder of the inputs. Choose another one for the results.")
        for entry in walk(word, out):
            name = entry.name.rsplit("/", 1)[-1]
            readable = is_readable(name)
            if readable:
                yield entry
            elif readable is not None:
                others[f"_{Path(name).suffix}"] += 1
    elif is_url(word):
        yield from find(word)
    elif os.path.lexists(word) or not glob.has_magic(word):
        yield Entry(word, Path(word).name, stamp_of(word))
    else:
        for file in sorted(glob.iglob(word, recursive=True)):
            if os.path.isfile(file):
                yield Entry(file, Path(file).name, stamp_of(file))
