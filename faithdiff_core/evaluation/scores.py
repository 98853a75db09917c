"""Scores of folders of images, as a table and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ImageError, SettingsError
from ..images.formats import list_folder, read_suffixes
from ..images.reading import load_image
from .metrics import FULL_REFERENCE, ImageArray, available_metrics


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of results.

    Attributes:
        metrics: names of the metrics that could be had, in order.
        scores: for each image by name, its scores in that order.
        missing: for each metric that could not be had, why.
    """

    metrics: list[str]
    scores: dict[str, list[float]]
    missing: dict[str, str]

    @property
    def means(self) -> list[float]:
        """Mean over the images of each metric."""
        return [float(np.mean(column)) for column in zip(*self.scores.values(), strict=True)]


def evaluate(results: Path, reference: Path | None, names: Sequence[str], device: str = "cpu") -> Evaluation:
    """Score every image of a folder.

    Args:
        results: folder of images, or one image.
        reference: folder of the references under the same names (any suffix), or one image; None for metrics that
            need
            none.
        names: of metrics.
        device: for those that pyiqa computes.

    Raises:
        ImageError: a folder is empty, a reference is missing or has another size, or an image cannot be read.
        SettingsError: an unknown metric, or one that needs a reference without one.
    """
    if reference is None and any(n in FULL_REFERENCE for n in names):
        raise SettingsError("psnr, ssim and lpips compare with a reference; give --reference.")
    pairs = _pairs(results, reference)
    metrics, missing = available_metrics(names, device)
    scores = {}
    for name, (result_file, reference_file) in pairs.items():
        result = _read(result_file)
        truth = None if reference_file is None else _read(reference_file)
        if truth is not None and truth.shape != result.shape:
            raise ImageError(
                f"{result_file} has {result.shape[1]} x {result.shape[0]} pixels, its reference {reference_file} "
                f"{truth.shape[1]} x {truth.shape[0]}; expected the same size."
            )
        scores[name] = [metric(result, truth) for metric in metrics.values()]
    return Evaluation(list(metrics), scores, missing)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise ImageError(f"There is no file or folder {path}. Check the name.")
    files = {str(f.relative_to(path).with_suffix("")): f for f in list_folder(path).files}
    if not files:
        raise ImageError(f"The folder {path} has no images ({', '.join(read_suffixes())}).")
    return files


def _pairs(results: Path, reference: Path | None) -> dict[str, tuple[Path, Path | None]]:
    found = _files(results)
    if reference is None:
        return {name: (file, None) for name, file in found.items()}
    truths = _files(reference)
    if results.is_file() and reference.is_file():
        return {results.stem: (results, reference)}
    lost = [name for name in found if name not in truths]
    if lost:
        raise ImageError(
            f"{len(lost)} of {len(found)} results have no reference in {reference}: {', '.join(lost[:5])}."
        )
    return {name: (file, truths[name]) for name, file in found.items()}


def _read(path: Path) -> ImageArray:
    return np.asarray((load_image(path).colors.clamp(0, 1) * 255).round().byte().permute(1, 2, 0))


def table(evaluation: Evaluation) -> str:
    """The scores as a Markdown table with a row of means, and a line for each missing metric."""
    lines = ["| image | " + " | ".join(evaluation.metrics) + " |", "|---" * (len(evaluation.metrics) + 1) + "|"]
    rows = [*evaluation.scores.items(), ("mean", evaluation.means)]
    lines += [f"| {name} | " + " | ".join(f"{score:.4f}" for score in scores) + " |" for name, scores in rows]
    lines += [f"missing: {name}: {reason}" for name, reason in evaluation.missing.items()]
    return "\n".join(lines) + "\n"


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """The scores as CSV with a row of means; missing metrics are columns of empty cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *evaluation.metrics, *evaluation.missing])
        empty = [""] * len(evaluation.missing)
        for name, scores in [*evaluation.scores.items(), ("mean", evaluation.means)]:
            writer.writerow([name, *(f"{score:.6f}" for score in scores), *empty])
