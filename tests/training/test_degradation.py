"""The degradation: kernels, ranges, determinism, workers, and the command."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from faithdiff_core.cli import degrade as command
from faithdiff_core.errors import ImageError, SettingsError
from faithdiff_core.training.degradation import (
    FIRST_PASS,
    SECOND_PASS,
    DegradationConfig,
    Pass,
    _draw_factor,
    _noise,
    degrade,
    filter_image,
    to_image,
    to_tensor,
)
from faithdiff_core.training.kernels import KernelMix, draw_beta, draw_kernel, gaussian_kernel, sinc_kernel
from faithdiff_core.training.yaml_config import build

PLAIN = Pass(0.0, 0.0, (0.2, 3.0), (1, 1), (0, 0, 1), 1.0, (0, 0), (0, 0), 0.0, (100, 100))
"""A pass that does next to nothing."""


@pytest.fixture(scope="module")
def image() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()[:160, 180:340])


def test_the_defaults_are_the_papers_table() -> None:
    config = DegradationConfig()
    first, second = config.first, config.second
    assert second is not None
    assert (first.blur_sigma, second.blur_sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert (first.sinc_probability, second.sinc_probability, config.final_sinc_probability) == (0.1, 0.1, 0.8)
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.5)
    assert (first.resize, second.resize) == ((0.3, 1.5), (0.6, 1.2))
    assert (first.resize_weights, second.resize_weights) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
    assert (first.gaussian_sigma, second.gaussian_sigma) == ((1, 15), (1, 12))
    assert (first.poisson_scale, second.poisson_scale) == ((0.05, 2.0), (0.05, 1.0))
    assert (first.grey_probability, second.grey_probability) == (0.4, 0.4)
    assert (first.gaussian_probability, second.gaussian_probability) == (0.5, 0.5)
    assert (first.jpeg_quality, second.jpeg_quality) == ((60, 95), (60, 100))
    assert config.scale == 4
    assert list(config.kernels.weights.values()) == [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
    assert (config.kernels.size, config.kernels.betag, config.kernels.betap) == ((7, 21), (0.5, 4.0), (1.0, 2.0))


def test_the_gaussian_kernel_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((21, 21))
    impulse[10, 10] = 1
    expected = gaussian_filter(impulse, 1.7, radius=10)
    assert np.allclose(gaussian_kernel(21, 1.7, 1.7, 0.3), expected, atol=1e-12)


def test_kernels_turn_and_widen_as_told() -> None:
    kernel = gaussian_kernel(21, 3.0, 1.0, math.pi / 2)
    axis = np.arange(21) - 10
    x, y = np.meshgrid(axis, axis)
    # The long axis points down after a quarter turn.
    assert (kernel * y**2).sum() == pytest.approx(9.0, rel=0.05)
    assert (kernel * x**2).sum() == pytest.approx(1.0, rel=0.05)
    flat = gaussian_kernel(21, 3.0, 3.0, 0.0, beta=2.0, plateau=True)
    assert flat[10, 11] / flat[10, 10] == pytest.approx(1 / (1 + (1 / 9) ** 2))
    heavy = gaussian_kernel(21, 2.0, 2.0, 0.0, beta=0.5)
    assert heavy[10, 14] / heavy[10, 10] == pytest.approx(math.exp(-0.5 * 2.0))


def test_the_sinc_filter_passes_low_and_stops_high_frequencies() -> None:
    cutoff = math.pi / 2
    response = np.abs(np.fft.fftshift(np.fft.fft2(np.pad(sinc_kernel(21, cutoff), 54))))
    centre = response.shape[0] // 2
    radians = 2 * math.pi * (np.arange(response.shape[0]) - centre) / response.shape[0]
    along = response[centre]
    assert np.allclose(along[np.abs(radians) < 0.5 * cutoff], 1, atol=0.1)
    assert np.all(along[np.abs(radians) > 1.5 * cutoff] < 0.1)
    assert sinc_kernel(21, cutoff).min() < 0  # it rings


def test_drawn_kernels_stay_in_their_ranges() -> None:
    rng = np.random.default_rng(0)
    mix = KernelMix()
    kernels = [draw_kernel(rng, mix, (0.2, 3.0), 0.1) for _ in range(300)]
    sides = {k.shape[0] for k in kernels}
    assert sides == {7, 9, 11, 13, 15, 17, 19, 21}
    assert all(k.sum() == pytest.approx(1) for k in kernels)
    with_ringing = sum(k.min() < 0 for k in kernels) / len(kernels)
    assert 0.05 < with_ringing < 0.16
    betas = np.array([draw_beta(rng, mix.betag) for _ in range(2000)])
    assert betas.min() >= 0.5
    assert betas.max() <= 4
    assert 0.45 < (betas < 1).mean() < 0.55
    factors = np.array([_draw_factor(rng, FIRST_PASS) for _ in range(3000)])
    assert factors.min() >= 0.3
    assert factors.max() <= 1.5
    assert (factors > 1).mean() == pytest.approx(0.2, abs=0.03)
    assert (factors == 1).mean() == pytest.approx(0.1, abs=0.03)


def test_filtering_equals_scipys() -> None:
    from scipy.ndimage import correlate

    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.random((3, 30, 40)))
    kernel = draw_kernel(rng, KernelMix(iso=0, aniso=1), (1, 3), 0)
    expected = np.stack([correlate(plane, kernel, mode="mirror") for plane in image.numpy()])
    assert np.allclose(filter_image(image, kernel).numpy(), expected, atol=1e-12)


def test_noise_has_the_strength_that_was_asked_for() -> None:
    grey = torch.full((3, 200, 200), 0.5)
    coloured = _noise(grey, np.random.default_rng(0), dataclasses.replace(PLAIN, gaussian_sigma=(10, 10))) - grey
    assert float(coloured.std()) * 255 == pytest.approx(10, rel=0.03)
    assert abs(float(torch.corrcoef(coloured.flatten(1))[0, 1])) < 0.03
    same = dataclasses.replace(PLAIN, gaussian_sigma=(10, 10), grey_probability=1.0)
    grey_noise = _noise(grey, np.random.default_rng(0), same) - grey
    assert torch.equal(grey_noise[0], grey_noise[1])
    ramp = torch.linspace(0, 1, 256).repeat(3, 400, 1)
    poisson = dataclasses.replace(PLAIN, gaussian_probability=0.0, poisson_scale=(1, 1))
    noise = _noise(ramp, np.random.default_rng(0), poisson) - ramp
    # 256 grey levels make 256 photons at white, so the variance is value / 256.
    assert float(noise[:, :, 192].var()) == pytest.approx(0.75 / 256, rel=0.15)
    assert float(noise[:, :, 0].abs().max()) < 1e-6


def test_the_same_seed_gives_the_same_image(image: Image.Image) -> None:
    results = [degrade(image, DegradationConfig(), np.random.default_rng(seed)).tobytes() for seed in (5, 5, 6)]
    assert results[0] == results[1] != results[2]


def test_sizes_round_up_and_the_image_stays_recognisable(image: Image.Image) -> None:
    odd = image.crop((0, 0, 157, 130))
    for seed in range(8):
        result = degrade(odd, DegradationConfig(), np.random.default_rng(seed))
        assert result.size == (40, 33)
        small = np.asarray(odd.resize(result.size, Image.Resampling.BOX), dtype=float).ravel()
        assert np.corrcoef(small, np.asarray(result, dtype=float).ravel())[0, 1] > 0.7


def test_nothing_happens_when_every_step_is_off(image: Image.Image) -> None:
    config = DegradationConfig(scale=1, first=PLAIN, second=None, final_sinc_probability=0)
    result = degrade(image, config, np.random.default_rng(0))
    # Only JPEG at quality 100 (with its reduced colour resolution) is left.
    difference = np.abs(np.asarray(result, dtype=int) - np.asarray(image, dtype=int))
    assert difference.mean() < 2.5
    rough = dataclasses.replace(PLAIN, jpeg_quality=(5, 5))
    worse = degrade(image, dataclasses.replace(config, first=rough), np.random.default_rng(0))
    assert np.abs(np.asarray(worse, dtype=int) - np.asarray(image, dtype=int)).mean() > 2 * difference.mean()


class _Degraded(Dataset[torch.Tensor]):
    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(degrade(self.image, DegradationConfig(), np.random.default_rng([7, index])))


def test_workers_make_the_same_samples_as_the_main_process(image: Image.Image) -> None:
    here = list(DataLoader(_Degraded(image), batch_size=2))
    there = list(DataLoader(_Degraded(image), batch_size=2, num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": 0}, "scale"),
        ({"first": {"jpeg_quality": [95, 60]}}, "first: jpeg_quality must be a range"),
        ({"first": {"blur_sigma": [float("nan"), 2]}}, "finite"),
        ({"kernels": {"size": [8, 20]}}, "odd"),
        ({"kernels": {"weight": 1}}, "unknown setting.*weight"),
        ({"final_sinc_probability": 1.5}, "probability"),
        ({"scale": "four"}, "whole number"),
    ],
)
def test_wrong_ranges_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        build(DegradationConfig, values)


@pytest.mark.parametrize("weights", [(float("nan"), 1.0, 1.0), (float("inf"), 1.0, 1.0), (-1.0, 1.0, 1.0), (0.0,) * 3])
def test_weights_that_are_no_weights_are_named(weights: tuple[float, float, float]) -> None:
    with pytest.raises(SettingsError, match="resize_weights must be three finite numbers"):
        dataclasses.replace(DegradationConfig().first, resize_weights=weights)


def test_one_range_of_a_pass_leaves_the_others_as_they_are() -> None:
    config = build(DegradationConfig, {"first": {"blur_sigma": [0.2, 2]}, "second": {"jpeg_quality": [30, 60]}})
    assert config.first == dataclasses.replace(FIRST_PASS, blur_sigma=(0.2, 2.0))
    assert config.second == dataclasses.replace(SECOND_PASS, jpeg_quality=(30, 60))


def test_an_image_too_small_for_the_scale_is_refused() -> None:
    with pytest.raises(ImageError, match="at least 32"):
        degrade(Image.new("RGB", (20, 100)), DegradationConfig(), np.random.default_rng(0))


def _command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_the_command_degrades_folders_and_files(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    image.save(tmp_path / "in" / "a.png")
    image.save(tmp_path / "in" / "deep" / "b.png")
    assert _command(str(tmp_path / "in"), "-o", str(tmp_path / "out")) == 0
    a, b = (Image.open(tmp_path / "out" / name) for name in ("a.png", "deep/b.png"))
    assert a.size == b.size == (40, 40)
    assert a.tobytes() != b.tobytes()
    # A file alone is drawn as it is in its folder.
    assert _command(str(tmp_path / "in" / "a.png"), "-o", str(tmp_path / "alone.png")) == 0
    assert Image.open(tmp_path / "alone.png").tobytes() == a.tobytes()
    config = tmp_path / "ranges.yaml"
    config.write_text("final_sinc_probability: 0\n")
    arguments = (
        str(tmp_path / "in" / "a.png"),
        "-o",
        str(tmp_path / "big.png"),
        "--config",
        str(config),
        "--scale",
        "2",
    )
    assert _command(*arguments, "--enlarge") == 0
    assert Image.open(tmp_path / "big.png").size == (160, 160)
    with pytest.raises(SettingsError, match="PNG"):
        _command(str(tmp_path / "in" / "a.png"), "-o", str(tmp_path / "a.jpg"))


def test_images_and_tensors_convert_both_ways(image: Image.Image) -> None:
    assert np.array_equal(np.asarray(to_image(to_tensor(image))), np.asarray(image))
