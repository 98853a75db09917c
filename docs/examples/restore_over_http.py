"""Restore an image, or all images of a folder, on a running ComfyUI over HTTP. Needs Python, nothing else.

python restore_over_http.py photo.jpg -o restored.png --prompt "a harbour at dawn" --seed 7
python restore_over_http.py images -o restored --captions
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from comfy_client import ComfyServer, RunError, UnreachableError, Workflow, load_workflow, set_input

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "faithdiff_2x.json"
POSITIVE = "Positive: what is in the image"
"""Title of the node with the prompt, in all workflows of this pack."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Names by which images are found in a folder."""


def restore(server: ComfyServer, workflow: Workflow, source: Path, target: Path, prompt: str | None) -> None:
    """Restore one image; if several are saved, the others are numbered."""
    workflow = copy.deepcopy(workflow)
    if prompt is not None:
        set_input(workflow, f"{POSITIVE}.text", prompt)
    set_input(workflow, "LoadImage.image", server.upload(source))
    contents = [server.download(image) for image in server.run(workflow)]
    target.parent.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents, 1):
        file = target if number == 1 else target.with_stem(f"{target.stem}_{number}")
        part = file.with_suffix(".part")  # a stopped run leaves no half image that looks done
        part.write_bytes(content)
        part.replace(file)


def find_jobs(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Images and where their results go. `output` is a folder if `source` is one, else a file."""
    if source.resolve() == output.resolve():
        raise RunError(f"{output} is the input. Choose another file or folder for the results.")
    if not source.is_dir():
        if output.suffix.lower() != ".png":
            raise RunError(f"Results are PNG files: {output} does not end in .png.")
        return [(source, output)]
    # macOS puts a file ._a.jpg, which is no image, beside a.jpg on foreign disks.
    images = sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not images:
        raise RunError(f"There is no image in {source}: none ends in {', '.join(SUFFIXES)}.")
    stems = Counter(file.stem for file in images)  # a.jpg and a.png would both become a.png; they keep their endings
    return [(file, output / f"{file.stem if stems[file.stem] == 1 else file.name}.png") for file in images]


def prepare(args: argparse.Namespace) -> Workflow:
    """The workflow with all that the command line sets for every image."""
    workflow = load_workflow(args.workflow)
    for key, separator, text in (item.partition("=") for item in args.set):
        if not separator:
            raise RunError(f"--set {key} has no value. Write NODE.INPUT=VALUE.")
        set_input(workflow, key, value(text))
    if args.seed is not None:
        set_input(workflow, "FaithDiffSampler.seed", args.seed)
    if args.prompt is not None:
        set_input(workflow, f"{POSITIVE}.text", args.prompt)
    return workflow


def caption(source: Path) -> str | None:
    """The text of NAME.txt beside an image."""
    beside = source.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.exists() else None


def value(text: str) -> Any:
    """A value from the command line: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if an image failed, or 130 after Ctrl-C; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(description="Restore images on a running ComfyUI.")
    parser.add_argument("input", type=Path, help="an image or a folder of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a PNG file, or a folder if the input is one")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format; default: faithdiff_2x.json")
    parser.add_argument("--prompt", help="what is in the image")
    parser.add_argument("--captions", action="store_true", help="take the prompt from NAME.txt beside an image")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="a node by title or class"
    )
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing outputs")
    args = parser.parse_args(arguments)
    try:
        jobs, workflow = find_jobs(args.input, args.output), prepare(args)
    except (RunError, OSError, ValueError) as error:
        parser.error(str(error))

    server = ComfyServer(args.server)
    todo = [job for job in jobs if args.overwrite or not job[1].exists()]
    failures: list[str] = []
    restored = 0
    try:
        for source, target in todo:
            try:
                restore(server, workflow, source, target, caption(source) if args.captions else None)
            except (RunError, OSError, ValueError) as error:
                failures.append(f"failed: {source}: {error}")
                if isinstance(error, UnreachableError):
                    break  # the others would fail, too; run it again to continue
            else:
                restored += 1
                print(f"{source} -> {target}", flush=True)
    except KeyboardInterrupt:
        return 130
    left = len(todo) - restored - len(failures)
    counts = f"{restored} restored, {len(jobs) - len(todo)} skipped (done before), {len(failures)} failed"
    print(counts + (f", {left} not tried" if left else ""), flush=True)
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
