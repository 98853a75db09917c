"""The command `sweep`."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..cli import EXIT_CANCELLED, EXIT_FAILED
from ..engine.description import add_option, default_of, described, option, plain
from ..engine.restoration import METADATA_KEY, Progress, Restoration
from ..engine.settings import RestoreSettings
from ..errors import FaithDiffError, ImageError, SettingsError
from ..evaluation.contact_sheet import CELL, SheetImage, contact_sheets
from ..evaluation.metrics import FULL_REFERENCE, NO_REFERENCE, Metric, available_metrics, needs_reference
from ..evaluation.scores import image_files, score_image
from ..evaluation.sweep import Axis, Layout, Point, SweepResult, digest_of, file_stem, mean_score, point_label, points
from ..evaluation.sweep_tables import sweep_csv, sweep_markdown
from ..evaluation.tradeoff import FIDELITY, PERCEPTUAL, plot_tradeoff
from ..images.batch import Job, Report, find_jobs, left_out, possible
from ..images.formats import left_out_note
from ..images.masks import find_masks
from ..images.names import folder_problem
from ..images.reading import load_image
from ..images.sizes import target_size
from .jobs import attempt
from .restore import (
    add_mask_options,
    add_metadata_options,
    add_model_options,
    add_scheduler_option,
    add_size_options,
    add_text_options,
    read_restoration,
)

IMAGES = "images"
"""Folder of the results in the output folder."""

SHEET, PLOT = "sheet.png", "tradeoff.png"

SCORES = "scores.json"
"""Scores in the folder of the results, by the digest of result, reference and border."""

_EXAMPLES = """
Every setting takes one value or several with commas between them. The settings with several values span the grid.

examples:
  the paper's Table 10
    python -m faithdiff_core sweep photos/ -o out --reference originals/ --steps 10,20,30,40,50 --cfg 2,5,8 --model ...
  scratches or faces only, with a mask of each image's name
    python -m faithdiff_core sweep photos/ -o out --mask masks/ --cfg 2,5,8 --model ...
  the paper's Table 11: what the start changes, over three seeds
    python -m faithdiff_core sweep photos/ -o out --reference originals/ --start lr,noise --seeds 3 --model ...

