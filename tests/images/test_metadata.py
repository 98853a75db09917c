"""What a photograph says about itself, from the file read to the file written, as other programs read it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image
from support.photographs import LATITUDE, XMP, exif, linear_profile, photograph

from faithdiff_core.images.exif import EMPTY, ExifBlock
from faithdiff_core.images.metadata import Metadata, check_metadata
from faithdiff_core.images.reading import LoadedImage, decode_image, load_image
from faithdiff_core.images.writing import save_image
from faithdiff_core.images.xmp import edit_xmp

KINDS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}
EXIF, XAP, TIFF = (f"{{http://ns.adobe.com/{name}/1.0/}}" for name in ("exif", "xap", "tiff"))
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC, PHOTOSHOP = "{http://purl.org/dc/elements/1.1/}", "{http://ns.adobe.com/photoshop/1.0/}"
VALUES = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def enlarged(image: LoadedImage, factor: int = 2) -> LoadedImage:
    """A result: the same image, larger."""
    colors = image.colors.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return replace(image, colors=colors)


def read_xmp(path: Path) -> tuple[dict[str, str], str]:
    """Properties of the XMP that Pillow finds in a file, and its title."""
    with Image.open(path) as image:
        image.load()
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or getattr(image, "tag_v2", {})[700]
    root = ElementTree.fromstring(packet if isinstance(packet, str) else packet.decode())
    found: dict[str, str] = {}
    for element in root.iter():
        found |= element.attrib
        if element.text and element.text.strip():
            found[element.tag] = element.text
    return found, root.findtext(f".//{DC}title/{RDF}Alt/{RDF}li") or ""


def read_exif(path: Path) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """The first directory, EXIF's own and GPS, as Pillow reads them."""
    with Image.open(path) as image:
        block = image.getexif()
        return dict(block), dict(block.get_ifd(0x8769)), dict(block.get_ifd(0x8825))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", KINDS.values())
def test_everything_arrives(tmp_path: Path, kind: str, suffix: str) -> None:
    """From every format to every format, and through a second pass; upright, with the size of the result."""
    source, target = tmp_path / f"a{KINDS[kind]}", tmp_path / f"b{suffix}"
    source.write_bytes(photograph(kind, VALUES))
    loaded = load_image(source)
    assert (loaded.size, loaded.notes) == ((24, 16), ())
    assert save_image(target, enlarged(loaded)) == ()
    if suffix != ".jpg":
        save_image(target, load_image(target))
    first, own, gps = read_exif(target)
    assert {tag: first[tag] for tag in (0x010F, 0x0110, 0x010E, 0x0132, 0x013B, 0x8298)} == {
        0x010F: "Camera Works", 0x0110: "CW 5", 0x010E: "On the bridge", 0x0132: "2003:07:08 09:10:11",
        0x013B: "A. Photographer", 0x8298: "(c) A. Photographer",
    }  # fmt: skip
    assert first.get(0x0112, 1) == 1
    assert (own[0xA002], own[0xA003], own[0x829A], own[0x9003]) == (32, 48, 1 / 125, "2003:07:08 09:10:11")
    assert own[0x927C] == b"MAKERNOTE" * 5
    assert (gps[1], gps[2], gps[27]) == ("N", (48, 12, 30), LATITUDE)
    found, title = read_xmp(target)
    assert title == "Bridge & towör"
    assert {name: found[name] for name in (f"{XAP}Rating", f"{TIFF}Orientation", f"{TIFF}ImageWidth")} == {
        f"{XAP}Rating": "4", f"{TIFF}Orientation": "1", f"{TIFF}ImageWidth": "32",
    }  # fmt: skip
    assert (found[f"{EXIF}PixelXDimension"], found[f"{EXIF}PixelYDimension"]) == ("32", "48")
    assert found[f"{EXIF}GPSLatitude"] == "48,12.5N"
    assert not [name for name in found if "MicroVideo" in name]
    with Image.open(target) as image:
        dpi = image.info.get("dpi") or (first[0x011A], first[0x011B])
    assert tuple(round(float(value)) for value in dpi) == (300, 300)


