"""The command `restore`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..archive.storage import as_address, is_url
from ..attribution.words import split_words
from ..captions.tile_texts import TILE_MIX
from ..cli import EXIT_CANCELLED, EXIT_FAILED
from ..engine.description import add_option, described, option
from ..engine.restoration import ModelFiles, Progress, Restoration, attribution_file
from ..engine.schedulers import SCHEDULERS
from ..engine.settings import RestoreSettings
from ..errors import SettingsError
from ..images.batch import Job, Report, find_jobs, left_out, possible
from ..images.formats import WRITE_SUFFIXES, left_out_note
from ..images.masks import find_masks
from ..images.region import FEATHER
from ..images.sizes import check_positive
from .jobs import attempt

_EXAMPLES = """
examples:
  one image, twice as large
    python -m faithdiff_core restore photo.jpg -o new.png --model RealVisXL_V4.0.safetensors --faithdiff FaithDiff.bin
  a folder; run it again to continue where it stopped
    python -m faithdiff_core restore scans/ -o restored/ --model realvis/ --faithdiff FaithDiff.bin
  an archive, with a manifest and two GPUs of this machine
    python -m faithdiff_core restore s3://scans/1912 -o s3://restored/1912 --workers 2 --model realvis/ --faithdiff ...
  scratches or faces only: what is white in the mask
    python -m faithdiff_core restore photo.png -o new.png --scale 1 --mask scratches.png --model ... --faithdiff ...
  four times as large, in two passes of two
    python -m faithdiff_core restore face.png -o face_4x.png --scale 4 --passes 2 --model ... --faithdiff ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `restore`."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="images, folders (with what is below them), patterns, URLs of these"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=_path_or_url,
        required=True,
        metavar="OUT",
        help=f"a folder or its URL; for a single image also a file ({', '.join(WRITE_SUFFIXES)})",
    )
    parser.add_argument(
        "--format", choices=("png", "jpg", "webp", "tif"), default="png", help="file format in a folder (png)"
    )
    add_metadata_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing outputs")
    parser.add_argument("--quiet", action="store_true", help="no progress, only failures")
    add_model_options(parser)
    add_worker_options(parser)
    add_size_options(parser)
    text = add_text_options(parser)
    text.add_argument(
        "--attribute",
        default="",
        metavar="WORDS",
        help="words of the prompt, with commas: NAME.attribution.png shows where in the image each of them acts",
    )
    add_mask_options(parser, _path_or_url)
    method = parser.add_argument_group("method")
    tiles = parser.add_argument_group("tiles")
    for name, what in described(RestoreSettings).items():
        if what.group in ("method", "tiles"):
            add_option(method if what.group == "method" else tiles, RestoreSettings, name)
    method.add_argument("--seed", type=int, default=0, metavar="N", help="noise, the same for every image (0)")
    add_scheduler_option(method)


def add_metadata_options(parser: argparse.ArgumentParser) -> None:
    """What results keep of the images' metadata."""
    parser.add_argument(
        "--strip-metadata", action="store_true", help="do not keep the images' EXIF, XMP and resolution (profiles stay)"
    )
    parser.add_argument("--strip-location", action="store_true", help="do not keep where a photograph was taken")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `ModelFiles`, but for the scheduler."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=Path,
        required=True,
        help="checkpoint file (SDXL for the published weights), or a folder in diffusers' format",
    )
    model.add_argument(
        "--faithdiff",
        type=Path,
        required=True,
        metavar="FILE",
        help="FaithDiff.bin, or an adapter, with or without a LoRA",
    )
    model.add_argument("--unet", type=Path, metavar="FILE", help="FaithDiff's U-Net, where --faithdiff is an adapter")
    model.add_argument(
        "--config", type=Path, metavar="DIR", help="folder with tokenizers and configurations for a checkpoint file"
    )
    model.add_argument("--vae", type=Path, metavar="FILE", help="another VAE; in fp16 take the fp16-fix VAE")
    model.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA, more than one if repeated",
    )
    model.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="precision (auto)")
    model.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device to run on (auto)"
    )
    model.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="offload idle models to CPU memory: whole models, or layer by layer (none)",
    )


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Where images are restored: in this process, in several, or on a cluster."""
    archive = parser.add_argument_group("archives", "docs/scaling.md explains these")
    archive.add_argument(
        "--workers",
        type=worker_count,
        metavar="N",
        help="keep a manifest, and restore in N processes of this machine (1: in this one), or, with ray or "
        "ray:ADDRESS, on the cluster that Ray runs",
    )
    archive.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="GPUS",
        help="GPUs of a worker, such as 1 or 0.5 (1 where there are GPUs, else 0)",
    )


def add_size_options(parser: argparse.ArgumentParser, **changes: Any) -> None:
    """The size of results; `changes` replace argparse's arguments of `--scale`."""
    size = parser.add_argument_group("size").add_mutually_exclusive_group()
    add_option(size, RestoreSettings, "scale", **{"default": None, **changes})
    size.add_argument("--longest-side", type=int, metavar="PX", help="length of the longer side")
    size.add_argument("--megapixels", type=float, metavar="MP", help="area of the result in millions of pixels")