The output folder gets sweep.csv, sweep.md, sheet.png and tradeoff.png, and the results in images/. Run the command
again to continue where it stopped: what was restored with the same settings, models and input is kept.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sweep`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("inputs", nargs="+", metavar="IN", help="images, folders and patterns")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a folder")
    parser.add_argument("--reference", type=Path, metavar="HQ", help="the originals under the same names")
    parser.add_argument("--quiet", action="store_true", help="no progress, only failures")
    add_metadata_options(parser)
    add_model_options(parser)
    lists = {"type": str, "choices": None, "metavar": "LIST"}
    add_size_options(parser, **lists)
    add_text_options(parser)
    add_mask_options(parser)
    method, tiles = parser.add_argument_group("method"), parser.add_argument_group("tiles")
    for name, what in described(RestoreSettings).items():
        if what.group in ("method", "tiles"):
            default = str(default_of(RestoreSettings, name))
            words = f"{what.help}: {', '.join(what.choices)}" if what.choices else what.help
            group = method if what.group == "method" else tiles
            add_option(group, RestoreSettings, name, **lists, default=default, help=f"{words} ({default})")
    method.add_argument("--seed", type=int, default=0, metavar="N", help="the first one (0)")
    method.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds for each point (1)")
    add_scheduler_option(method)
    out = parser.add_argument_group("table, sheet and plot")
    out.add_argument(
        "--metrics", metavar="LIST", help="as for `evaluate` (all of its own that the reference allows, and blur)"
    )
    out.add_argument(
        "--border",
        type=int,
        default=0,
        metavar="N",
        help="pixels cropped at each side before comparing with references (0)",
    )
    out.add_argument("--plot", metavar="X,Y", help="metrics of the plot (fidelity and perceptual, as far as measured)")
    out.add_argument("--cell", type=int, default=CELL, metavar="PX", help=f"side of the sheet's cells ({CELL})")
    out.add_argument(
        "--crop",
        metavar="L,T,W,H",
        help="part of the results that the sheet shows, in their pixels (where they differ most)",
    )
    out.add_argument("--metric-device", default="cpu", metavar="DEVICE", help="for the metrics with networks (cpu)")


def run(args: argparse.Namespace) -> int:
    """Restore what is not there yet, score it, and write table, sheet and plot.

    Returns:
        0, or 1 if a result is missing.

    Raises:
        FaithDiffError: bad arguments, or a model that cannot be loaded.
    """
    sweep = _Sweep(args)
    code = sweep.restore()
    if code != EXIT_CANCELLED:
        results = sweep.score()
        sweep.write(results)
        if any(result.failure for result in results):
            code = EXIT_FAILED
    return code


class _Sweep:
    """One run of the command; everything that can be checked is checked when it is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.quiet: bool = args.quiet
        self.output: Path = args.output
        if self.output.exists() and not self.output.is_dir():
            raise SettingsError(f"{self.output} is a file; a sweep writes a folder.")
        if problem := folder_problem(self.output):
            raise SettingsError(problem)
        self.axes, lists = _read_axes(args)
        if args.seeds < 1:
            raise SettingsError(f"--seeds must be 1 or more, got {args.seeds}.")
        self.seeds = [args.seed + i for i in range(args.seeds)]
        if not self.axes and args.seeds == 1:
            raise SettingsError(
                "Nothing is swept: give a setting several values, such as --steps 10,20,30, or --seeds 3."
            )
        for name, values in lists.items():
            setattr(args, name, values[0])
        self.base = read_restoration(args)
        self.cell, self.crop = args.cell, _read_crop(args.crop)
        self.border = args.border
        self.metrics, self.missing = self._find_metrics(args)
        self.plot = self._plot_metrics(args.plot)
        results = self.output / IMAGES
        own = {self.output.resolve() / name for name in (SHEET, PLOT)}  # of an earlier run, in a folder of inputs
        self.jobs = [job for job in find_jobs(args.inputs, results, ".png") if job.source.resolve() not in own]
        if note := left_out_note(left_out(args.inputs, results)):
            sys.stderr.write(note + "\n")
        self.report = Report(skipped=None)
        self.masks = {} if args.mask is None else find_masks([job.source for job in self.jobs], args.mask)
        self.good = possible(self.jobs, self.report)
        self.references = self._find_references(args.reference)
        self.failures: dict[Path, str] = {}
        self.impossible = dict(self.report.failures)
        self._check_sizes()
        self._identity = json.dumps(self.base.files.identity())

    def _find_metrics(self, args: argparse.Namespace) -> tuple[dict[str, Metric], dict[str, str]]:
        if args.metrics is not None:
            names = [name.strip() for name in args.metrics.split(",") if name.strip()]
        else:
            names = [*(FULL_REFERENCE if args.reference else ()), *NO_REFERENCE, "blur"]
        wanting = [name for name in names if needs_reference(name)]
        if wanting and args.reference is None:
            raise SettingsError(f"{', '.join(wanting)} compare with a reference; give --reference.")
        if args.border < 0:
            raise SettingsError(f"--border must be 0 or more, got {args.border}.")
        found, missing = available_metrics(names, args.metric_device)
        whole = [name for name, metric in found.items() if metric.score is None]
        if whole:
            raise SettingsError(f"{', '.join(whole)} compare whole folders; use `evaluate` for the results of a point.")
        return found, missing

    def _plot_metrics(self, words: str | None) -> tuple[str, str] | None:
        if words is None:
            pair = [next((name for name in of if name in self.metrics), None) for of in (FIDELITY, PERCEPTUAL)]
            return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])
        names = [word.strip() for word in words.split(",")]
        if len(names) != 2 or any(name not in self.metrics for name in names):
            raise SettingsError(f"--plot takes two of the metrics {', '.join(self.metrics)}, got {words}.")
        return names[0], names[1]

    def _find_references(self, reference: Path | None) -> dict[str, Path]:
        """The reference of each image by its name in the output."""
        if reference is None:
            return {}
        if reference.is_file() and len(self.jobs) == 1:
            return {self._name(self.jobs[0]): reference}
        found = image_files(reference)
        names = [self._name(job) for job in self.jobs]
        lost = [name for name in names if name not in found]
        if lost:
            raise ImageError(f"{len(lost)} of {len(names)} inputs have no reference in {reference}: {lost[0]}, ...")
        return {name: found[name] for name in names}

    def _check_sizes(self) -> None:
        """Results are to have their references' sizes; said before hours of work, not after them."""
        for job in self.good:
            reference = self.references.get(self._name(job))
            if reference is None:
                continue
            wanted = load_image(reference).size
            source = load_image(job.source).size
            for point in points(self.axes):
                size = target_size(*source, **self._at(point, self.seeds[0]).size)
                if size != wanted:
                    at = f" at {point_label(self.axes, point)}" if self.axes else ""
                    raise ImageError(
                        f"{job.source.name} becomes {size[1]} x {size[0]} pixels{at}, its reference {reference} has "
                        f"{wanted[1]} x {wanted[0]}; expected the same size. Choose another --scale, or leave out "
                        f"--reference."
                    )

    def _name(self, job: Job) -> str:
        return job.target.relative_to(self.output / IMAGES).with_suffix("").as_posix()

    def _at(self, point: Point, seed: int) -> Restoration:
        """What is done at a point."""
        values = {axis.name: value for axis, value in zip(self.axes, point, strict=True)}
        scale = values.pop("scale", None)
        size = self.base.size if scale is None else {"scale": scale}
        return replace(self.base, settings=self.base.settings.changed(**values), size=size, seed=seed)

    def _file(self, job: Job, point: Point, seed: int) -> Path:
        return job.target.with_suffix("") / f"{file_stem(self.axes, point, seed)}.png"

    def _digest(self, restoration: Restoration, source: Path, content: str) -> str:
        """Changes with anything that changes the result: input and mask (`content`), caption, settings, models."""
        text = restoration.text_for(source)
        tiles = () if text.tiles is None else (text.tiles.to_json().decode(),)
        return digest_of(restoration.digest, text.prompt, content, self._identity, *tiles)

    def _input(self, source: Path) -> str:
        """The digest of an input, and of its mask where it has one."""
        mask = self.masks.get(source)
        if mask is None:
            return _content(source)
        return digest_of(_content(source), _content(mask), str(self.base.feather))

    def restore(self) -> int:
        """Restore what is missing, each image at all points before the next.

        Returns:
            0, or 130 after Ctrl-C.
        """
        todo: list[tuple[Job, Restoration, str, str]] = []
        total = 0
        for job in self.good:
            content = ""
            for point in points(self.axes):
                for seed in self.seeds:
                    total += 1
                    restoration, file = self._at(point, seed), self._file(job, point, seed)
                    try:
                        content = content or self._input(job.source)
                        digest = self._digest(restoration, job.source, content)
                    except (FaithDiffError, OSError) as error:
                        self.failures[file] = str(error)
                        continue
                    if _recorded_digest(file) != digest:
                        words = (self._name(job), point_label(self.axes, point), f"seed {seed}")
                        todo.append((Job(job.source, file), restoration, digest, ", ".join(filter(None, words))))
        if todo:
            pipeline = self.base.files.load()
        for number, (job, restoration, digest, label) in enumerate(todo, start=1):

            def work(job: Job, progress: Progress) -> Sequence[str]:
                record, mask = {"sweep": digest}, self.masks.get(job.source)  # noqa: B023
                return restoration.restore(pipeline, job.source, job.target, progress, record, mask)  # noqa: B023

            failed = len(self.report.failures)
            try:
                attempt(job, work, self.report, f"[{number}/{len(todo)}] {label}", self.quiet)
            except KeyboardInterrupt:
                sys.stderr.write(f"stopped; {total - len(todo) + self.report.done} of {total} results are there\n")
                return EXIT_CANCELLED
            if len(self.report.failures) > failed:
                self.failures[job.target] = self.report.failures[-1][1]
                job.target.unlink(missing_ok=True)  # an older result of this name was made with other settings
        if not self.quiet:
            sys.stdout.write(f"{self.report.done} restored, {total - len(todo)} there before\n")
        return 0

    def score(self) -> list[SweepResult]:
        """Score all results; what was scored before is looked up."""
        known_file = self.output / IMAGES / SCORES
        known: dict[str, dict[str, float | None]] = {}
        if known_file.is_file():
            try:
                known = json.loads(known_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ImageError(f"{known_file} is corrupted or truncated; delete it to score again.") from error
        results = []
        for job in self.jobs:
            name = self._name(job)
            reference = self.references.get(name)
            truth = "" if reference is None else _content(reference)
            for point in points(self.axes):
                for seed in self.seeds:
                    file = self._file(job, point, seed)
                    scores: dict[str, float] = {}
                    failure = self.failures.get(file, "") or self.impossible.get(job.source, "")
                    digest = _recorded_digest(file)
                    if digest is None:
                        failure = failure or "there is no result"
                    elif not failure:
                        entry = known.setdefault(digest_of(digest, truth, str(self.border)), {})
                        if any(metric not in entry for metric in self.metrics):
                            failure = self._measure(file, reference, entry)
                            write_atomically(known_file, json.dumps(known, indent=1).encode())
                        scores = {n: float(v) for n, v in entry.items() if n in self.metrics and v is not None}
                    shown = file.relative_to(self.output)
                    results.append(SweepResult(name, point, seed, shown, scores, failure))
        return results

    def _measure(self, file: Path, reference: Path | None, entry: dict[str, float | None]) -> str:
        """Add what is missing to the scores of a result; gives the reason if that fails."""
        lacking = [name for name in self.metrics if name not in entry]
        try:
            values = score_image([self.metrics[name] for name in lacking], file, reference, self.border)
        # Metrics are other packages' and raise whatever they like; the other results are still to be scored.
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        entry.update(zip(lacking, values, strict=True))
        return ""

    def write(self, results: Sequence[SweepResult]) -> None:
        """Write table, sheet and plot."""
        axes, at_seed = self.axes, True
        if not axes:  # seeds alone
            axes, at_seed = [Axis("seed", tuple(self.seeds))], False
            results = [replace(result, point=(result.seed,)) for result in results]
        lower = {name: metric.lower_is_better for name, metric in self.metrics.items()}
        markdown = sweep_markdown(axes, results, lower, self.missing, self.plot or ())
        write_atomically(self.output / "sweep.csv", sweep_csv(axes, results, list(lower)).encode())
        write_atomically(self.output / "sweep.md", markdown.encode())
        sys.stdout.write(markdown)
        note = f"seed {self.seeds[0]}" if at_seed and len(self.seeds) > 1 else ""
        images = []
        for job in self.jobs:
            files = {
                r.point: None if r.failure else self.output / r.file
                for r in results
                if r.image == self._name(job) and (not at_seed or r.seed == self.seeds[0])
            }
            images.append(SheetImage(self._name(job), job.source, files, self.references.get(self._name(job)), note))
        self._write_sheets(axes, images)
        self._write_plot(axes, results, lower)

    def _write_sheets(self, axes: Sequence[Axis], images: Sequence[SheetImage]) -> None:
        for number, sheet in enumerate(contact_sheets(axes, images, self.cell, self.crop), start=1):
            content = io.BytesIO()
            sheet.save(content, "PNG")
            path = self.output / SHEET
            write_atomically(path if number == 1 else path.with_stem(f"{path.stem}_{number}"), content.getvalue())

    def _write_plot(self, axes: Sequence[Axis], results: Sequence[SweepResult], lower: dict[str, bool]) -> None:
        if self.plot is None:
            kinds = f"one of {', '.join(FIDELITY)} and one of {', '.join(PERCEPTUAL)}"
            sys.stderr.write(f"no plot: it shows {kinds} (the former need --reference); or name two with --plot\n")
            return
        x, y = self.plot
        means = {}
        for point in points(axes):
            there = [r for r in results if r.point == point]
            means[point] = (mean_score(there, x).value, mean_score(there, y).value)
        default = tuple(
            default_of(RestoreSettings, axis.name) if axis.name in described(RestoreSettings) else None for axis in axes
        )
        content = io.BytesIO()
        plot_tradeoff(Layout.of(axes), means, self.plot, lower, default).savefig(content, format="png")
        write_atomically(self.output / PLOT, content.getvalue())


def _content(file: Path) -> str:
    """The digest of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _recorded_digest(file: Path) -> str | None:
    """The digest that a result was written with; None if there is no whole result of a sweep."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG",)) as image:
            recipe = json.loads(image.info.get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SyntaxError):
        return None
    digest = recipe.get("sweep") if isinstance(recipe, dict) else None
    return digest if isinstance(digest, str) else None


def _read_axes(args: argparse.Namespace) -> tuple[list[Axis], dict[str, list[Any]]]:
    """The settings with several values, and the values of all."""
    lists = {}
    for name, what in described(RestoreSettings).items():
        text = getattr(args, name)
        if text is None:  # --scale, where another size is asked for
            continue
        lists[name] = values = [_read_value(name, what.kind, word.strip()) for word in text.split(",")]
        for value in values:
            what.check(value, what=option(name))
    axes = [Axis(name, tuple(values)) for name, values in lists.items() if len(values) > 1]
    return axes, lists


def _read_value(name: str, kind: type, word: str) -> Any:
    try:
        return plain(kind(word))
    except ValueError:
        what = described(RestoreSettings)[name]
        wanted = f"one of {', '.join(what.choices)}" if what.choices else f"{kind.__name__} numbers"
        raise SettingsError(f"{option(name)} takes {wanted}, with commas between them, got {word!r}.") from None


def _read_crop(words: str | None) -> tuple[int, int, int, int] | None:
    if words is None:
        return None
    try:
        left, top, width, height = map(int, words.split(","))
    except ValueError:
        raise SettingsError(f"--crop takes left,top,width,height in pixels, got {words!r}.") from None
    return left, top, width, height
