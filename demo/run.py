"""Degrade a photograph and restore it with the demo model: `python demo/run.py`, or `make demo`.

The photograph comes with scikit-image and was held out when the model was trained. The restoration goes through the
same command that restores anything else, `python -m faithdiff_core restore`.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from faithdiff_core.cli import main as faithdiff  # noqa: E402

MODEL = HERE / "model"
"""The demo model: an SDXL model as a diffusers folder, with FaithDiff's file inside."""

FAITHDIFF = "faithdiff.safetensors"
"""FaithDiff's file in the model's folder."""

SIDE = 256
"""Side of the crop that is taken from the photograph, and of the restored picture, in pixels."""

SCALE = 2
"""How much smaller the degraded picture is."""

TILE = 128
"""Side of the sampler's tiles: the size that the demo model was trained at."""

UNLIKE = 18.0
"""Peak signal-to-noise ratio in dB below which a result has little to do with the photograph."""

CROPS = {"astronaut": (80, 0, 336, 256), "chelsea": (100, 20, 356, 276), "coffee": (180, 60, 436, 316)}
"""Photographs of scikit-image, and the part of each that is shown: left, top, right, bottom in pixels."""

WHAT_IT_SHOWS = """
What this shows: the whole path from a damaged photograph to a restored one: FaithDiff's architecture, its schedule,
its tiles, and the command that works on real models in the same way.
What it cannot show: how well FaithDiff restores. The demo model is about a thousand times smaller than SDXL and has
seen a few dozen pictures. For results like the paper's, take an SDXL checkpoint and FaithDiff.bin; the README says how.
"""


def photograph(name: str) -> Image.Image:
    """The part of a photograph out of scikit-image's package that is shown; nothing is downloaded.

    Raises:
        FileNotFoundError: the installed scikit-image does not bring it along.
    """
    import skimage

    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; install scikit-image (`pip install scikit-image`).")
    with Image.open(path) as opened:
        return opened.convert("RGB").crop(CROPS[name]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def degrade(picture: Image.Image) -> Image.Image:
    """Blur, reduce, and save as a poor JPEG: what happens to photographs that are passed around."""
    small = picture.filter(ImageFilter.GaussianBlur(1.2)).resize((SIDE // SCALE,) * 2, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=40)
    with Image.open(stream) as opened:
        return opened.convert("RGB")


def likeness(picture: Image.Image, original: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; more is closer to the original."""
    error = np.asarray(picture, dtype=np.float64) - np.asarray(original, dtype=np.float64)
    return float(10 * np.log10(255**2 / max(float((error**2).mean()), 1e-10)))


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures of one size in a row, with their captions below."""
    gap, caption = 8, 20
    sheet = Image.new("RGB", (len(pictures) * (SIDE + gap) - gap, SIDE + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(pictures.items()):
        sheet.paste(picture, (i * (SIDE + gap), 0))
        draw.text((i * (SIDE + gap) + 4, SIDE + 4), name, fill="black")
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code is the command line's."""
    parser = argparse.ArgumentParser(description="Degrade a photograph and restore it with the demo model.")
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder with faithdiff.safetensors in it")
    parser.add_argument("--photograph", choices=sorted(CROPS), default="chelsea")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    args = parser.parse_args(arguments)
    if not (args.model / FAITHDIFF).is_file():
        sys.stderr.write(f"There is no demo model in {args.model}: {FAITHDIFF} is missing. See demo/make_model.py.\n")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    paths = {name: args.output / f"{name}.png" for name in ("original", "degraded", "restored", "side_by_side")}
    original = photograph(args.photograph)
    degraded = degrade(original)
    original.save(paths["original"])
    degraded.save(paths["degraded"])
    began = time.monotonic()
    command = ["restore", str(paths["degraded"]), "--output", str(paths["restored"]), "--overwrite"]
    command += ["--model", str(args.model), "--faithdiff", str(args.model / FAITHDIFF), "--device", "cpu"]
    command += [
        "--scale",
        str(SCALE),
        "--steps",
        str(args.steps),
        "--tile",
        str(TILE),
        "--tile-batch",
        "3",
        "--seed",
        "1",
    ]
    command += ["--prompt", "A photograph."]
    print("python -m faithdiff_core", *command)
    code = faithdiff(command)
    seconds = time.monotonic() - began
    if code:
        return code
    with Image.open(paths["restored"]) as opened:
        restored = opened.convert("RGB")
    enlarged = degraded.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    side_by_side({"degraded, enlarged": enlarged, "restored": restored, "original": original}).save(
        paths["side_by_side"]
    )
    before, after = likeness(enlarged, original), likeness(restored, original)
    print(f"\nRestored in {seconds:.0f} s, loading included. Compare the three in {paths['side_by_side']}.")
    print(f"Likeness to the original: {before:.1f} dB enlarged with bicubic interpolation, {after:.1f} dB restored.")
    if after < UNLIKE:
        print("The restored picture is not like the photograph: the model in use has not been trained to restore.")
    print(WHAT_IT_SHOWS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
