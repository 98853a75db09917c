"""What a sample is made of: crop and degradation in the published order, sizes, enlargement, captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faithdiff_core.captions.trim import trim_caption
from faithdiff_core.errors import ImageError, SettingsError
from faithdiff_core.training.config import DataConfig
from faithdiff_core.training.data import Sample, open_source
from faithdiff_core.training.degradation import DegradationConfig, Pass, degrade
from faithdiff_core.training.kernels import KernelMix
from faithdiff_core.training.samples import SampleSettings, TrainingSet, crop_pair, degraded_crop

PLAIN = Pass(0.0, 0.0, (0.2, 3.0), (1, 1), (0, 0, 1), 1.0, (0, 0), (0, 0), 0.0, (100, 100))
"""A pass that does next to nothing."""


def _photograph(side: int = 400) -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()[:side, :side])


def _config(**changes: object) -> DataConfig:
    degradation = DegradationConfig(scale=4, first=PLAIN, second=None, final_sinc_probability=0)
    return dataclasses.replace(
        DataConfig(folder=Path("images"), size=128, degradation=degradation),
        **changes,  # type: ignore[arg-type]
    )


def test_the_time_ids_are_the_images_size_and_the_crops_place() -> None:
    image = _photograph()
    pixels = np.asarray(image)
    rng = np.random.default_rng(0)
    places, mirrored = set(), 0
    for _ in range(20):
        crop = crop_pair(Sample(image, None, ""), _config(), rng)
        height, width, top, left, *target = crop.time_ids
        assert (height, width, target) == (400, 400, [128, 128])
        straight = np.array_equal(np.asarray(crop.hq), pixels[top : top + 128, left : left + 128])
        turned = np.array_equal(np.asarray(crop.hq), pixels[:, ::-1][top : top + 128, left : left + 128])
        assert straight != turned
        mirrored += turned
        places.add((top, left))
        # The low-quality one shows the same place.
        small = np.asarray(crop.hq.resize(crop.lq.size, Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), np.asarray(crop.lq, dtype=float).ravel())[0, 1] > 0.93
    assert len(places) > 15
    assert 3 < mirrored < 17
    plain = crop_pair(Sample(image, None, ""), _config(size_conditioning="crop"), rng)
    assert plain.time_ids == (128, 128, 0, 0, 128, 128)


def test_with_a_margin_blur_does_not_see_the_crops_border() -> None:
    image = _photograph()
    blur = dataclasses.replace(PLAIN, blur_probability=1.0, blur_sigma=(3.0, 3.0))
    mix = KernelMix(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, size=(21, 21))
    degradation = DegradationConfig(scale=4, first=blur, second=None, final_sinc_probability=0, kernels=mix)
    whole = np.asarray(degrade(image, degradation, np.random.default_rng(9)), dtype=float)

    def errors(low: Image.Image, top: int, left: int) -> tuple[float, float]:
        """Mean differences to the whole degraded image, at the border and inside."""
        part = whole[top // 4 : top // 4 + 32, left // 4 : left // 4 + 32]
        difference = np.abs(np.asarray(low, dtype=float) - part)
        border = np.concatenate([difference[:2].ravel(), difference[:, :2].ravel(), difference[-2:].ravel()])
        return float(border.mean()), float(difference[6:-6, 6:-6].mean())

    alone, together = [], []
    config = _config(degradation=degradation, flip=False)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        top, left = (int(side) * 4 for side in rng.integers(16, 52, 2))
        box = (left, top, left + 128, top + 128)
        together.append(errors(degraded_crop(image, box, config, np.random.default_rng(seed), False), top, left))
        none = dataclasses.replace(config, margin=0)
        alone.append(errors(degraded_crop(image, box, none, np.random.default_rng(seed), False), top, left))
    border, inside = np.mean(together, axis=0)
    assert border < 1.3 * inside + 0.1
    border, inside = np.mean(alone, axis=0)
    assert border > 1.3 * inside + 0.1


@pytest.mark.parametrize(("margin", "fixed"), [(0, True), (64, False), (None, False)])
def test_jpeg_blocks_begin_anywhere_in_a_crop(margin: int | None, fixed: bool) -> None:
    image = _photograph()
    rough = dataclasses.replace(PLAIN, jpeg_quality=(8, 8))
    degradation = DegradationConfig(scale=4, first=PLAIN, second=rough, final_sinc_probability=0)
    config = _config(degradation=degradation, margin=margin, flip=False, enlarge=("nearest",))
    phases = []
    for seed in range(24):
        lq = crop_pair(Sample(image, None, ""), config, np.random.default_rng(seed)).lq
        low = np.asarray(lq.resize((32, 32), Image.Resampling.NEAREST), dtype=float)
        steps = np.abs(np.diff(low, axis=1)).mean((0, 2))
        phases.append(int(np.argmax([steps[phase::8].mean() for phase in range(8)])))
    assert (phases.count(7) > 18) is fixed
    assert (len(set(phases)) > 4) is not fixed


def test_the_enlargement_is_drawn_from_the_published_three() -> None:
    image = _photograph()
    seen = set()
    for seed in range(12):
        made = {
            mode: crop_pair(Sample(image, None, ""), _config(enlarge=(mode,)), np.random.default_rng(seed)).lq.tobytes()
            for mode in ("nearest", "bilinear", "bicubic", "lanczos")
        }
        drawn = crop_pair(Sample(image, None, ""), _config(), np.random.default_rng(seed)).lq.tobytes()
        (mode,) = [name for name, pixels in made.items() if pixels == drawn]
        seen.add(mode)
    assert seen == {"nearest", "bilinear", "bicubic"}


def test_captions_are_trimmed_as_published(tmp_path: Path) -> None:
    caption = "The image features a woman in an orange suit. She smiles. Behind her is a flag."
    (tmp_path / "a.txt").write_text(caption)
    _photograph(160).save(tmp_path / "a.png")
    config = _config(folder=tmp_path)
    settings = SampleSettings(0, 0.0, 0.02, 4, 8)
    for trimmed, expected in ((True, trim_caption(caption)), (False, caption)):
        chosen = dataclasses.replace(config, trim_captions=trimmed)
        assert TrainingSet(open_source(chosen), [0], chosen, settings)[0]["caption"] == expected
    assert trim_caption(caption) == "A woman in an orange suit. She smiles."


def test_small_images_are_padded_on_request() -> None:
    image = _photograph(100)
    with pytest.raises(ImageError, match="cannot be cropped"):
        crop_pair(Sample(image, None, ""), _config(), np.random.default_rng(0))
    crop = crop_pair(Sample(image, None, ""), _config(small="pad", flip=False), np.random.default_rng(0))
    pixels = np.asarray(crop.hq)
    assert crop.hq.size == crop.lq.size == (128, 128)
    assert crop.time_ids[:4] == (100, 100, 0, 0)
    assert np.array_equal(pixels[:100, :100], np.asarray(image))
    assert np.array_equal(pixels[100:128], pixels[98:70:-1])
    with pytest.raises(SettingsError, match="multiple of the degradation's scale"):
        _config(size=104, degradation=DegradationConfig(scale=3))