@pytest.mark.parametrize("suffix", KINDS.values())
def test_without_location(tmp_path: Path, suffix: str) -> None:
    """No byte of it is left; the rest stays."""
    image = decode_image(photograph("JPEG", VALUES), "a.jpg")
    path = tmp_path / f"a{suffix}"
    save_image(path, replace(image, metadata=image.metadata.without_location()))
    first, own, gps = read_exif(path)
    assert (first[0x0110], own[0x9003], gps) == ("CW 5", "2003:07:08 09:10:11", {})
    found, title = read_xmp(path)
    assert title == "Bridge & towör"
    assert not [name for name in found if "GPS" in name or name == f"{PHOTOSHOP}City"]
    content = path.read_bytes()
    assert LATITUDE not in content
    assert b"Vienna" not in content


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_tiff_in_the_byte_order_of_the_exif_data(tmp_path: Path, mode: str) -> None:
    """The file begins with the EXIF data, so its pixels are big-endian, too; several strips, 16 bits."""
    grey = mode == "L"
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(1 if grey else 3, 1400, 200, generator=generator).expand(3, -1, -1)
    alpha = None if grey else torch.rand(1, 1400, 200, generator=generator)
    metadata = check_metadata(exif(200, 1400), None, (90, 90), size=(1400, 200))[0]
    image = LoadedImage(colors, alpha, grey, 16, None if grey else linear_profile(), metadata=metadata)
    path = tmp_path / "a.tiff"
    save_image(path, image)
    channels = colors[:1] if alpha is None else torch.cat([colors, alpha])
    expected = channels.mul(65535).round().permute(1, 2, 0).numpy()
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].tags["StripOffsets"].count > 1
        assert file.byteorder == ">"
        values = file.asarray()
    assert np.abs(values.reshape(expected.shape) - expected).max() <= grey  # luma's weights round
    back = load_image(path)
    assert (back.bits, back.grey, back.alpha is not None, back.icc) == (16, grey, not grey, image.icc)
    assert back.metadata.dpi == (90, 90)
    assert (back.colors - colors).abs().max() <= (0.51 + grey) / 65535


def test_colours_that_were_converted_are_called_srgb(tmp_path: Path) -> None:
    """8-bit colours with a profile become sRGB; their metadata must not say otherwise."""
    image = decode_image(photograph("JPEG", VALUES, icc_profile=linear_profile()), "a.jpg")
    save_image(tmp_path / "a.webp", image)
    assert read_exif(tmp_path / "a.webp")[1][0xA001] == 1
    untouched = decode_image(photograph("JPEG", VALUES), "a.jpg")
    save_image(tmp_path / "b.webp", untouched)
    assert read_exif(tmp_path / "b.webp")[1][0xA001] == 65535


def test_texts_find_a_place_beside_the_photographs_own(tmp_path: Path) -> None:
    """The camera's name and the description stay; without a camera, a graph is where ComfyUI puts it."""
    graph = {"prompt": json.dumps({"1": {"class_type": "A"}}), "workflow": json.dumps({"nodes": ["ü"]})}
    settings = {"Software": "FaithDiff 1", "faithdiff": "{}"}
    camera = decode_image(photograph("JPEG", VALUES), "a.jpg")
    plain = replace(camera, metadata=Metadata())
    expected = {*(f"{name}:{text}" for name, text in graph.items()), json.dumps(settings)}
    for name in ("a.webp", "a.jpg", "a.tif"):
        path = tmp_path / name
        save_image(path, camera, text=settings, entries=graph)
        first = read_exif(path)[0]
        assert (first[0x010F], first[0x0110], first[0x010E]) == ("Camera Works", "CW 5", "On the bridge")
        assert expected <= {value for value in first.values() if isinstance(value, str)}
        save_image(path, plain, text=settings, entries=graph)
        first = read_exif(path)[0]
        assert (first[0x0110], first[0x010F]) == (f"prompt:{graph['prompt']}", f"workflow:{graph['workflow']}")
        assert json.loads(first[0x010E]) == settings
        again = load_image(path)
        save_image(path, again)
        first = read_exif(path)[0]
        assert not [value for value in first.values() if isinstance(value, str)], "of the image that was read"
    save_image(tmp_path / "a.png", camera, text=settings, entries=graph)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert {key: image.text[key] for key in (*graph, *settings)} == {**graph, **settings}


def test_what_jpeg_cannot_hold_is_named(tmp_path: Path) -> None:
    """A segment has 64 KB: texts go first, then the photograph's own data."""
    image = decode_image(photograph("PNG", VALUES), "a.png")
    notes = save_image(tmp_path / "a.jpg", image, entries={"workflow": "x" * 70_000, "prompt": "{}"})
    assert notes == ("its metadata `workflow` is longer than the 64 KB that JPEG takes, and was left out",)
    first = read_exif(tmp_path / "a.jpg")[0]
    assert "prompt:{}" in first.values()
    block = ExifBlock(EMPTY)
    block.put_text(0x013B, "x" * 70_000)
    packet = XMP.replace(b"Bridge", b"Bridge" * 12_000)
    long = replace(image, metadata=Metadata(block.to_bytes(), packet))
    notes = save_image(tmp_path / "a.jpg", long, entries={"prompt": "{}"})
    assert [note.split(" is ")[0] for note in notes] == ["its metadata `prompt`", "its EXIF data", "its XMP data"]
    with Image.open(tmp_path / "a.jpg") as saved:
        assert not {"exif", "xmp"} & set(saved.info)


