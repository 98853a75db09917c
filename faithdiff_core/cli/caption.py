"""The command `caption`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..captions.captioner import MAX_NEW_TOKENS
from ..captions.trim import CAPTION_PROMPT
from ..errors import FaithDiffError


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
    parser.add_argument("--overwrite", action="store_true", help="replace existing captions (kept otherwise)")
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")


def run(args: argparse.Namespace) -> int:
    """Write NAME.txt with the captioner's whole answer beside each image; training trims it as the published code does.

    An image that cannot be read is named, and the others go on.

    Returns:
        0, or 1 if an image could not be captioned.

    Raises:
        FaithDiffError: no images, or no such model.
    """
    from ..atomic import write_atomically
    from ..captions.captioner import load_captioner
    from ..images.reading import load_image
    from ..training.data import list_images

    files = list_images(args.folder)
    todo = [file for file in files if args.overwrite or not _has_caption(file)]
    if not todo:
        sys.stdout.write(f"all {len(files)} images have captions\n")
        return 0
    captioner = load_captioner(args.model, allow_download=args.allow_download)
    captioner.model.to(args.device)

    def write(file: Path) -> None:
        caption = captioner.caption(load_image(file).colors, args.prompt, args.max_new_tokens)
        target = file.with_suffix(".txt")
        write_atomically(target, f"{caption}\n".encode())
        sys.stdout.write(f"{target}\n")

    return _each(todo, write)


def _has_caption(file: Path) -> bool:
    return file.with_suffix(".txt").is_file() or file.with_suffix(".json").is_file()


def _each(files: list[Path], work: Callable[[Path], None]) -> int:
    failed = 0
    for file in files:
        try:
            work(file)
        except (FaithDiffError, OSError) as error:
            failed += 1
            sys.stderr.write(f"{file}: {error}\n")
    if failed:
        sys.stderr.write(f"error: {failed} of {len(files)} images could not be captioned.\n")
    return 1 if failed else 0
