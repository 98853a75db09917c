"""Scores of folders of images: means with intervals, as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_atomically
from ..errors import ImageError, SettingsError
from ..images.formats import named_files, read_suffixes
from ..images.listing import list_folder
from ..images.reading import load_image
from .metrics import ImageArray, Metric, available_metrics, lower_is_better, needs_reference

CONFIDENCE = 0.95
"""Of the intervals around means."""

MAX_NAMED = 5
"""How many files a message names."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of results.

    Attributes:
        metrics: names of the available metrics, in order.
        scores: for each image by name, its scores in that order; NaN for a metric of whole folders.
        missing: for each metric that could not be had, why.
        whole: for each metric of whole folders, its score.
        lower: for each metric, whether a lower score is the better one.
        failures: for each image that could not be scored, why.
    """

    metrics: list[str]
    scores: dict[str, list[float]]
    missing: dict[str, str]
    whole: dict[str, float] = field(default_factory=dict)
    lower: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def means(self) -> list[float]:
        """Mean over the images of each metric, or the whole folder's score."""
        columns = zip(*self.scores.values(), strict=True) if self.metrics else ()
        return [
            self.whole[name] if name in self.whole else float(np.mean(column))
            for name, column in zip(self.metrics, columns, strict=True)
        ]

    @property
    def intervals(self) -> list[float | None]:
        """Half width of each mean's 95 % interval (Student's t); None for one image, or for a whole folder's score."""
        columns = zip(*self.scores.values(), strict=True) if self.metrics else ()
        return [
            None if name in self.whole else confidence_interval(column)
            for name, column in zip(self.metrics, columns, strict=True)
        ]


def confidence_interval(values: Sequence[float]) -> float | None:
    """Half width of the 95 % interval of a mean (Student's t); None for one value, or where one is not finite."""
    from scipy.stats import t

    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * spread


def evaluate(
    results: Path, reference: Path | None, names: Sequence[str], device: str = "cpu", border: int = 0
) -> Evaluation:
    """Score every image of a folder.

    Args:
        results: folder of images, or one image.
        reference: folder of the references under the same names (any suffix), or one image; None for metrics that
            need none.
        names: of metrics.
        device: for those that pyiqa computes.
        border: pixels that are cut off at each side before images are compared with references.

    Raises:
        ImageError: a folder is empty, a reference is missing, or no image can be scored.
        SettingsError: an unknown metric, or one that needs a reference without one.
    """
    return evaluate_folders([results], reference, names, device, border)[0]


