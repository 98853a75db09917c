"""Full-reference and no-reference metrics by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingPackageError, SettingsError, install_extra

FULL_REFERENCE = ("psnr", "ssim", "lpips")
"""Metrics that compare with a reference."""

NO_REFERENCE = ("musiq", "clipiqa+", "niqe", "maniqa", "paq2piq")
"""The paper's metrics that look at the result alone, under pyiqa's names."""

ImageArray = NDArray[np.uint8]

Metric = Callable[[ImageArray, ImageArray | None], float]


def psnr(result: ImageArray, reference: ImageArray) -> float:
    """Peak signal-to-noise ratio of 8-bit RGB in dB; infinite for equal images."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(result, reference):
        return math.inf
    return float(peak_signal_noise_ratio(reference, result, data_range=255))


def ssim(result: ImageArray, reference: ImageArray) -> float:
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

    def as_tensor(image: ImageArray) -> Any:
        return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device).float() / 255

    def score(result: ImageArray, reference: ImageArray | None) -> float:
        with torch.no_grad():
            if name in FULL_REFERENCE:
                return float(metric(as_tensor(result), as_tensor(_needed(reference))))
            return float(metric(as_tensor(result)))

    return score
