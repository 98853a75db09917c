"""Image files on ComfyUI's server: a folder against the command line, and what files say about themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from comfy_host import REPO, Graph, GraphError, Page, PromptRejectedError, Server
from PIL import Image
from support.photographs import LATITUDE, linear_profile, photograph, wide_photograph, wide_profile

from faithdiff_core.cli import main
from faithdiff_core.images.reading import LoadedImage, decode_image, load_image

DEMO = REPO / "demo" / "model"
SEED, STEPS, PROMPT = 3, 2, "A photograph of a bridge."
TOLERANCE = 2 / 255
"""Between ComfyUI's samplers and the engine's, as for the demo workflow."""


def pixels(height: int, width: int, channels: int, bits: int = 8) -> np.ndarray:
    """A smooth pattern with all levels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + c)) + np.cos(y / (4 + c)) for c in range(channels)]
    values = (np.stack(waves, -1) + 2) / 4 * (2**bits - 1)
    return values.round().astype(np.uint8 if bits == 8 else np.uint16)


def write_folder(folder: Path) -> None:
    """What people put into one folder."""
    (folder / "sub").mkdir(parents=True)
    (folder / "1 phone.jpg").write_bytes(photograph("JPEG", pixels(24, 40, 3)))
    (folder / "2 scan.tif").write_bytes(photograph("TIFF", pixels(32, 24, 3), icc_profile=linear_profile()))
    (folder / "3 broken.jpg").write_bytes((folder / "1 phone.jpg").read_bytes()[:-300])
    Image.fromarray(pixels(24, 32, 1, 16)[..., 0]).save(folder / "4 grey.png")
    cut = pixels(24, 24, 4)
    cut[:12, :, 3], cut[12:, :, 3], cut[:12, :, :3] = 0, 255, 0  # black below what is transparent
    Image.fromarray(cut).save(folder / "5 cut.png")
    Image.fromarray(cut[..., :3]).save(folder / "Name.png")
    Image.fromarray(cut[::-1, :, :3]).save(folder / "name.png")
    (folder / "sub" / "deep.png").write_bytes(wide_photograph(pixels(24, 24, 3, 16)))
    (folder / "sub" / "deep.txt").write_text("A drawing of waves.", encoding="utf-8")


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """Words of the command line that restores a folder with the demo model."""
    words = ["restore", str(folder), "-o", str(out), "--model", str(DEMO), "--captions", "--quiet", *more]
    words += ["--faithdiff", str(DEMO / "faithdiff.safetensors"), "--device", "cpu", "--dtype", "fp32"]
    return [*words, "--prompt", PROMPT, "--seed", str(SEED), "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def inputs(server: Server) -> Path:
    """The server's input folder, with a folder of images in it."""
    write_folder(server.base / "input" / "field")
    return server.base / "input"


@pytest.fixture(scope="module")
def command_line(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line makes of the same folder."""
    out = tmp_path_factory.mktemp("command_line")
    assert main(command(inputs / "field", out)) == 1, "one is broken"
    return out


def folder_graph(folder: str, output: str, **changes: Any) -> Graph:
    """The workflow for a folder with the demo model."""
    graph = Graph()
    models = graph.add("FaithDiffDemoModels")
    texts = [graph.add("CLIPTextEncode", clip=models[1], text=text)[0] for text in (PROMPT, "")]
    values: dict[str, Any] = {
        "format": "png", "existing": "skip", "scale_by": 2.0, "longest_side": 0, "passes": 1, "seed": SEED,
        "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "faithdiff", "start_point": "lr",
        "tile_size": 1024, "overlap": 0.5, "tile_batch": 0, "color_fix": "adain", "keep_metadata": True,
        "keep_location": True, "embed_workflow": True,
    }  # fmt: skip
    node = graph.add(
        "FaithDiffRestoreFolder",
        model=models[0],
        faithdiff=models[3],
        clip=models[1],
        vae=models[2],
        positive=texts[0],
        negative=texts[1],
        folder=folder,
        output_folder=output,
        **(values | changes),
    )
    graph.add("PreviewAny", source=node[0])
    return graph


def report(result: Any) -> list[str]:
    """Lines of the report that PreviewAny shows."""
    (text,) = [text for shown in result.outputs.values() for text in shown.get("text", [])][:1]
    return str(text).splitlines()


def about(image: LoadedImage) -> dict[str, Any]:
    """All of an image but its pixels and texts of those who wrote it."""
    metadata = image.metadata
    block = Image.Exif()
    if metadata.exif is not None:
        block.load(metadata.exif)
    first = {tag: value for tag, value in block.items() if not str(value).startswith(("{", "prompt:", "workflow:"))}
    inner = [dict(block.get_ifd(pointer)) for pointer in (0x8769, 0x8825)]
    # TIFF and WebP have the resolution among these tags, PNG and JPEG elsewhere.
    layout = (0x8769, 0x8825, 0x011A, 0x011B, 0x0128, 0x0112)
    first = {tag: value for tag, value in first.items() if tag not in layout}
    assert block.get(0x0112, 1) == 1
    facts = {name: getattr(image, name) for name in ("size", "grey", "bits")}
    return {
        **facts,
        "alpha": image.alpha is not None,
        "profile": None if image.icc is None else image.icc[:24] + image.icc[36:],  # between them is the time
        "first": first,
        "inner": inner,
        "xmp": metadata.xmp,
        "dpi": None if metadata.dpi is None else tuple(round(side) for side in metadata.dpi),
    }


def test_a_folder_is_what_the_command_line_gives(server: Server, inputs: Path, command_line: Path) -> None:
    """Image by image; interrupted in the middle, with what was done saved; the second run goes on."""
    out = server.base / "output" / "restored" / "field"
    graph = folder_graph("field", "restored/field")
    with server.submit(graph) as job:
        job.wait_for(lambda kind, _: kind == "progress" and (out / "2 scan.png").exists())
        server.interrupt()
        assert job.wait().status == "execution_interrupted"
    first = sorted(path.name for path in out.rglob("*.*"))
    assert first[:2] == ["1 phone.png", "2 scan.png"]
    assert 2 <= len(first) < 7, "each is saved when it is done"
    lines = report(server.run(graph))
    assert lines[0] == f"{7 - len(first)} restored, {len(first)} skipped (done before), 1 failed"
    assert lines[1].startswith("failed: 3 broken.jpg: 3 broken.jpg is corrupted or truncated")
    names = sorted(path.relative_to(command_line).as_posix() for path in command_line.rglob("*.*"))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == names
    assert {"Name.png.png", "name.png_2.png", "sub/deep.png"} < set(names)
    for name in names:
        ours, theirs = load_image(out / name), load_image(command_line / name)
        assert about(ours) == about(theirs), name
        # Under what is transparent there is no right colour.
        seen = 1.0 if theirs.alpha is None else (theirs.alpha > 0).float()
        assert ((ours.colors - theirs.colors) * seen).abs().max() < TOLERANCE, name
        if ours.alpha is not None and theirs.alpha is not None:
            assert (ours.alpha - theirs.alpha).abs().max() < 1e-6
        with Image.open(out / name) as image:
            image.load()
            assert "FaithDiffRestoreFolder" in image.text["prompt"]
    assert load_image(out / "1 phone.png").size == (80, 48)
    facts = {name: about(load_image(out / name)) for name in names}
    assert (facts["4 grey.png"]["bits"], facts["4 grey.png"]["grey"]) == (16, True)
    assert facts["5 cut.png"]["alpha"]
    for folder in (out, command_line):
        deep = folder / "sub" / "deep.png"
        assert (facts["sub/deep.png"]["bits"], load_image(deep).icc) == (16, wide_profile())
        read_by_other_programs(deep, inputs / "field" / "sub" / "deep.png")


def read_by_other_programs(path: Path, source: Path) -> None:
    """What exiftool and ImageMagick, where they are installed, find in the result of `wide_photograph`."""
    if exiftool := shutil.which("exiftool"):
        words = [exiftool, "-j", "-G1", "-n", str(path), str(source)]
        tags, before = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        assert tags.get("ExifTool:Warning") == before.get("ExifTool:Warning")
        expected = {
            "PNG:BitDepth": 16, "IFD0:Make": "Camera Works", "ExifIFD:DateTimeOriginal": "2003:07:08 09:10:11",
            "ExifIFD:ExifImageWidth": 48, "XMP-dc:Title": "Bridge & towör", "XMP-photoshop:City": "Vienna",
            "GPS:GPSLatitude": 48 + 12 / 60 + 30 / 3600, "PNG-pHYs:PixelsPerUnitX": round(240 / 0.0254),
        }  # fmt: skip
        assert {name: tags.get(name) for name in expected} == pytest.approx(expected)
        assert tags["ICC_Profile:ProfileDescription"].startswith("WIDE")
        assert [float(v) for v in tags["ICC_Profile:RedMatrixColumn"].split()] == pytest.approx(
            [0.60974, 0.31111, 0.01947], abs=1e-4
        )
    if identify := shutil.which("identify"):
        words = [identify, "-format", "%z|%[profile:icc]", str(path)]
        found = subprocess.run(words, capture_output=True, check=True, text=True).stdout.split("|")
        assert (found[0], found[1][:4]) == ("16", "WIDE")


def test_done_again_on_request_in_passes_and_formats(server: Server, inputs: Path, tmp_path: Path) -> None:
    """Overwritten, with two passes, as TIFF without location, and against the command line."""
    lines = report(server.run(folder_graph("field/sub", "again", format="tif", steps=1)))
    path = server.base / "output" / "again" / "deep.tif"
    before = path.read_bytes()
    changes = {"format": "tif", "scale_by": 4.0, "passes": 2, "keep_metadata": False, "embed_workflow": False}
    assert report(server.run(folder_graph("field/sub", "again", **changes)))[0].startswith("0 restored, 1 skipped")
    assert path.read_bytes() == before
    lines = report(server.run(folder_graph("field/sub", "again", existing="overwrite", **changes)))
    assert lines == ["1 restored, 0 skipped (done before), 0 failed"]
    words = [
        "restore",
        str(inputs / "field" / "sub"),
        "-o",
        str(tmp_path),
        "--model",
        str(DEMO),
        "--quiet",
        "--captions",
    ]
    words += ["--faithdiff", str(DEMO / "faithdiff.safetensors"), "--device", "cpu", "--dtype", "fp32"]
    words += ["--scale", "4", "--passes", "2", "--strip-metadata", "--format", "tif"]
    assert main([*words, "--seed", str(SEED), "--steps", str(STEPS)]) == 0
    ours, theirs = load_image(path), load_image(tmp_path / "deep.tif")
    assert about(ours) == about(theirs)
    assert ours.metadata.dpi == (72, 72)
    assert (ours.colors - theirs.colors).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("folder", "output", "message"),
    [
        ("nowhere", "out", "there is no folder nowhere in ComfyUI's input folder"),
        ("../elsewhere", "out", "must lie in ComfyUI's folder"),
        ("field", "../out", "output_folder must lie in ComfyUI's folder"),
        ("bad", "out", r"no image could be restored. failed: a.png: a.png is empty \(0 bytes\)"),
        ("empty", "out", "There is no image in"),
    ],
)
def test_folders_that_cannot_be(server: Server, inputs: Path, folder: str, output: str, message: str) -> None:
    """Said before anything is computed."""
    for name in ("bad", "empty"):
        (inputs / name).mkdir(exist_ok=True)
    (inputs / "bad" / "a.png").touch()
    with pytest.raises((PromptRejectedError, GraphError), match=message) as error:
        server.run(folder_graph(folder, output))
    assert not (server.base / "out").exists()
    assert "FaithDiff Restore Folder" in str(error.value) or isinstance(error.value, PromptRejectedError)


def one_image(name: str, **changes: Any) -> Graph:
    """A file through both nodes."""
    graph = Graph()
    loaded = graph.add("FaithDiffLoadImage", image=name)
    values = {
        "filename_prefix": "kept/%name%", "format": "png", "bits": "source", "quality": 95, "keep_metadata": True,
        "keep_location": True, "embed_workflow": True,
    }  # fmt: skip
    graph.add("FaithDiffSaveImage", images=loaded[0], mask=loaded[1], source=loaded[2], **(values | changes))
    return graph


WORKFLOW: dict[str, Any] = {
    "last_node_id": 1, "last_link_id": 0, "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4,
    "nodes": [
        {"id": 1, "type": "FaithDiffTrimCaption", "pos": [0, 0], "size": [300, 200], "flags": {}, "order": 0, "mode": 0,
         "inputs": [], "outputs": [], "properties": {}, "widgets_values": ["Ünïcode", 2, 4]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ["png", "webp", "jpg", "tif"])
def test_a_photograph_keeps_what_it_knows(server: Server, inputs: Path, name: str) -> None:
    """The files are those of the core; the workflow is found where ComfyUI's own saver puts it."""
    content = photograph("JPEG", pixels(24, 40, 3))
    (inputs / "phone.jpg").write_bytes(content)
    graph = one_image("phone.jpg", format=name, filename_prefix=f"kept/{name} %name%")
    with server.submit(graph, WORKFLOW) as job:
        result = job.wait()
    assert result.status == "execution_success", result.error
    (shown,) = result.images
    assert server.view(shown)[:4] != b"II*\0"
    path = server.base / "output" / "kept" / f"{name} phone_00001_.{name}"
    source, saved = decode_image(content, "a"), load_image(path)
    assert about(saved) == about(source)
    assert (saved.colors - source.colors).abs().mean() < 0.03
    with Image.open(path) as image:
        image.load()
        lines = [str(text) for text in image.getexif().values()]
        texts = dict(line.split(":", 1) for line in lines if line.startswith(("prompt:", "workflow:")))
        texts = image.text if name == "png" else texts
    assert json.loads(texts["workflow"]) == WORKFLOW
    assert [node["class_type"] for node in json.loads(texts["prompt"]).values()] == [
        "FaithDiffLoadImage", "FaithDiffSaveImage",
    ]  # fmt: skip
    if name in ("png", "tif"):
        assert (saved.colors - source.colors).abs().max() < 1e-6


def test_depth_alpha_and_switches(server: Server, inputs: Path) -> None:
    """16 bits with alpha in and out; without location; nothing at all; names numbered."""
    deep = pixels(16, 24, 4, 16)
    tifffile.imwrite(inputs / "deep.tif", deep, photometric="rgb", extrasamples=["unassalpha"])
    saved = server.base / "output" / "kept"
    for bits, format, kind in (("source", "png", 16), ("16", "tif", 16), ("8", "tif", 8), ("source", "webp", 8)):
        before = set(saved.glob("deep*"))
        server.run(one_image("deep.tif", bits=bits, format=format))
        (path,) = set(saved.glob("deep*")) - before
        image = load_image(path)
        assert (image.bits, image.alpha is not None) == (kind, True)
        if kind == 16:
            assert np.abs(image.colors.movedim(0, -1).numpy() * 65535 - deep[..., :3]).max() < 0.6
    with pytest.raises(GraphError, match="FaithDiff Save Image: jpg has 8 bits per channel"):
        server.run(one_image("deep.tif", bits="16", format="jpg"))
    (inputs / "phone.jpg").write_bytes(photograph("JPEG", pixels(24, 40, 3)))
    for switch, left in (("keep_location", True), ("keep_metadata", False)):
        server.run(one_image("phone.jpg", filename_prefix=switch, embed_workflow=False, **{switch: False}))
        path = server.base / "output" / f"{switch}_00001_.png"
        assert LATITUDE not in path.read_bytes()
        assert b"prompt" not in path.read_bytes()
        assert (b"Camera Works" in path.read_bytes()) == left


def test_files_dragged_back_bring_their_workflow(server: Server, inputs: Path, browser: Page) -> None:
    """In the page, as with files of Save Image."""
    (inputs / "drag.jpg").write_bytes(photograph("JPEG", pixels(24, 40, 3)))
    for name in ("png", "webp"):
        graph = one_image("drag.jpg", format=name, filename_prefix=f"drag {name}")
        with server.submit(graph, WORKFLOW) as job:
            assert job.wait().status == "execution_success"
        browser.script("window.app.graph.clear()")
        browser.drop_file(server.base / "output" / f"drag {name}_00001_.{name}", f"image/{name}")
        browser.until(
            lambda: list(browser.node_types()) == ["FaithDiffTrimCaption"], 20.0, f"the workflow in the {name}"
        )
