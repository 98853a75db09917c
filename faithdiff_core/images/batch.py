"""Many images in one run: which files are read, where their results go, and what became of each."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ImageError, SettingsError
from .formats import WRITE_SUFFIXES, read_suffixes
from .listing import expand
from .names import folder_problem, name_problem, real_path, result_names, source_problem
from .writing import check_output_name


@dataclass(frozen=True)
class Job:
    """One image and the file that its result goes to."""

    source: Path
    target: Path


@dataclass
class Report:
    """What became of the images.

    Attributes:
        done: number of images whose results are written.
        skipped: number of images whose results were there before, or None for commands that skip none.
        failures: images with the reasons why they failed.
        verb: what is done to an image, for the last line.
    """

    done: int = 0
    skipped: int | None = 0
    failures: list[tuple[Path | str, str]] = field(default_factory=list)
    verb: str = "restored"

    def lines(self) -> list[str]:
        """The last lines of the output: counts, then each failure with its reason."""
        skipped = "" if self.skipped is None else f" {self.skipped} skipped (done before),"
        counts = f"{self.done} {self.verb},{skipped} {len(self.failures)} failed"
        return [counts, *(f"failed: {path}: {reason}" for path, reason in self.failures)]


def find_jobs(inputs: Sequence[str], output: Path, suffix: str) -> list[Job]:
    """Which images there are, and where their results go.

    A single image goes to `output` if that is named like an image and is no folder; otherwise results go into the
    folder `output`, under the images' names and in their subfolders. Where two names differ in their endings or in
    upper and lower case alone, results get names that no file system takes for one.

    Args:
        inputs: files, folders and patterns.
        output: the file or folder to write.
        suffix: ending of results in a folder, such as ".png".

    Raises:
        SettingsError: nothing is found, a name is taken twice, or a result would overwrite an input.
    """
    found: dict[Path, Path] = {}
    for word in inputs:
        for source, name in _expand(word, output):
            found.setdefault(source, name)
    if not found:
        raise SettingsError(
            f"There is no image in {', '.join(inputs)}: no file with one of the endings {', '.join(read_suffixes())}."
        )
    sources = list(found)
    named_file = bool(output.suffix) and not os.path.isdir(output)
    if len(sources) == 1 and named_file and not os.path.isdir(inputs[0]):
        check_output_name(output)
        jobs = [Job(sources[0], output)]
    elif os.path.isfile(output) or (named_file and output.suffix.lower() in WRITE_SUFFIXES):
        raise SettingsError(f"{output} is one file, but there are {len(sources)} images. Give a folder.")
    else:
        names = result_names(list(found.values()), suffix)
        jobs = [Job(source, output / name) for source, name in zip(sources, names, strict=True)]
    overwritten = {real_path(source) for source in sources} & {real_path(job.target) for job in jobs}
    if overwritten:
        raise SettingsError(f"The result would overwrite the input {min(overwritten)}. Choose another folder or name.")
    return jobs


def _expand(word: str, output: Path) -> Iterator[tuple[Path, Path]]:
    """Images that a word of the command line stands for, sorted, each with its name below the output folder."""
    found = expand(word, str(output), Counter())
    return iter(sorted((Path(entry.address), Path(entry.name)) for entry in found))


def left_out(inputs: Sequence[str], output: Path) -> Counter[str]:
    """Number of images in the folders among `inputs` whose formats are not read, by ending."""
    counts: Counter[str] = Counter()
    for word in filter(os.path.isdir, inputs):
        deque(expand(word, str(output), counts), maxlen=0)
    return counts


def possible(jobs: Sequence[Job], report: Report) -> list[Job]:
    """The jobs that can be done as far as files tell, looked at before any work; the others are failures in `report`.

    Raises:
        ImageError: none of the results' folders can be written to.
    """
    reasons = {folder: folder_problem(folder) for folder in {job.target.parent for job in jobs}}
    if jobs and all(reasons.values()):
        raise ImageError(f"Results cannot be written: {reasons[jobs[0].target.parent]}")
    good = []
    for job in jobs:
        reason = source_problem(job.source) or reasons[job.target.parent] or name_problem(job.target)
        if reason:
            report.failures.append((job.source, reason))
        else:
            good.append(job)
    return good
