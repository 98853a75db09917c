"""Full-reference and no-reference metrics by name: PSNR and SSIM here, all others by pyiqa."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingPackageError, SettingsError, install_extra

FULL_REFERENCE = ("psnr", "ssim", "lpips")
"""Metrics that compare with a reference, measured where nothing else is asked for."""

NO_REFERENCE = ("musiq", "clipiqa+", "niqe", "maniqa", "paq2piq")
"""Metrics that look at the result alone, under pyiqa's names, measured where nothing else is asked for."""

OWN = {"psnr": "rgb", "psnry": "y", "ssim": "y", "ssimc": "rgb"}
"""Metrics that are computed here, with pyiqa's names and meanings, and the channels they look at."""

BLUR = "blur"
"""The perceptual blur of Crete et al. (2007): 0 is sharp, 1 is blurred. It needs no reference and no weights, so there
is one such metric wherever scikit-image is; noise counts as sharpness."""

PRESETS: dict[str, tuple[str, ...]] = {
    "faithdiff": (
        "psnr",
        "ssim",
        "lpips",
        "dists",
        "clipiqa+_vitL14_512",
        "paq2piq",
        "niqe",
        "musiq",
        "maniqa-pipal",
        "fid",
    )
}
"""Metrics by the name of a preset. `faithdiff` has those of the published evaluation, in its variants."""

_REFERENCED = ("lpips", "dists", "fid", "psnr", "psnry", "ssim", "ssimc", "ms_ssim", "fsim", "vif", "topiq_fr")
"""Metrics that are known to compare with a reference; for others pyiqa says it."""

_LOWER_IS_BETTER = ("lpips", "dists", "niqe", "fid")

Channel = Literal["rgb", "y"]

ImageArray = NDArray[np.uint8]


@dataclass(frozen=True)
class Metric:
    """A metric that can be had.

    Attributes:
        name: pyiqa's.
        referenced: whether it compares with a reference.
        lower_is_better: which way is up.
        score: of an image and its reference; None for a metric of whole folders.
        score_folders: of a folder and its reference; None for a metric of images.
    """

    name: str
    referenced: bool
    lower_is_better: bool
    score: Callable[[ImageArray, ImageArray | None], float] | None = None
    score_folders: Callable[[Path, Path], float] | None = None


def luma(image: ImageArray) -> NDArray[np.float64]:
    """The Y of YIQ, in 8-bit units and not rounded, (H, W)."""
    weighted: NDArray[np.float64] = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return weighted


def psnr(result: ImageArray, reference: ImageArray, channel: Channel = "rgb") -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB, over RGB or on Y; infinite for equal images."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(result, reference):
        return math.inf
    if channel == "y":
        return float(peak_signal_noise_ratio(luma(reference), luma(result), data_range=255))
    return float(peak_signal_noise_ratio(reference, result, data_range=255))


def ssim(result: ImageArray, reference: ImageArray, channel: Channel = "rgb") -> float:
    """Structural similarity (Wang et al. 2004): mean over the RGB channels, or on Y rounded to 8 bits.

    The window is Gaussian, 11 x 11, sigma 1.5, and stays within the image. Negative structure counts as 0, as in pyiqa.

    Raises:
        SettingsError: the images are smaller than the window.
    """
    from scipy.ndimage import gaussian_filter

    if min(result.shape[:2]) < 11:
        raise SettingsError(f"ssim needs images of at least 11 x 11 pixels, got {result.shape[1]} x {result.shape[0]}.")
    x, y = ((luma(i).round()[..., None] if channel == "y" else i.astype(np.float64)) for i in (result, reference))

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        inside: NDArray[np.float64] = gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]
        return inside

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    structure = (2 * (blurred(x * y) - mean_x * mean_y) + c2) / (variances + c2)
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((likeness * np.maximum(structure, 0)).mean())


def blur(result: ImageArray) -> float:
    """Perceptual blur of an 8-bit image, 0 (sharp) to 1, by scikit-image's `blur_effect`."""
    from skimage.measure import blur_effect

    return float(blur_effect(result, channel_axis=-1))


