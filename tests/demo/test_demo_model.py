"""The demo model restores photographs that it never saw, and it restores them from their low-quality versions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import photographs as photograph_sources
import pytest
import torch
from PIL import Image

from faithdiff_core import fix_colors, read_faithdiff
from faithdiff_core.cli.train import read_config
from faithdiff_core.training.data import enlarge
from faithdiff_core.training.degradation import DegradationConfig, degrade, to_image, to_tensor
from faithdiff_core.training.yaml_config import build, read_yaml

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return held_out.load_pipeline()


@pytest.fixture(scope="module")
def photographs() -> dict[str, Any]:
    return {p.name: p for p in held_out.held_out(("chelsea.png", "coffee.png"))}


@pytest.fixture(scope="module")
def restored(pipeline: Any, photographs: dict[str, Any]) -> dict[str, Image.Image]:
    return {name: held_out.restore(pipeline, p.low) for name, p in photographs.items()}


def _documented() -> dict[str, list[float]]:
    text = (ROOT / "docs" / "demo_model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {row[0]: [float(value) for value in row[1:]] for row in rows}


@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_it_beats_lanczos_as_documented(
    name: str, photographs: dict[str, Any], restored: dict[str, Image.Image]
) -> None:
    photograph = photographs[name]
    before, after = photograph.scores(photograph.lanczos), photograph.scores(restored[name])
    assert after[0] > before[0] + 0.5
    assert after[1] > before[1] + 0.05
    documented = _documented()[name]
    assert [before[0], after[0]] == pytest.approx(documented[:2], abs=0.03)
    assert [before[1], after[1]] == pytest.approx(documented[2:], abs=0.003)


def test_the_readmes_image_is_a_degraded_photograph(photographs: dict[str, Any]) -> None:
    """New users restore it first. JPEG decoders may differ by a step."""
    shown = np.asarray(Image.open(ROOT / "assets" / "noisy_coffee.png")).astype(int)
    assert np.abs(shown - np.asarray(photographs["coffee"].low)).max() <= 2


def test_the_documented_means_are_those_of_the_table() -> None:
    rows = _documented()
    mean = rows.pop("mean")
    assert sorted(rows) == sorted(Path(n).stem for n in held_out.HELD_OUT)
    assert np.mean(list(rows.values()), axis=0) == pytest.approx(mean, abs=0.006)
    assert mean[1] > mean[0]
    assert mean[3] > mean[2]


def test_the_low_quality_images_are_those_of_the_command(photographs: dict[str, Any]) -> None:
    config = build(DegradationConfig, read_yaml(DEMO / "degradation.yaml"))
    assert read_config(DEMO / "train.yaml").data.degradation == config
    for name, photograph in photographs.items():
        again = degrade(photograph.original, config, np.random.default_rng([0, *name.encode()]))
        assert again.tobytes() == photograph.low.tobytes()


def _restore_with_features_of(pipeline: Any, low: Image.Image, other: Image.Image, seed: int) -> Image.Image:
    """Restore an image from noise with the features of another one; colours corrected by mean and deviation."""
    settings = read_yaml(DEMO / "restore.yaml")
    size = (low.width * 2, low.height * 2)
    features = pipeline.encode_lq(to_tensor(enlarge(other, size))[None] * 2 - 1)
    shape = (1, 4, size[1] // 8, size[0] // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    latent = pipeline.sample(
        features,
        pipeline.encode_text([""], guided=False),
        noise,
        steps=settings["steps"],
        cfg=settings["cfg"],
        start="noise",
        tile=settings["tile"],
        overlap=settings["overlap"],
    )
    return to_image(fix_colors(pipeline.decode(latent), to_tensor(enlarge(low, size))[None], "adain")[0])


def _correlation(a: Image.Image, b: Image.Image) -> float:
    """Of two images of one size, their channels' means apart."""
    x, y = (np.asarray(p, dtype=float) - np.asarray(p, dtype=float).mean((0, 1)) for p in (a, b))
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


LOW_CROP = (40, 0, 168, 128)
"""The part of the low-quality images that is enough to see whose features they are, in pixels."""


def _cut(photograph: Any) -> tuple[Image.Image, Image.Image]:
    """That part of a low-quality image and of its original."""
    return photograph.low.crop(LOW_CROP), photograph.original.crop(tuple(2 * edge for edge in LOW_CROP))


def test_features_of_another_image_give_another_image(pipeline: Any, photographs: dict[str, Any]) -> None:
    cuts = {name: _cut(photograph) for name, photograph in photographs.items()}
    for name, other in (("chelsea", "coffee"), ("coffee", "chelsea")):
        (low, truth), (other_low, other_truth) = cuts[name], cuts[other]
        own = _restore_with_features_of(pipeline, low, low, seed=4)
        swapped = _restore_with_features_of(pipeline, low, other_low, seed=4)
        drop = held_out.psnr(np.asarray(own), np.asarray(truth)) - held_out.psnr(np.asarray(swapped), np.asarray(truth))
        assert drop > 4
        assert _correlation(own, truth) > 0.6
        assert _correlation(swapped, other_truth) > 0.5
        assert abs(_correlation(swapped, truth)) < 0.3


def test_without_the_alignment_the_image_is_lost(pipeline: Any, photographs: dict[str, Any]) -> None:
    low, truth = _cut(photographs["coffee"])
    scores, likeness = {}, {}
    for strength in (1.0, 0.0):
        # From noise, so that the alignment is all that the U-Net knows of the image.
        corrected = held_out.restore(pipeline, low, strength=strength, start="noise")
        scores[strength] = held_out.psnr(np.asarray(corrected), np.asarray(truth))
        plain = held_out.restore(pipeline, low, strength=strength, start="noise", color_fix="none")
        likeness[strength] = _correlation(plain, truth)
    assert scores[0.0] < scores[1.0] - 2
    assert likeness[1.0] > 0.6
    assert abs(likeness[0.0]) < 0.3


def test_the_files_are_small_and_complete() -> None:
    files = [f for f in MODEL.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    weights = read_faithdiff(MODEL / "faithdiff.safetensors")
    assert weights.kind == "full"
    assert weights.unet is not None
    assert {v.dtype for part in weights.parts.values() for v in part.state.values()} == {torch.float16}
    # Sizes that a ComfyUI model takes: channels of 32, and of 64 where there are transformers.
    config = weights.unet.config
    for channels, depth in zip(config.block_out_channels, config.transformer_depths, strict=True):
        assert channels % (64 if depth else 32) == 0
    log = json.loads((MODEL / "training_log.json").read_text())
    assert {"vae", "unet", "train"} <= log.keys()


def test_held_out_photographs_are_not_among_the_training_ones() -> None:
    config = read_yaml(DEMO / "model.yaml")
    assert {Path(p).name for p in config["held_out"]} == set(held_out.HELD_OUT)
    assert not any(Path(name).name in pattern for name in held_out.HELD_OUT for pattern in config["photographs"])
    assert not any(pattern.endswith("data/*") for pattern in config["photographs"])


def test_generated_images_depend_on_their_seed_alone() -> None:
    first, again, other = (photograph_sources.generated_image(seed) for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert np.asarray(first).std() > 5


def test_whitening_changes_nothing_from_end_to_end() -> None:
    from diffusers import AutoencoderKL
    from make_model import whiten

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 32],
    ).eval()
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        whiten(vae, pixels)
        latents = vae.encode(pixels).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    flat = latents.movedim(1, -1).reshape(-1, 4) * 0.13025
    assert torch.allclose(flat.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(torch.cov(flat.T), torch.eye(4), atol=1e-2)
