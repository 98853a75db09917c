"""The degradation against the published one: the JPEG transform exactly, the whole process by its statistics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support.published_degradation import STATISTICS, compare, jpeg, photographs

from faithdiff_core.training.degradation import FIRST_PASS, DegradationConfig, _encoded, _noise, degrade, to_tensor
from faithdiff_core.training.jpeg import jpeg_transform
from faithdiff_core.training.kernels import KernelMix, draw_beta


@pytest.mark.parametrize("quality", [30.0, 60.0, 77.5, 95.0])
def test_the_jpeg_transform_is_the_published_one(quality: float) -> None:
    image = photographs(1, 90)[0]
    ours = jpeg_transform(torch.from_numpy(image).permute(2, 0, 1), quality).permute(1, 2, 0).numpy()
    # Rounding may fall either way where a coefficient lies between two steps.
    assert np.abs(ours - jpeg(image, quality)).mean() * 255 < 0.02


def test_an_encoder_keeps_less_colour_detail_than_the_published_jpeg() -> None:
    image = torch.from_numpy(photographs(1)[0]).permute(2, 0, 1).float()[:, ::2, ::2]

    def colour(x: torch.Tensor) -> float:
        return float((x - x.mean(0, keepdim=True)).diff(dim=2).std())

    assert colour(_encoded(image, 80)) < 0.8 * colour(jpeg_transform(image, 80.0))
    assert bool(torch.isfinite(jpeg_transform(image, 100.0)).all())


def test_noise_is_clipped_where_the_published_code_clips() -> None:
    black = Image.new("RGB", (128, 128))
    quiet = dataclasses.replace(
        FIRST_PASS,
        blur_probability=0.0,
        resize_weights=(0, 0, 1),
        gaussian_probability=1.0,
        gaussian_sigma=(10, 10),
        grey_probability=0.0,
        jpeg_quality=(100, 100),
    )
    config = DegradationConfig(scale=2, first=quiet, second=None, final_sinc_probability=0)
    means = []
    for clip in (True, False):
        chosen = dataclasses.replace(config, clip_noise=clip)
        lows = [degrade(black, chosen, np.random.default_rng(seed)) for seed in range(8)]
        means.append(np.mean([np.asarray(low, dtype=float) for low in lows]))
    # Half of the noise is cut away: its mean is sigma / sqrt(2 pi). Without clipping, reducing averages some of it out.
    assert means[0] == pytest.approx(10 / (2 * np.pi) ** 0.5, rel=0.1)
    assert means[1] < 0.85 * means[0]
    assert float(_noise(to_tensor(black), np.random.default_rng(0), quiet).min()) < 0


def test_half_of_the_plateaus_have_the_shape_one() -> None:
    rng = np.random.default_rng(0)
    mix = KernelMix()
    shapes = np.array([draw_beta(rng, mix.betap) for _ in range(2000)])
    assert 0.45 < (shapes == 1).mean() < 0.55
    assert shapes.mean() == pytest.approx(1.25, abs=0.03)
    assert (np.array([draw_beta(rng, mix.betap, split_at_one=False) for _ in range(200)]) != 1).all()


@pytest.mark.slow
def test_five_statistics_agree_with_the_published_process() -> None:
    from scipy.stats import ks_2samp

    columns = compare(200)
    for column, name in enumerate(STATISTICS):
        likeness = ks_2samp(columns["published"][:, column], columns["ours"][:, column]).pvalue
        assert likeness > 0.01, (name, likeness)
    colour = STATISTICS.index("colour gradient")
    assert ks_2samp(columns["published"][:, colour], columns["encoder"][:, colour]).pvalue < 1e-4
    assert columns["encoder"][:, colour].mean() < 0.85 * columns["published"][:, colour].mean()
