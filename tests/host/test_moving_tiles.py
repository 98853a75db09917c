"""Moving tiles in ComfyUI: the engine's, and the same for every batch and for a run in two parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfy_host import Host
from support.host_sampling import GivenNoise, Setup, gaussian, images, load, relative

from faithdiff_core.backbone import SDXL
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning

if TYPE_CHECKING:
    from conftest import Golden

MOVING: dict[str, Any] = {"tile_size": 96, "overlap": 0.125, "tile_grid": "moving"}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


def test_nodes_are_the_engine(host: Host, setup: Setup, tiny_sdxl: Path, golden: Golden) -> None:
    t = {name.removeprefix("tiles_lr."): value for name, value in golden.tensors.items()}
    text = TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
    engine = FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    expected = engine.sample(
        t["lq_features"],
        text,
        t["noise"],
        lq_latent=t["lr_latent"],
        steps=3,
        tile=96,
        overlap=0.125,
        tile_grid="moving",
        generators=[torch.Generator().manual_seed(11)],
    )
    features = host.pack_module("nodes.bridge.graph_types").LQFeatures(t["lq_features"])
    latent = {"samples": t["lr_latent"] / SDXL.vae_scaling_factor}
    given = {"noise": GivenNoise(t["noise"], seed=11), "latent_image": latent, "start_point": "lr"}
    got = setup.restore(features, **given, **MOVING) * SDXL.vae_scaling_factor
    assert relative(got, expected) < 1e-4
    assert relative(setup.restore(features, **given, **MOVING | {"tile_grid": "fixed"}), got) > 0.01


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_batches_change_nothing(setup: Setup, sampler: str) -> None:
    features = setup.features(images(104, 152, 2))
    noise = gaussian(2, 4, 13, 19)
    settings = MOVING | {"sampler_name": sampler, "tile_size": 64}

    def restored(rows: slice, tile_batch: int) -> torch.Tensor:
        return setup.restore(
            type(features)(features.tensor[rows]), noise=GivenNoise(noise[rows], 3), tile_batch=tile_batch, **settings
        )

    together = restored(slice(0, 2), 1)
    assert relative(restored(slice(0, 2), 4), together) < TOLERANCE
    assert relative(restored(slice(1, 2), 2), together[1:]) < TOLERANCE


def test_a_split_run_is_the_whole_run(host: Host, setup: Setup) -> None:
    features = setup.features(images(104, 152))
    positive, negative = setup.conditioned(features)
    model = setup.tiled(setup.model, 64, 0.125, 3, tile_grid="moving")

    def run(start: int, end: int, latent: Any, **more: Any) -> Any:
        settings = {"add_noise": "enable", "return_with_leftover_noise": "disable"} | more
        return host.call(
            "KSamplerAdvanced",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            noise_seed=7,
            steps=4,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            start_at_step=start,
            end_at_step=end,
            **settings,
        )[0]

    empty = {"samples": torch.zeros(1, 4, 13, 19)}
    whole = run(0, 4, empty)["samples"]
    half = run(0, 2, empty, return_with_leftover_noise="enable")
    assert relative(run(2, 4, half, add_noise="disable")["samples"], whole) < TOLERANCE
