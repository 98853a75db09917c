"""The command `evaluate`: how near results are to their references, and how good they look without one.

PSNR and SSIM are scikit-image's. LPIPS and the metrics without a reference are pyiqa's; a metric that cannot be had
here (no pyiqa, or weights that cannot be loaded) is named as missing and never filled in.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MissingPackageError, PictureError, SettingsError, install_extra
from .pictures import READ_SUFFIXES, load_picture

FULL_REFERENCE = ("psnr", "ssim", "lpips")
"""Metrics that compare with a reference."""

NO_REFERENCE = ("musiq", "clipiqa+", "niqe", "maniqa", "paq2piq")
"""The paper's metrics that look at the result alone, under pyiqa's names."""

Picture = NDArray[np.uint8]
Metric = Callable[[Picture, Picture | None], float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of results.

    Attributes:
        metrics: names of the metrics that could be had, in order.
        scores: for each picture by name, its scores in that order.
        missing: for each metric that could not be had, why.
    """

    metrics: list[str]
    scores: dict[str, list[float]]
    missing: dict[str, str]

    @property
    def means(self) -> list[float]:
        """Mean over the pictures of each metric."""
        return [float(np.mean(column)) for column in zip(*self.scores.values(), strict=True)]


def psnr(result: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB in dB; infinite for equal pictures."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(result, reference):
        return math.inf
    return float(peak_signal_noise_ratio(reference, result, data_range=255))


def ssim(result: Picture, reference: Picture) -> float:
    """Structural similarity of 8-bit RGB, mean over channels, with the published Gaussian window (sigma 1.5)."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            reference,
            result,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def available_metrics(names: Sequence[str], device: str) -> tuple[dict[str, Metric], dict[str, str]]:
    """Find the metrics that can be had here.

    Args:
        names: of metrics.
        device: for those that pyiqa computes.

    Returns:
        Functions of (result, reference) by name, and the reasons for those that are missing.

    Raises:
        SettingsError: a name that is none of the known ones.
        MissingPackageError: scikit-image is not installed, which PSNR and SSIM need.
    """
    unknown = [n for n in names if n not in FULL_REFERENCE + NO_REFERENCE]
    if unknown:
        raise SettingsError(
            f"Unknown metric(s) {', '.join(unknown)}; known are {', '.join(FULL_REFERENCE + NO_REFERENCE)}."
        )
    found: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name in ("psnr", "ssim"):
            try:
                import skimage.metrics  # noqa: F401
            except ImportError as error:
                raise MissingPackageError(f"{name} needs scikit-image; {install_extra('metrics')}.") from error
            own = psnr if name == "psnr" else ssim
            found[name] = lambda result, reference, own=own: own(result, _needed(reference))  # type: ignore[misc]
            continue
        try:
            found[name] = _pyiqa_metric(name, device)
        except MissingPackageError as error:
            missing[name] = str(error)
        # pyiqa fetches weights in many ways, each with errors of its own; any of them means that the metric cannot
        # be had.
        except Exception as error:
            missing[name] = f"its weights cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
    return found, missing


def _needed(reference: Picture | None) -> Picture:
    if reference is None:
        raise SettingsError("psnr, ssim and lpips compare with a reference; give --reference.")
    return reference


def _pyiqa_metric(name: str, device: str) -> Metric:
    try:
        import pyiqa
    except ImportError as error:
        raise MissingPackageError(f"pyiqa is not installed; {install_extra('metrics')}") from error
    import torch

    metric: Any = pyiqa.create_metric(name, device=device)

    def as_tensor(picture: Picture) -> Any:
        return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(device).float() / 255

    def score(result: Picture, reference: Picture | None) -> float:
        with torch.no_grad():
            if name in FULL_REFERENCE:
                return float(metric(as_tensor(result), as_tensor(_needed(reference))))
            return float(metric(as_tensor(result)))

    return score


def evaluate(results: Path, reference: Path | None, names: Sequence[str], device: str = "cpu") -> Evaluation:
    """Score every picture of a folder.

    Args:
        results: folder of pictures, or one picture.
        reference: folder of the references under the same names (any suffix), or one picture; None for metrics that
            need
            none.
        names: of metrics.
        device: for those that pyiqa computes.

    Raises:
        PictureError: a folder is empty, a reference is missing or has another size, or a picture cannot be read.
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
            raise PictureError(
                f"{result_file} has {result.shape[1]} x {result.shape[0]} pixels, its reference {reference_file} "
                f"{truth.shape[1]} x {truth.shape[0]}; expected the same size."
            )
        scores[name] = [metric(result, truth) for metric in metrics.values()]
    return Evaluation(list(metrics), scores, missing)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise PictureError(f"There is no file or folder {path}. Check the name.")
    files = {
        str(f.relative_to(path).with_suffix("")): f
        for f in sorted(path.rglob("*"))
        if f.suffix.lower() in READ_SUFFIXES
    }
    if not files:
        raise PictureError(f"The folder {path} has no pictures ({', '.join(READ_SUFFIXES)}).")
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
        raise PictureError(
            f"{len(lost)} of {len(found)} results have no reference in {reference}: {', '.join(lost[:5])}."
        )
    return {name: (file, truths[name]) for name, file in found.items()}


def _read(path: Path) -> Picture:
    return np.asarray((load_picture(path).colors.clamp(0, 1) * 255).round().byte().permute(1, 2, 0))


def table(evaluation: Evaluation) -> str:
    """The scores as a Markdown table with a row of means, and a line for each missing metric."""
    lines = ["| picture | " + " | ".join(evaluation.metrics) + " |", "|---" * (len(evaluation.metrics) + 1) + "|"]
    rows = [*evaluation.scores.items(), ("mean", evaluation.means)]
    lines += [f"| {name} | " + " | ".join(f"{score:.4f}" for score in scores) + " |" for name, scores in rows]
    lines += [f"missing: {name}: {reason}" for name, reason in evaluation.missing.items()]
    return "\n".join(lines) + "\n"


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """The scores as CSV with a row of means; missing metrics are columns of empty cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", *evaluation.metrics, *evaluation.missing])
        empty = [""] * len(evaluation.missing)
        for name, scores in [*evaluation.scores.items(), ("mean", evaluation.means)]:
            writer.writerow([name, *(f"{score:.6f}" for score in scores), *empty])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder of restored pictures, or one picture")
    parser.add_argument("--reference", type=Path, metavar="HQ", help="the originals under the same names")
    parser.add_argument(
        "--metrics",
        default=None,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(FULL_REFERENCE + NO_REFERENCE)} (all that the reference allows)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a CSV file too")
    parser.add_argument("--device", default="cpu", help="for the metrics with networks (cpu)")


def run(args: argparse.Namespace) -> int:
    """Write the table to standard output.

    Raises:
        FaithDiffError: bad arguments or pictures.
    """
    if args.metrics is None:
        names: Sequence[str] = NO_REFERENCE if args.reference is None else FULL_REFERENCE + NO_REFERENCE
    else:
        names = [n.strip() for n in args.metrics.split(",") if n.strip()]
    evaluation = evaluate(args.results, args.reference, names, args.device)
    sys.stdout.write(table(evaluation))
    if args.csv is not None:
        write_csv(evaluation, args.csv)
    return 0