def evaluate_folders(
    folders: Sequence[Path], reference: Path | None, names: Sequence[str], device: str = "cpu", border: int = 0
) -> list[Evaluation]:
    """Score several folders with the same metrics, each loaded once; as `evaluate`."""
    if border < 0:
        raise SettingsError(f"border must be 0 or more, got {border}.")
    wanting = [n for n in names if needs_reference(n)]
    if reference is None and wanting:
        raise SettingsError(f"{', '.join(wanting)} compare with a reference; give --reference.")
    paired = [_pairs(folder, reference) for folder in folders]
    metrics, missing = available_metrics(names, device)
    made = []
    for folder, pairs in zip(folders, paired, strict=True):
        whole: dict[str, float] = {}
        for name, metric in metrics.items():
            if metric.score_folders is not None:
                whole[name] = _score_folders(metric, folder, reference)
        scores: dict[str, list[float]] = {}
        failures: dict[str, str] = {}
        for name, files in pairs.items():
            try:
                scores[name] = score_image(metrics.values(), *files, border)
            # Metrics are other packages' and raise whatever they like; the other images are still to be scored.
            except Exception as error:
                failures[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        if failures and not scores:
            raise ImageError(f"No image of {folder} can be scored. {next(iter(failures.values()))}")
        made.append(Evaluation(list(metrics), scores, missing, whole, lower_is_better(metrics), failures))
    return made


def _score_folders(metric: Metric, folder: Path, reference: Path | None) -> float:
    assert metric.score_folders is not None
    if reference is None or not (folder.is_dir() and reference.is_dir()):
        raise SettingsError(f"{metric.name} compares whole folders; give two folders, not images.")
    return metric.score_folders(folder, reference)


def score_image(
    metrics: Iterable[Metric], result_file: Path, reference_file: Path | None, border: int = 0
) -> list[float]:
    """Score one image; NaN for metrics of whole folders.

    Raises:
        ImageError: image and reference have different sizes, or nothing is left without the border.
    """
    result = _read(result_file)
    truth = None if reference_file is None else _read(reference_file)
    if truth is not None and truth.shape != result.shape:
        raise ImageError(
            f"{result_file} has {result.shape[1]} x {result.shape[0]} pixels, its reference {reference_file} "
            f"{truth.shape[1]} x {truth.shape[0]}; expected the same size."
        )
    if min(result.shape[:2]) <= 2 * border:
        raise ImageError(
            f"{result_file} has {result.shape[1]} x {result.shape[0]} pixels, and nothing is left of it without a "
            f"border of {border}."
        )
    inner = slice(border, -border or None)
    scores = []
    for metric in metrics:
        if metric.score is None:
            scores.append(math.nan)
        elif metric.referenced and truth is not None:
            scores.append(metric.score(result[inner, inner], truth[inner, inner]))
        else:
            scores.append(metric.score(result, truth))
    return scores


def image_files(path: Path) -> dict[str, Path]:
    """Images of a folder by their names in it, without endings; or a single image by its stem.

    Raises:
        ImageError: there is no such folder, no image in it, or two of the same name.
    """
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise ImageError(f"There is no file or folder {path}. Check the name.")
    listed = list_folder(path)
    if not listed.files:
        raise ImageError(
            f"The folder {path} has no images ({', '.join(read_suffixes())}).{' ' * bool(listed.note)}{listed.note}"
        )
    return named_files(path, listed.files)


def skipped(folders: Sequence[Path], reference: Path | None) -> list[str]:
    """In words, which files take no part in a comparison: formats that are not read, references without a result."""
    both = [*folders, *([] if reference is None else [reference])]
    lines = [f"{folder}: {note}" for folder in both if folder.is_dir() and (note := list_folder(folder).note)]
    if reference is None or not reference.is_dir():
        return lines
    truths = image_files(reference)
    for folder in folders:
        unused = sorted(truths.keys() - image_files(folder).keys())
        if unused:
            more = ", ..." if len(unused) > MAX_NAMED else ""
            lines.append(f"{folder}: no result for {len(unused)} reference(s): {', '.join(unused[:MAX_NAMED])}{more}")
    return lines


def _pairs(results: Path, reference: Path | None) -> dict[str, tuple[Path, Path | None]]:
    found = image_files(results)
    if reference is None:
        return {name: (file, None) for name, file in found.items()}
    truths = image_files(reference)
    if results.is_file() and reference.is_file():
        return {results.stem: (results, reference)}
    lost = [name for name in found if name not in truths]
    if lost:
        raise ImageError(
            f"{len(lost)} of {len(found)} results have no reference in {reference}: {', '.join(lost[:MAX_NAMED])}."
        )
    return {name: (file, truths[name]) for name, file in found.items()}


def _read(path: Path) -> ImageArray:
    return np.asarray((load_image(path).colors.clamp(0, 1) * 255).round().byte().permute(1, 2, 0))


def table(evaluation: Evaluation) -> str:
    """The scores as a Markdown table with a row of means, and a line for each missing metric."""
    lines = ["| image | " + " | ".join(evaluation.metrics) + " |", "|---" * (len(evaluation.metrics) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(map(_number, scores)) + " |" for name, scores in evaluation.scores.items()]
    means = zip(evaluation.means, evaluation.intervals, strict=True)
    lines.append("| mean | " + " | ".join(_with_interval(mean, half) for mean, half in means) + " |")
    lines += _missing(evaluation)
    return "\n".join(lines) + "\n"


def comparison(evaluations: dict[str, Evaluation]) -> str:
    """Several folders as the columns of a Markdown table of means; the best is bold, the second best underlined."""
    names = list(evaluations)
    first = evaluations[names[0]]
    lines = ["| metric | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, metric in enumerate(first.metrics):
        lower = first.lower.get(metric, False)
        means = [evaluation.means[row] for evaluation in evaluations.values()]
        ranked = sorted(set(means), reverse=not lower)
        cells = []
        for mean, evaluation in zip(means, evaluations.values(), strict=True):
            cell = _with_interval(mean, evaluation.intervals[row])
            place = ranked.index(mean) if len(ranked) > 1 else -1
            cells.append({0: f"**{cell}**", 1: f"<u>{cell}</u>"}.get(place, cell))
        lines.append(f"| {metric} {'↓' if lower else '↑'} | " + " | ".join(cells) + " |")
    lines += _missing(first)
    for folder, other in list(evaluations.items())[1:]:
        lines += [f"failed: {folder}: {name}: {reason}" for name, reason in other.failures.items()]
    return "\n".join(lines) + "\n"


def _missing(evaluation: Evaluation) -> list[str]:
    missing = [f"missing: {name}: {reason}" for name, reason in evaluation.missing.items()]
    return missing + [f"failed: {name}: {reason}" for name, reason in evaluation.failures.items()]


def _number(score: float) -> str:
    return "" if math.isnan(score) else f"{score:.4f}"


def _with_interval(mean: float, half: float | None) -> str:
    return _number(mean) if half is None else f"{_number(mean)} ± {half:.4f}"


def write_csv(evaluations: dict[str, Evaluation], path: Path) -> None:
    """The scores as CSV with a row of means for each folder; missing metrics are columns of empty cells.

    With several folders, the first column is the folder.
    """
    several = len(evaluations) > 1
    first = next(iter(evaluations.values()))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*(["results"] if several else []), "image", *first.metrics, *first.missing])
    for folder, evaluation in evaluations.items():
        for name, scores in [*evaluation.scores.items(), ("mean", evaluation.means)]:
            cells = ["" if math.isnan(score) else f"{score:.6f}" for score in scores]
            writer.writerow([*([folder] if several else []), name, *cells, *[""] * len(evaluation.missing)])
    write_atomically(path, text.getvalue().encode("utf-8", "backslashreplace"))


def as_json(evaluations: dict[str, Evaluation]) -> str:
    """All scores, means, intervals and missing metrics as JSON; what is not finite is null."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    values: dict[str, Any] = {
        folder: {
            "mean": {n: finite(v) for n, v in zip(e.metrics, e.means, strict=True)},
            "interval_95": {n: finite(v) for n, v in zip(e.metrics, e.intervals, strict=True)},
            "images": {
                image: {n: finite(v) for n, v in zip(e.metrics, scores, strict=True)}
                for image, scores in e.scores.items()
            },
            "lower_is_better": e.lower,
            "missing": e.missing,
            "failures": e.failures,
        }
        for folder, e in evaluations.items()
    }
    return json.dumps(values, indent=1) + "\n"
