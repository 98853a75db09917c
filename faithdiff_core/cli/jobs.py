"""How a command works through images: with a line of progress, and one bad file ends no run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from ..engine.restoration import Progress
from ..errors import reason_of
from ..images.batch import Job, Report
from .progress_line import ProgressLine


def attempt(job: Job, work: Callable[[Job, Progress], Sequence[str]], report: Report, label: str, quiet: bool) -> None:
    """Do one job, and put down in `report` what became of it: no error but Ctrl-C ends a run.

    Args:
        job: what is worked on.
        work: does it and returns notes for the user.
        report: gets the result.
        label: number and name, before what is written about the image.
        quiet: write about failures and notes alone.
    """
    line = ProgressLine(quiet=quiet)
    try:
        notes = work(job, lambda stage, done, total: line.show(f"{label}: {stage}", done, total))
    # Decoders and models of other packages raise whatever they like, and the other images are still to be done.
    except Exception as error:
        logging.getLogger(__name__).debug("working on %s", job.source, exc_info=True)
        reason = reason_of(error)
        line.clear()
        sys.stderr.write(f"{label}: failed: {reason}\n")
        report.failures.append((job.source, reason.splitlines()[0]))
        return
    finally:
        line.clear()
    report.done += 1
    for note in notes:
        sys.stderr.write(f"{label}: {note}\n")
    if not quiet:
        sys.stdout.write(f"{label} -> {job.target}\n")
        sys.stdout.flush()