def needs_reference(name: str) -> bool:
    """Whether a metric is known to compare with a reference."""
    return name in _REFERENCED


def metric_names(names: Sequence[str], channel: Channel | None) -> list[str]:
    """Metric names with a choice of channel for PSNR and SSIM.

    Args:
        names: as given.
        channel: rgb or y for both; None for the published ones (PSNR over RGB, SSIM on Y).
    """
    if channel is None:
        return list(dict.fromkeys(names))
    chosen = {"psnr": "psnry", "ssim": "ssim"} if channel == "y" else {"psnr": "psnr", "ssim": "ssimc"}
    return list(dict.fromkeys(chosen.get(name, name) for name in names))


def available_metrics(names: Sequence[str], device: str) -> tuple[dict[str, Metric], dict[str, str]]:
    """Find the metrics that are available here.

    Args:
        names: of metrics: those of this module, or any of pyiqa's.
        device: for those that pyiqa computes.

    Returns:
        Metrics by name, and the reasons for those that are missing.

    Raises:
        SettingsError: a name that none of the known ones is, nor one of pyiqa's.
        MissingPackageError: scikit-image is not installed, which PSNR and SSIM need.
    """
    found: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    known = _known_names()
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SettingsError(f"Unknown metric(s) {', '.join(unknown)}; known are {', '.join(known)}.")
    for name in names:
        if name in OWN or name == BLUR:
            found[name] = _own_metric(name)
            continue
        try:
            found[name] = _pyiqa_metric(name, device)
        except MissingPackageError as error:
            missing[name] = str(error)
        # pyiqa fetches weights in many ways, each with different errors; any of them means that the metric cannot
        # be had.
        except Exception as error:
            missing[name] = _reason(error)
    return found, missing


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        needs = "setuptools<81, which has pkg_resources" if error.name == "pkg_resources" else error.name
        return f"it needs the package {needs}, which is not installed; {install_extra('metrics')}"
    first = str(error).splitlines()[0][:160] if str(error) else ""
    return f"its weights cannot be loaded ({type(error).__name__}: {first})"


def _known_names() -> list[str]:
    """Names of the metrics: with pyiqa all of its own, else those that this project knows."""
    known = dict.fromkeys((*OWN, BLUR, *FULL_REFERENCE, *NO_REFERENCE, *PRESETS["faithdiff"]))
    try:
        import pyiqa
    except ImportError:
        return list(known)
    return list(known | dict.fromkeys(getattr(pyiqa, "list_models", list)()))


def _own_metric(name: str) -> Metric:
    try:
        import skimage.metrics  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"{name} needs scikit-image; {install_extra('metrics')}.") from error
    if name == BLUR:
        return Metric(name, False, True, lambda result, _: blur(result))
    measure = psnr if name.startswith("psnr") else ssim
    channel: Channel = "y" if OWN[name] == "y" else "rgb"
    return Metric(name, True, False, lambda result, reference: measure(result, _needed(reference), channel))


def _needed(reference: ImageArray | None) -> ImageArray:
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
    referenced = needs_reference(name) or getattr(metric, "metric_mode", "NR") == "FR"
    lower = bool(getattr(metric, "lower_better", name in _LOWER_IS_BETTER))
    if name.endswith("fid"):
        return Metric(name, True, lower, score_folders=lambda one, two: float(metric(str(one), str(two))))

    def as_tensor(image: ImageArray) -> Any:
        return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device).float() / 255

    def score(result: ImageArray, reference: ImageArray | None) -> float:
        with torch.no_grad():
            if referenced:
                return float(metric(as_tensor(result), as_tensor(_needed(reference))))
            return float(metric(as_tensor(result)))

    return Metric(name, referenced, lower, score)


def lower_is_better(metrics: Mapping[str, Metric]) -> dict[str, bool]:
    """For each metric, whether a lower score is the better one."""
    return {name: metric.lower_is_better for name, metric in metrics.items()}
