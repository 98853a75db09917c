"""Degrade a photograph and restore it with the demo model: `python demo/run.py`, or `make demo`.

The photograph comes with scikit-image and was held out when the model was trained. The restoration goes through the
same command that restores anything else, `python -m faithdiff_core restore`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from held_out import HELD_OUT, held_out  # noqa: E402

from faithdiff_core.cli import main as faithdiff  # noqa: E402
from faithdiff_core.training.yaml_config import read_yaml  # noqa: E402

MODEL = HERE / "model"
"""The demo model: an SDXL model as a diffusers folder, with FaithDiff's file inside."""

FAITHDIFF = "faithdiff.safetensors"
"""FaithDiff's file in the model's folder."""

WHAT_IT_SHOWS = """
What this shows: the whole path from a degraded photograph to a restored one: FaithDiff's architecture, its schedule,
its tiles, and the command that works on real models in the same way. The photograph was not among the training ones.
What it cannot show: how well FaithDiff restores. The demo model is about a thousand times smaller than SDXL, has seen a
few dozen images, and knows one kind of damage: strong noise at half the size. docs/demo_model.md has the figures.
For results like the paper's, take an SDXL checkpoint and FaithDiff.bin; the README says how.
"""


def side_by_side(images: dict[str, Image.Image]) -> Image.Image:
    """Images of one size in a row, with their captions below."""
    gap, caption = 8, 20
    width, height = next(iter(images.values())).size
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, height + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(images.items()):
        sheet.paste(image, (i * (width + gap), 0))
        draw.text((i * (width + gap) + 4, height + 4), name, fill="black")
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code is the command line's."""
    parser = argparse.ArgumentParser(description="Degrade a photograph and restore it with the demo model.")
    names = {Path(name).stem: name for name in HELD_OUT}
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder with faithdiff.safetensors in it")
    parser.add_argument("--photograph", choices=sorted(names), default="coffee")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the images")
    args = parser.parse_args(arguments)
    if not (args.model / FAITHDIFF).is_file():
        sys.stderr.write(f"There is no demo model in {args.model}: {FAITHDIFF} is missing. See demo/make_model.py.\n")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    paths = {name: args.output / f"{name}.png" for name in ("original", "degraded", "restored", "side_by_side")}
    (photograph,) = held_out((names[args.photograph],))
    photograph.original.save(paths["original"])
    photograph.low.save(paths["degraded"])
    began = time.monotonic()
    command = ["restore", str(paths["degraded"]), "--output", str(paths["restored"]), "--overwrite"]
    command += ["--model", str(args.model), "--faithdiff", str(args.model / FAITHDIFF), "--device", "cpu"]
    for name, value in read_yaml(HERE / "restore.yaml").items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    print("python -m faithdiff_core", *command)
    code = faithdiff(command)
    seconds = time.monotonic() - began
    if code:
        return code
    with Image.open(paths["restored"]) as opened:
        restored = opened.convert("RGB")
    shown = {"degraded, enlarged": photograph.lanczos, "restored": restored, "original": photograph.original}
    side_by_side(shown).save(paths["side_by_side"])
    (psnr_before, ssim_before), (psnr_after, ssim_after) = map(photograph.scores, (photograph.lanczos, restored))
    print(f"\nRestored in {seconds:.0f} s, loading included. Compare the three in {paths['side_by_side']}.")
    print(f"Enlarged by Lanczos: {psnr_before:.1f} dB, SSIM {ssim_before:.2f}.")
    print(f"Restored:            {psnr_after:.1f} dB, SSIM {ssim_after:.2f}.")
    print(WHAT_IT_SHOWS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
