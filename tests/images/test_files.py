"""Sizes, resizing, padding and image files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from support.photographs import SRGB, linear_profile

from faithdiff_core.errors import ImageError, SettingsError
from faithdiff_core.images.formats import MAX_PIXELS
from faithdiff_core.images.geometry import crop_to, pad_to_multiple, resize_lanczos
from faithdiff_core.images.reading import LoadedImage, load_image
from faithdiff_core.images.sizes import target_size
from faithdiff_core.images.writing import check_output, save_image

RNG = np.random.default_rng(0)


def _noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _saved(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "how", "expected"),
        [
            ((427, 640), {"scale": 2}, (854, 1280)),
            ((37, 3000), {"scale": 2.0}, (74, 6000)),
            ((300, 1), {"scale": 0.25}, (75, 1)),
            ((5, 3), {"scale": 1.1}, (6, 3)),  # 5.5 up, 3.3 down
            ((5, 15), {"scale": 0.1}, (1, 2)),  # halves up
            ((427, 640), {"longest_side": 1000}, (667, 1000)),
            ((640, 427), {"longest_side": 1000, "scale": 2}, (1000, 667)),
            ((1000, 4000), {"megapixels": 1}, (500, 2000)),
        ],
    )
    def test_target_size(self, size: tuple[int, int], how: dict[str, Any], expected: tuple[int, int]) -> None:
        assert target_size(*size, **how) == expected

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({}, "Give a scale"),
            ({"scale": 0}, "scale must be a positive number, got 0"),
            ({"scale": float("nan")}, "positive number, got nan"),
            ({"scale": float("inf")}, "positive number, got inf"),
            ({"longest_side": -5}, "longest side must be a positive number, got -5"),
            ({"megapixels": 0}, "number of megapixels must be a positive number"),
            ({"megapixels": 2, "longest_side": 10}, "not both"),
            ({"scale": 1000}, "would become 640000 x 427000"),
        ],
    )
    def test_bad_targets(self, how: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            target_size(427, 640, **how)


class TestResize:
    def test_matches_pillow_on_8_bits(self) -> None:
        values = _noise(23, 31, 3) // 2 + 64  # far from the ends, where Pillow clips after each direction
        wanted = np.asarray(Image.fromarray(values).resize((62, 46), Image.Resampling.LANCZOS))
        loaded = torch.from_numpy(values).permute(2, 0, 1)[None] / 255
        got = resize_lanczos(loaded, 46, 62)[0].permute(1, 2, 0) * 255
        # Pillow rounds to 8 bits after each direction.
        assert (got - torch.from_numpy(wanted.astype(np.float32))).abs().max() < 1.5

    def test_keeps_what_8_bits_cannot(self) -> None:
        ramp = torch.linspace(0.5, 0.502, 64).view(1, 1, 1, 64).expand(1, 1, 8, 64)
        assert len(resize_lanczos(ramp, 16, 128).unique()) > 60

    def test_batch_equals_one_by_one(self) -> None:
        images = torch.rand(3, 4, 9, 13)
        together = resize_lanczos(images, 20, 7)
        apart = torch.cat([resize_lanczos(p[None], 20, 7) for p in images])
        assert torch.equal(together, apart)

    def test_stays_in_range_and_dtype(self) -> None:
        steps = (torch.arange(64) // 8 % 2).double().view(1, 1, 8, 8)
        out = resize_lanczos(steps, 33, 29)
        assert out.dtype == torch.float64
        assert out.min() >= 0
        assert out.max() <= 1

    def test_same_size_is_the_same(self) -> None:
        loaded = torch.rand(1, 3, 6, 5)
        assert torch.equal(resize_lanczos(loaded, 6, 5), loaded)

    def test_one_pixel_wide(self) -> None:
        assert resize_lanczos(torch.rand(1, 3, 50, 1), 100, 2).shape == (1, 3, 100, 2)

    def test_bad_input(self) -> None:
        with pytest.raises(SettingsError, match=r"shape \(batch, channels, height, width\), got \(3, 4, 4\)"):
            resize_lanczos(torch.rand(3, 4, 4), 8, 8)
        with pytest.raises(SettingsError, match="uint8"):
            resize_lanczos(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8, 8)
        with pytest.raises(SettingsError, match="0 x 8"):
            resize_lanczos(torch.rand(1, 3, 4, 4), 8, 0)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (1, 1), (37, 3), (427, 640), (7, 9)])
def test_padding_repeats_the_border_and_is_undone(height: int, width: int) -> None:
    loaded = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(loaded)
    wanted = np.pad(loaded.numpy(), ((0, 0), (0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    assert torch.equal(padded, torch.from_numpy(wanted))
    assert torch.equal(crop_to(padded, height, width), loaded)


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "grey", "alpha"),
        [("L", True, False), ("LA", True, True), ("RGB", False, False), ("RGBA", False, True)],
    )
    def test_plain_modes_return_unchanged(self, tmp_path: Path, mode: str, grey: bool, alpha: bool) -> None:
        image = Image.fromarray(_noise(11, 7, 4), "RGBA").convert(mode)
        loaded = load_image(_saved(tmp_path, image))
        assert (loaded.grey, loaded.alpha is not None, loaded.bits) == (grey, alpha, 8)
        assert loaded.size == (11, 7)
        save_image(tmp_path / "b.png", loaded)
        with Image.open(tmp_path / "b.png") as back:
            assert back.mode == mode
            assert np.array_equal(np.asarray(back), np.asarray(image))

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_16_bits_return_unchanged(self, tmp_path: Path, channels: int) -> None:
        values = _noise(9, 5, channels, dtype=np.uint16)
        alpha = torch.from_numpy(values[..., -1] / 65535.0).float()[None] if channels in (2, 4) else None
        colors = torch.from_numpy(values / 65535.0).float().permute(2, 0, 1)
        colors = colors[:1].expand(3, -1, -1) if channels < 3 else colors[:3]
        save_image(tmp_path / "a.png", LoadedImage(colors, alpha, grey=channels < 3, bits=16))
        loaded = load_image(tmp_path / "a.png")
        assert (loaded.bits, loaded.grey, loaded.alpha is not None) == (16, channels < 3, channels in (2, 4))
        # Grey goes through a weighted sum, in float32: one step of 65535 at most.
        assert (loaded.colors - colors).abs().max() <= (1.01 / 65535 if channels < 3 else 1e-6)
        if alpha is not None and loaded.alpha is not None:
            assert torch.allclose(loaded.alpha, alpha, atol=1e-6)

    def test_16_bit_png_is_what_opencv_reads(self, tmp_path: Path) -> None:
        values = _noise(9, 5, 3, dtype=np.uint16)
        loaded = LoadedImage(torch.from_numpy(values / 65535.0).float().permute(2, 0, 1), bits=16)
        save_image(tmp_path / "a.png", loaded)
        back = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
        assert back is not None
        assert np.array_equal(back[..., ::-1], values)

    @pytest.mark.parametrize("name", ["a.png", "a.tiff"])
    @pytest.mark.parametrize("channels", [3, 4])
    def test_16_bit_colours_of_others(self, tmp_path: Path, name: str, channels: int) -> None:
        values = _noise(6, 8, channels, dtype=np.uint16)
        assert cv2.imwrite(str(tmp_path / name), values)
        loaded = load_image(tmp_path / name)
        assert loaded.bits == 16
        wanted = torch.from_numpy(values[..., [2, 1, 0]] / 65535.0).float().permute(2, 0, 1)
        assert torch.allclose(loaded.colors, wanted, atol=1e-6)

    @pytest.mark.parametrize("name", ["a.png", "a.tiff"])
    def test_16_bit_grey_of_others(self, tmp_path: Path, name: str) -> None:
        values = _noise(6, 8, dtype=np.uint16)
        loaded = load_image(_saved(tmp_path, Image.fromarray(values), name))
        assert (loaded.bits, loaded.grey) == (16, True)
        assert np.allclose(loaded.colors[1].numpy(), values / 65535.0, atol=1e-6)

    def test_palette(self, tmp_path: Path) -> None:
        image = Image.fromarray(_noise(8, 8, 3)).quantize(16)
        loaded = load_image(_saved(tmp_path, image))
        assert (loaded.grey, loaded.alpha) == (False, None)
        assert np.allclose(loaded.colors.permute(1, 2, 0).numpy() * 255, np.asarray(image.convert("RGB")))

    def test_palette_with_transparency(self, tmp_path: Path) -> None:
        image = Image.fromarray(_noise(8, 8, 3)).quantize(16)
        loaded = load_image(_saved(tmp_path, image, transparency=3))
        assert loaded.alpha is not None
        assert np.array_equal(loaded.alpha[0].numpy() == 0, np.asarray(image) == 3)

    def test_a_transparent_colour(self, tmp_path: Path) -> None:
        values = np.zeros((2, 2, 3), np.uint8)
        values[0, 0] = 255, 0, 0
        loaded = load_image(_saved(tmp_path, Image.fromarray(values), transparency=(255, 0, 0)))
        assert loaded.alpha is not None
        assert loaded.alpha[0].tolist() == [[0, 1], [1, 1]]

    def test_one_bit(self, tmp_path: Path) -> None:
        values = _noise(5, 9) > 127
        loaded = load_image(_saved(tmp_path, Image.fromarray(values)))
        assert loaded.grey
        assert np.array_equal(loaded.colors[0].numpy(), values)

    def test_cmyk_without_profile(self, tmp_path: Path) -> None:
        image = Image.fromarray(_noise(8, 8, 4), "CMYK")
        loaded = load_image(_saved(tmp_path, image, "a.tiff"))
        assert (loaded.grey, loaded.alpha, loaded.icc) == (False, None, None)
        assert np.allclose(loaded.colors.permute(1, 2, 0).numpy() * 255, np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("name", ["a.png", "a.tiff", "deep.png"])
    def test_orientation(self, tmp_path: Path, orientation: int, name: str) -> None:
        values = _noise(4, 6) if name == "deep.png" else _noise(4, 6, 3)
        image = Image.fromarray(values.astype(np.uint16) * 257 if name == "deep.png" else values)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = _saved(tmp_path, image, name, exif=exif)
        with Image.open(path) as opened:
            wanted = np.asarray(ImageOps.exif_transpose(opened)).astype(np.float64)
        got = load_image(path).colors.permute(1, 2, 0).numpy()
        wanted = wanted / wanted.max() if name == "deep.png" else wanted / 255
        got = got[..., 0] / got.max() if name == "deep.png" else got
        assert np.allclose(got, wanted, atol=1e-6)

    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_orientation_of_16_bit_colours(self, tmp_path: Path, orientation: int) -> None:
        values = _noise(4, 6, 3)
        exif = Image.Exif()
        exif[0x0112] = orientation
        flat = _saved(tmp_path, Image.fromarray(values), exif=exif)
        deep = tmp_path / "deep.png"
        assert cv2.imwrite(str(deep), values[..., ::-1].astype(np.uint16) * 257)
        # Put the first file's eXIf chunk into the second, behind the header.
        content, chunk = deep.read_bytes(), _chunk_of(flat.read_bytes(), b"eXIf")
        deep.write_bytes(content[:33] + chunk + content[33:])
        assert torch.allclose(load_image(deep).colors, load_image(flat).colors, atol=1e-6)

    def test_first_of_several_frames(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
        path = _saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
        loaded = load_image(path)
        assert loaded.notes == ("it has 3 frames; only the first is used",)
        assert loaded.colors[:, 0, 0].tolist() == [1, 0, 0]

    def test_pillows_own_limit_does_not_hold(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = _saved(tmp_path, Image.new("L", (64, 48)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
        with pytest.raises(Image.DecompressionBombError), Image.open(path):
            pass
        assert load_image(path).size == (48, 64)
        assert Image.MAX_IMAGE_PIXELS == 16


def _chunk_of(content: bytes, kind: bytes) -> bytes:
    at = content.index(kind) - 4
    return content[at : at + 12 + struct.unpack(">I", content[at : at + 4])[0]]


class TestProfiles:
    def test_colours_are_converted_to_srgb(self, tmp_path: Path) -> None:
        # Linear light with sRGB's primaries: sRGB's own profile with every curve replaced by a gamma of 1.
        profile = linear_profile()
        values = _noise(16, 16, 3)
        path = _saved(tmp_path, Image.fromarray(values), icc_profile=profile)
        loaded = load_image(path)
        linear = values / 255.0
        srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert np.abs(loaded.colors.permute(1, 2, 0).numpy() - srgb).max() < 2.5 / 255
        assert loaded.icc is not None
        save_image(tmp_path / "b.png", loaded)
        with Image.open(tmp_path / "b.png") as back:
            name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(back.info["icc_profile"])))
        assert name.startswith("sRGB")

    def test_transparency_survives(self, tmp_path: Path) -> None:
        values = _noise(8, 8, 4)
        loaded = load_image(_saved(tmp_path, Image.fromarray(values, "RGBA"), icc_profile=linear_profile()))
        assert loaded.alpha is not None
        assert np.allclose(loaded.alpha[0].numpy() * 255, values[..., 3])

    def test_srgb_stays_exactly(self, tmp_path: Path) -> None:
        values = _noise(8, 8, 3)
        loaded = load_image(_saved(tmp_path, Image.fromarray(values), icc_profile=SRGB))
        assert np.allclose(loaded.colors.permute(1, 2, 0).numpy() * 255, values)
        assert loaded.icc == SRGB

    @pytest.mark.parametrize("bits", [8, 16])
    def test_grey_and_16_bits_keep_theirs(self, tmp_path: Path, bits: int) -> None:
        profile = linear_profile()
        loaded = LoadedImage(torch.rand(3, 4, 4), grey=bits == 8, bits=bits, icc=profile)
        save_image(tmp_path / "a.png", loaded)
        back = load_image(tmp_path / "a.png")
        assert back.icc == profile
        if bits == 16:
            assert torch.allclose(back.colors, loaded.colors, atol=1e-5)

    def test_a_corrupted_profile_is_noted(self, tmp_path: Path) -> None:
        values = _noise(4, 4, 3)
        loaded = load_image(_saved(tmp_path, Image.fromarray(values), icc_profile=b"nonsense" * 40))
        assert "colour profile is corrupted" in loaded.notes[0]
        assert loaded.icc is None
        assert np.allclose(loaded.colors.permute(1, 2, 0).numpy() * 255, values)


class TestWriting:
    IMAGE = LoadedImage(torch.rand(3, 6, 9))

    @pytest.mark.parametrize("bits", [8, 16])
    def test_png_carries_text(self, tmp_path: Path, bits: int) -> None:
        text = {"faithdiff": '{"prompt": "Käse – 雪", "seed": 7}'}
        save_image(tmp_path / "a.png", LoadedImage(self.IMAGE.colors, bits=bits), text=text)
        with Image.open(tmp_path / "a.png") as image:
            image.load()
            assert image.text == text

    @pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
    def test_other_formats(self, tmp_path: Path, name: str, kind: str) -> None:
        smooth = torch.linspace(0, 1, 32).view(1, 1, 32).expand(3, 32, 32)
        save_image(tmp_path / name, LoadedImage(smooth), text={"faithdiff": "7"})
        with Image.open(tmp_path / name) as image:
            assert image.format == kind
            assert image.getexif()[0x010E] == '{"faithdiff": "7"}'
        assert (load_image(tmp_path / name).colors - smooth).abs().mean() < 0.02

    def test_grey_jpeg_stays_grey(self, tmp_path: Path) -> None:
        save_image(tmp_path / "a.jpg", LoadedImage(torch.rand(3, 8, 8), grey=True))
        assert load_image(tmp_path / "a.jpg").grey

    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").mkdir()
        with pytest.raises(OSError, match="directory"):
            save_image(tmp_path / "a.png", self.IMAGE)
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_folders_are_made(self, tmp_path: Path) -> None:
        save_image(tmp_path / "x" / "y" / "a.png", self.IMAGE)
        assert load_image(tmp_path / "x" / "y" / "a.png").size == (6, 9)

    @pytest.mark.parametrize(
        ("name", "size", "transparent", "message"),
        [
            ("a.bmp", (4, 4), False, "written as .png, .jpg, .jpeg, .webp, .tif, .tiff, not as .bmp"),
            ("a", (4, 4), False, "not as a name without ending"),
            ("a.jpg", (4, 4), True, "JPEG cannot hold the image's transparency"),
            ("a.webp", (4, 20000), False, "20000 x 4 is too large for .webp, whose sides have at most 16383"),
            ("a.jpeg", (70000, 4), False, "too large for .jpeg"),
        ],
    )
    def test_bad_names(self, name: str, size: tuple[int, int], transparent: bool, message: str) -> None:
        with pytest.raises(ImageError, match=message):
            check_output(Path(name), *size, transparent=transparent)


def test_an_image_above_the_limit_is_refused(tmp_path: Path) -> None:
    side = 2**14 + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    with pytest.raises(ImageError, match=f"16385 x 16385 pixels; at most {MAX_PIXELS}"):
        load_image(path)