def test_the_small_copy_inside_is_dropped() -> None:
    """A camera's thumbnail shows the image as it was, and on its side."""
    block = bytearray(exif(24, 16).removeprefix(b"Exif\0\0"))
    thumbnail = b"\xff\xd8THUMBNAIL" * 200
    second = len(block) + len(block) % 2
    entries = [(0x0201, second + 30), (0x0202, len(thumbnail))]
    directory = (2).to_bytes(2, "big") + b"".join(
        tag.to_bytes(2, "big") + (4).to_bytes(2, "big") + (1).to_bytes(4, "big") + value.to_bytes(4, "big")
        for tag, value in entries
    )
    first_end = 8 + 2 + 12 * int.from_bytes(block[8:10], "big")
    block[first_end : first_end + 4] = second.to_bytes(4, "big")
    block = block.ljust(second, b"\0") + directory + bytes(4) + thumbnail
    parsed = Image.Exif()
    parsed.load(bytes(block))
    assert parsed.get_ifd(ExifTags.IFD.IFD1)[0x0202] == len(thumbnail)
    metadata, notes = check_metadata(bytes(block), None, None, size=(24, 16))
    assert notes == ()
    assert metadata.exif is not None
    assert b"THUMBNAIL" not in metadata.exif
    assert len(metadata.exif) < len(block)
    parsed = Image.Exif()
    parsed.load(metadata.exif)
    assert parsed.get_ifd(ExifTags.IFD.IFD1) == {}
    assert parsed.get_ifd(0x8769)[0x927C] == b"MAKERNOTE" * 5


@pytest.mark.parametrize(
    ("block", "packet", "notes"),
    [
        (b"nonsense", None, ["EXIF"]),
        (b"II*\0\xff\xff\xff\xff", None, ["EXIF"]),
        (b"MM\0*\0\0\0\x08\0\x09", None, ["EXIF"]),
        (None, b"<x:xmpmeta", ["XMP"]),
        (None, b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', ["XMP"]),
        (None, b"<a>" * 100_000 + b"</a>" * 100_000, ["XMP"]),
    ],
)
def test_corrupted_metadata_is_noted_and_left_out(block: bytes | None, packet: bytes | None, notes: list[str]) -> None:
    metadata, found = check_metadata(block, packet, ("a", 1), size=(1, 1))
    assert metadata == Metadata()
    assert [note.split()[1] for note in found] == notes
    assert all("corrupted, and was left out" in note for note in found)


def test_xmp_elements_and_attributes_are_the_same() -> None:
    """A property may be written either way."""
    packet = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
        <r:Description xmlns:t="http://ns.adobe.com/tiff/1.0/" xmlns:e="http://ns.adobe.com/exif/1.0/">
        <t:Orientation>8</t:Orientation><e:GPSAltitude>1/1</e:GPSAltitude></r:Description></r:RDF></x:xmpmeta>"""
    out = edit_xmp(packet, upright=True, location=False)
    assert b"<t:Orientation>1</t:Orientation>" in out
    assert b"GPSAltitude" not in out


EXIFTOOL = shutil.which("exiftool")


@pytest.mark.skipif(EXIFTOOL is None, reason="exiftool is not installed: metadata is read by Pillow and tifffile alone")
def test_exiftool_reads_the_same_before_and_after(tmp_path: Path) -> None:
    """All tags that it knows, but for those that are to change; no warning that was not there before."""
    assert EXIFTOOL is not None

    def tags(path: Path) -> dict[str, Any]:
        groups = ("-IFD0:all", "-ExifIFD:all", "-GPS:all", "-XMP:all", "-Warning")
        words = [EXIFTOOL, "-j", "-G1", "-a", "-n", *groups, str(path)]
        return dict(json.loads(subprocess.run(words, capture_output=True, check=True).stdout)[0])

    source = tmp_path / "source.jpg"
    source.write_bytes(photograph("JPEG", VALUES))
    before = tags(source)
    image = enlarged(load_image(source))
    changed = {
        "IFD0:Orientation": 1, "ExifIFD:ExifImageWidth": 32, "ExifIFD:ExifImageHeight": 48, "XMP-tiff:Orientation": 1,
        "XMP-tiff:ImageWidth": 32, "XMP-exif:ExifImageWidth": 32, "XMP-exif:ExifImageHeight": 48,
    }  # fmt: skip
    film = {name for name in before if name.startswith("XMP-GCamera")}
    expected = {name: changed.get(name, value) for name, value in before.items() if name not in film}
    assert len(expected) > 25
    assert film
    for suffix in KINDS.values():
        for bits in (8, 16):
            path = tmp_path / f"{bits}{suffix}"
            save_image(path, replace(image, bits=bits))
            after = {name: value for name, value in tags(path).items() if name in expected}
            assert {**after, "SourceFile": ""} == {**expected, "SourceFile": ""}, path.name


def test_resolution_in_centimetres() -> None:
    """TIFF's other unit."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, VALUES, resolution=(100, 50), resolutionunit="CENTIMETER")
    assert decode_image(buffer.getvalue(), "a.tif").metadata.dpi == (254, 127)
