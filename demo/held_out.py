"""The held-out photographs, degraded and restored: the table of docs/demo_model.md.

`python demo/held_out.py` writes the table to standard output, and the images to a folder if one is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from faithdiff_core.evaluation.metrics import psnr
from faithdiff_core.training.data import enlarge, open_image
from faithdiff_core.training.degradation import DegradationConfig, degrade, to_image, to_tensor
from faithdiff_core.training.yaml_config import build, read_yaml

HERE = Path(__file__).resolve().parent

HELD_OUT = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs of scikit-image that training never sees (demo/model.yaml)."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out photograph: the original, the low-quality one, and that one enlarged by Lanczos."""

    name: str
    original: Image.Image
    low: Image.Image
    lanczos: Image.Image

    def scores(self, result: Image.Image) -> tuple[float, float]:
        """PSNR in dB, and SSIM over RGB as scikit-image computes it, of a result."""
        from skimage.metrics import structural_similarity

        pixels, truth = np.asarray(result), np.asarray(self.original)
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        likeness = structural_similarity(truth, pixels, channel_axis=2, data_range=255, **window)
        return psnr(pixels, truth), float(likeness)


def held_out(names: tuple[str, ...] = HELD_OUT) -> Iterator[HeldOut]:
    """Read the photographs and degrade them as `degrade --config demo/degradation.yaml` does."""
    import skimage

    config = build(DegradationConfig, read_yaml(HERE / "degradation.yaml"))
    for name in names:
        image = open_image(Path(skimage.__file__).parent / "data" / name)
        width, height = (side // config.scale * config.scale for side in image.size)
        image = image.crop((0, 0, width, height))
        stem = Path(name).stem
        low = degrade(image, config, np.random.default_rng([0, *stem.encode()]))
        yield HeldOut(stem, image, low, enlarge(low, image.size))


def load_pipeline() -> Any:
    """The demo model in the engine."""
    from faithdiff_core.engine import FaithDiffPipeline

    model = HERE / "model"
    return FaithDiffPipeline.from_files(model, model / "faithdiff.safetensors", dtype="fp32")


def restore(pipeline: Any, low: Image.Image, **changes: Any) -> Image.Image:
    """Restore an image with the settings of demo/restore.yaml, or changed ones."""
    settings = read_yaml(HERE / "restore.yaml") | changes
    return to_image(pipeline(to_tensor(low)[None], **settings)[0])


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Score the demo model on the held-out photographs.")
    parser.add_argument("-o", "--output", type=Path, help="folder for the images: low quality | restored | original")
    args = parser.parse_args()
    pipeline = load_pipeline()
    rows = []
    sys.stdout.write(
        "| photograph | Lanczos PSNR | restored PSNR | Lanczos SSIM | restored SSIM |\n|---|---|---|---|---|\n"
    )
    for photograph in held_out():
        result = restore(pipeline, photograph.low)
        before, after = photograph.scores(photograph.lanczos), photograph.scores(result)
        rows.append((before[0], after[0], before[1], after[1]))
        sys.stdout.write(_row(photograph.name, rows[-1]))
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            three = [np.asarray(p) for p in (photograph.lanczos, result, photograph.original)]
            Image.fromarray(np.concatenate(three, axis=1)).save(args.output / f"{photograph.name}.jpg", quality=88)
    means = np.mean(rows, axis=0)
    sys.stdout.write(_row("mean", (means[0], means[1], means[2], means[3])))
    return 0


def _row(name: str, values: tuple[float, float, float, float]) -> str:
    return f"| {name} | {values[0]:.2f} | {values[1]:.2f} | {values[2]:.3f} | {values[3]:.3f} |\n"


if __name__ == "__main__":
    raise SystemExit(main())
