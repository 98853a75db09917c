"""The command `caption`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..captions.captioner import MAX_NEW_TOKENS
from ..captions.files import CAPTION_SUFFIX
from ..captions.tile_captions import TILES_SUFFIX
from ..captions.trim import CAPTION_PROMPT
from ..errors import FaithDiffError
from ..tiling.grid import check_overlap
from ..tiling.layout import PART_OVERLAP, grid_layout

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `caption`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, subfolders included")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a folder as transformers saves it, or a hub id (LLaVA, BLIP, ...)",
    )
    parser.add_argument("--allow-download", action="store_true", help="let transformers fetch a hub id")
    parser.add_argument("--prompt", default=CAPTION_PROMPT, metavar="TEXT", help=f"the question ({CAPTION_PROMPT})")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=f"longest answer ({MAX_NEW_TOKENS})"
    )
    parser.add_argument(
        "--tiles",
        type=_parts,
        metavar="PARTS",
        help="also write NAME.tiles.json, with a caption for each part of an image, for `restore --captions tiles`: "
        "COLUMNSxROWS, such as 3x2, or the side of a part in pixels, such as 1024",
    )
    parser.add_argument(
        "--tile-overlap",
        type=float,
        default=PART_OVERLAP,
        metavar="FRACTION",
        help=f"fraction of a part that it shares with its neighbour, so that objects on a border are seen whole "
        f"({PART_OVERLAP})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing captions (kept otherwise)")
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")


def run(args: argparse.Namespace) -> int:
    """Write NAME.txt with the captioner's whole answer beside each image; training trims it as the published code does.

    With `--tiles`, NAME.tiles.json holds the answers for the image's parts. Existing files are kept. An image that
    cannot be read is named, and the others go on.

    Returns:
        0, or 1 if an image could not be captioned.

    Raises:
        FaithDiffError: no images, or no such model.
    """
    from ..atomic import write_atomically
    from ..captions.captioner import load_captioner
    from ..captions.tile_captions import TileCaptions
    from ..images.reading import load_image
    from ..training.data import list_images

    check_overlap(args.tile_overlap)
    files = list_images(args.folder)
    todo = [(file, missing) for file in files if (missing := _missing(file, args.tiles, args.overwrite))]
    if not todo:
        sys.stdout.write(f"all {len(files)} images have captions\n")
        return 0
    captioner = load_captioner(args.model, allow_download=args.allow_download)
    captioner.model.to(args.device)

    def answer(colors: Tensor) -> str:
        return captioner.caption(colors, args.prompt, args.max_new_tokens)

    def write(file: Path, missing: Sequence[str]) -> None:
        image = load_image(file)
        for suffix in missing:
            if suffix == CAPTION_SUFFIX:
                content = f"{answer(image.colors)}\n".encode()
            else:
                layout = grid_layout(*image.size, **args.tiles, overlap=args.tile_overlap)
                answers = tuple(answer(crop) for crop in layout.crops(image.colors))
                content = TileCaptions(*image.size, layout, answers).to_json()
            target = file.with_name(file.stem + suffix)
            write_atomically(target, content)
            sys.stdout.write(f"{target}\n")

    return _each(todo, write)


def _parts(word: str) -> dict[str, int]:
    """COLUMNSxROWS or a side in pixels, as `grid_layout` takes them."""
    numbers = word.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"expected COLUMNSxROWS, such as 3x2, or a side in pixels, got {word}")
    if len(numbers) == 1:
        return {"tile_size": int(word)}
    return {"columns": int(numbers[0]), "rows": int(numbers[1])}


def _missing(file: Path, tiles: dict[str, int] | None, overwrite: bool) -> list[str]:
    """Endings of the files that are to be written beside an image."""
    captioned = any(file.with_suffix(suffix).is_file() for suffix in (CAPTION_SUFFIX, ".json"))
    missing = [] if captioned and not overwrite else [CAPTION_SUFFIX]
    if tiles is not None and (overwrite or not file.with_name(file.stem + TILES_SUFFIX).is_file()):
        missing.append(TILES_SUFFIX)
    return missing


def _each(files: list[tuple[Path, list[str]]], work: Callable[[Path, Sequence[str]], None]) -> int:
    failed = 0
    for file, missing in files:
        try:
            work(file, missing)
        except (FaithDiffError, OSError) as error:
            failed += 1
            sys.stderr.write(f"{file}: {error}\n")
    if failed:
        sys.stderr.write(f"error: {failed} of {len(files)} images could not be captioned.\n")
    return 1 if failed else 0