def add_text_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Prompts and captions."""
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", default="", help="what the images show; optional, but helps")
    text.add_argument(
        "--negative-prompt", default="", metavar="PROMPT", help="what they do not show (empty, as published)"
    )
    text.add_argument(
        "--captions",
        nargs="?",
        const="image",
        choices=("image", "tiles"),
        help="take the prompt from NAME.txt beside each image; --prompt where there is none. With `tiles`, also take "
        "captions of the image's parts from NAME.tiles.json, as `caption --tiles` writes it: each tile of the sampler "
        "gets those of the parts that it overlaps",
    )
    text.add_argument(
        "--tile-mix",
        type=float,
        metavar="SHARE",
        help=f"share of the parts' captions in a tile, 0 to 1; the rest is the whole image's ({TILE_MIX})",
    )
    text.add_argument(
        "--trim-captions", action="store_true", help="trim these captions as the published code does with LLaVA's"
    )
    return text


def add_mask_options(parser: argparse.ArgumentParser, kind: Callable[[str], Path | str] = Path) -> None:
    """Which part of each image is restored; `kind` makes what `--mask` gives."""
    part = parser.add_argument_group("part of an image")
    part.add_argument(
        "--mask",
        type=kind,
        metavar="FILE",
        help="an image of the same shape, white where the image is restored; the rest stays as it is. For several "
        "images, a folder with masks of the same names",
    )
    part.add_argument(
        "--feather", type=int, default=FEATHER, metavar="PX", help=f"width of the mask's soft edge ({FEATHER})"
    )


def add_scheduler_option(group: argparse._ArgumentGroup) -> None:
    """The scheduler, by name."""
    group.add_argument(
        "--scheduler",
        default="euler",
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}, or the name of any scheduler class of diffusers (euler)",
    )


def run(args: argparse.Namespace) -> int:
    """Restore images; one that fails does not stop the others.

    Returns:
        0, or 1 if an image failed.

    Raises:
        FaithDiffError: bad arguments, or a model that cannot be loaded.
    """
    restoration = replace(read_restoration(args), attribute=_words(args.attribute))
    if args.attribute and restoration.tile_captions and restoration.tile_mix:
        raise SettingsError(
            "--attribute shows words of one prompt, but with --captions tiles each tile gets another text. Leave one "
            "out, or take --tile-mix 0."
        )
    if args.workers is not None or any(is_url(str(word)) for word in (*args.inputs, args.output, args.mask)):
        return _run_archive(args, restoration)
    if args.gpus_per_worker is not None:
        raise SettingsError("--gpus-per-worker needs --workers.")
    jobs = find_jobs(args.inputs, args.output, "." + args.format)
    masks = {} if args.mask is None else find_masks([job.source for job in jobs], args.mask)
    todo = [job for job in jobs if args.overwrite or not _done(job, restoration)]
    report = Report(skipped=len(jobs) - len(todo))
    todo = possible(todo, report)
    if note := left_out_note(left_out(args.inputs, args.output)):
        sys.stderr.write(note + "\n")
    code = 0
    if todo:
        pipeline = restoration.files.load()

        def work(job: Job, progress: Progress) -> Sequence[str]:
            return restoration.restore(pipeline, job.source, job.target, progress, mask=masks.get(job.source))

        try:
            for number, job in enumerate(todo, start=1):
                attempt(job, work, report, f"[{number}/{len(todo)}] {job.source.name}", args.quiet)
        except KeyboardInterrupt:
            code = EXIT_CANCELLED
    return _ended(report, code, args.quiet)


def _run_archive(args: argparse.Namespace, restoration: Restoration) -> int:
    from ..archive.restoring import RestoreTask
    from ..archive.run import Archive

    task = RestoreTask(restoration)
    out = as_address(str(args.output))
    masks = "" if args.mask is None else as_address(str(args.mask))
    archive = Archive(args.inputs, out, "." + args.format, task, masks, args.overwrite, args.quiet)
    if args.workers in (None, 1):
        if args.gpus_per_worker is not None:
            raise SettingsError("--gpus-per-worker needs several workers: one works in this process.")
        outcome = archive.run()
    else:
        from ..archive.cluster import Cluster

        with Cluster(args.workers, args.gpus_per_worker, task, out, args.overwrite) as cluster:
            outcome = archive.run(cluster.reports)
    report = Report(outcome.done, outcome.skipped, [*outcome.failures])
    return _ended(report, EXIT_CANCELLED if outcome.stopped else 0, args.quiet)


def _ended(report: Report, code: int, quiet: bool) -> int:
    """Write the last lines; the exit code."""
    stream = sys.stderr if report.failures else sys.stdout
    if report.failures or not quiet:
        stream.write("\n".join(report.lines()) + "\n")
    return code or (EXIT_FAILED if report.failures else 0)


def worker_count(word: str) -> int | str:
    """What follows `--workers`: a number, `ray`, or `ray:ADDRESS`."""
    if word == "ray" or word.startswith("ray:"):
        return word
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, ray or ray:ADDRESS, got {word}")
    return number


def _done(job: Job, restoration: Restoration) -> bool:
    """Whether all that an image becomes is there."""
    files = [job.target, *([attribution_file(job.target)] if restoration.attribute else ())]
    return all(map(os.path.exists, files))


def read_settings(args: argparse.Namespace) -> RestoreSettings:
    """The settings, checked before a model is loaded; the size is each image's own.

    Raises:
        SettingsError: a value is out of range.
    """
    if args.seed < 0:
        raise SettingsError(f"--seed must be 0 or more, got {args.seed}.")
    if args.seed >= 2**64:
        raise SettingsError(f"--seed must be below 2^64, got {args.seed}.")
    if args.tile_mix is not None and args.captions != "tiles":
        raise SettingsError("--tile-mix needs --captions tiles.")
    if args.tile_mix is not None and not 0 <= args.tile_mix <= 1:
        raise SettingsError(f"--tile-mix must lie between 0 and 1, got {args.tile_mix}.")
    if args.trim_captions and not args.captions:
        raise SettingsError("--trim-captions needs --captions: prompts that are typed are never trimmed.")
    for name in ("scale", "longest_side", "megapixels"):
        if (value := getattr(args, name)) is not None:
            check_positive(value, what=option(name))
    values = {name: getattr(args, name) for name in RestoreSettings().method()}
    for name, value in values.items():
        described(RestoreSettings)[name].check(value, what=option(name))
    return RestoreSettings(**values)


def read_restoration(args: argparse.Namespace) -> Restoration:
    """What the command line asks to be done to every image.

    Raises:
        SettingsError: a value is out of range.
    """
    if args.feather < 0:
        raise SettingsError(f"--feather must be 0 or more, got {args.feather}.")
    names = ("model", "faithdiff", "unet", "config", "vae", "dtype", "device", "offload", "scheduler")
    return Restoration(
        files=ModelFiles(**{name: getattr(args, name) for name in names}, loras=tuple(args.lora)),
        settings=read_settings(args),
        size=_size_arguments(args),
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        captions=args.captions is not None,
        tile_captions=args.captions == "tiles",
        tile_mix=TILE_MIX if args.tile_mix is None else args.tile_mix,
        trim_captions=args.trim_captions,
        seed=args.seed,
        metadata=not args.strip_metadata,
        location=not args.strip_location,
        feather=args.feather,
    )


def _size_arguments(args: argparse.Namespace) -> dict[str, Any]:
    if args.longest_side is not None or args.megapixels is not None:
        return {"longest_side": args.longest_side, "megapixels": args.megapixels}
    return {"scale": RestoreSettings().scale if args.scale is None else args.scale}


def _path_or_url(word: str) -> Path | str:
    """A file or folder: a URL would lose a slash as a path."""
    return word if is_url(word) else Path(word)


def _words(text: str) -> tuple[str, ...]:
    return tuple(split_words(text)) if text else ()


def _lora(word: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT; a colon of a Windows drive is no weight."""
    name, colon, weight = word.rpartition(":")
    if colon:
        try:
            return Path(name), float(weight)
        except ValueError:
            pass
    return Path(word), 1.0
