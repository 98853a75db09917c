"""Run a workflow on a running ComfyUI at every point of a grid of inputs, and lay the results out on one sheet.

python sweep_over_http.py photo.jpg -o swept --vary FaithDiffSampler.steps=10,20,30 --vary FaithDiffSampler.cfg=2,5,8

Needs this pack's folder, and a Python with torch, numpy and Pillow, such as ComfyUI's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from pathlib import Path

from comfy_client import ComfyServer, RunError, UnreachableError, Workflow, load_workflow, set_input

PACK = Path(__file__).resolve().parents[2]
sys.path.append(str(PACK))

from faithdiff_core.atomic import write_atomically  # noqa: E402
from faithdiff_core.errors import FaithDiffError  # noqa: E402
from faithdiff_core.evaluation.contact_sheet import SheetImage, contact_sheets  # noqa: E402
from faithdiff_core.evaluation.sweep import Axis, Point, file_stem, point_label, points  # noqa: E402

WORKFLOW = PACK / "workflows" / "api" / "faithdiff_2x.json"

DONE = "done.json"
"""In the output folder: of each result, the digest of the workflow and the image that it was made from."""


class Sweep:
    """The grid of a workflow's inputs, and the folder of its results."""

    def __init__(self, server: ComfyServer, workflow: Workflow, varied: dict[str, list[object]], output: Path) -> None:
        self.server, self.workflow, self.output = server, workflow, output
        self.keys = list(varied)
        self.axes = [Axis(key.rpartition(".")[2], tuple(values)) for key, values in varied.items()]
        done = output / DONE
        self.done: dict[str, str] = json.loads(done.read_text()) if done.exists() else {}

    def at(self, point: Point) -> Workflow:
        """The workflow with a point's values."""
        workflow = copy.deepcopy(self.workflow)
        for key, value in zip(self.keys, point, strict=True):
            set_input(workflow, key, value)
        return workflow

    def file(self, source: Path, point: Point) -> Path:
        """Where a result goes."""
        return self.output / "images" / source.stem / f"{file_stem(self.axes, point)}.png"

    def run(self, source: Path, point: Point) -> bool:
        """Make the result of an image at a point; False if it is there already."""
        workflow, file = self.at(point), self.file(source, point)
        content = json.dumps(workflow, sort_keys=True).encode() + source.read_bytes()
        name, digest = file.relative_to(self.output).as_posix(), hashlib.sha256(content).hexdigest()
        if self.done.get(name) == digest and file.exists():
            return False
        set_input(workflow, "LoadImage.image", self.server.upload(source))
        image, *_ = self.server.run(workflow)
        write_atomically(file, self.server.download(image))
        self.done[name] = digest
        write_atomically(self.output / DONE, json.dumps(self.done, indent=1).encode())
        return True

    def draw(self, sources: list[Path], cell: int) -> list[Path]:
        """Write the sheets of all results."""
        images = [
            SheetImage(source.stem, source, {point: self.file(source, point) for point in points(self.axes)})
            for source in sources
        ]
        files = []
        for number, sheet in enumerate(contact_sheets(self.axes, images, cell), 1):
            files.append(self.output / ("sheet.png" if number == 1 else f"sheet_{number}.png"))
            sheet.save(files[-1])
        return files


def split(text: str) -> tuple[str, list[object]]:
    """NODE.INPUT=A,B,C as the input and its values: JSON, or else texts."""
    key, _, values = text.partition("=")
    if "," not in values:
        raise RunError(f"--vary {text} has one value or none. Write NODE.INPUT=VALUE,VALUE,...")
    return key, [value(word.strip()) for word in values.split(",")]


def value(text: str) -> object:
    """A value from the command line: JSON, or else the text itself."""
    try:
        found: object = json.loads(text)
    except ValueError:
        return text
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if a run failed, or 130 after Ctrl-C; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(description="Sweep a workflow's inputs on a running ComfyUI.")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format; default: faithdiff_2x.json")
    parser.add_argument("--vary", action="append", required=True, metavar="NODE.INPUT=VALUE,VALUE,...")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="the same at all points")
    parser.add_argument("--cell", type=int, default=256, metavar="PX", help="side of the sheet's cells (256)")
    args = parser.parse_args(arguments)
    try:
        if len({image.stem for image in args.images}) < len(args.images):
            raise RunError("Two images have the same name; results are named after them.")
        workflow = load_workflow(args.workflow)
        for key, _, text in (item.partition("=") for item in args.set):
            set_input(workflow, key, value(text))
        sweep = Sweep(ComfyServer(args.server), workflow, dict(map(split, args.vary)), args.output)
        grid = points(sweep.axes)
        sweep.at(grid[0])
    except (RunError, OSError, ValueError) as error:
        parser.error(str(error))

    made = failed = 0
    total = len(args.images) * len(grid)
    try:
        for source in args.images:
            for point in grid:
                try:
                    made += sweep.run(source, point)
                except (RunError, OSError) as error:
                    failed += 1
                    sweep.file(source, point).unlink(missing_ok=True)  # of an earlier run with other inputs
                    print(f"failed: {source}, {point_label(sweep.axes, point)}: {error}", file=sys.stderr)
                    if isinstance(error, UnreachableError):
                        return 1  # the others would fail, too; run it again to continue
        print(f"{made} made, {total - made - failed} there before, {failed} failed")
        for file in sweep.draw(args.images, args.cell):
            print(file)
    except FaithDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
