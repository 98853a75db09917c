"""Moving tiles in the engine: what must not change their result, and that they act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden import Golden
from torch import Tensor

from faithdiff_core.engine import FaithDiffPipeline, TextConditioning, make_scheduler
from faithdiff_core.engine.schedulers import fresh_scheduler, noise_level
from faithdiff_core.sampling.schedule import leading_timesteps, sampling_sigmas
from faithdiff_core.tiling.moving import TileGrids


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def sample(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning, seeds: list[int], tile_batch: int, **more: Any
) -> Tensor:
    """Latents of 25 x 33 with 9 tiles each; the seeds choose the images, too."""
    t = golden.tensors

    def images(name: str) -> Tensor:
        return torch.cat([t[f"tiles_lr.{name}"].roll(seed, -1) for seed in seeds])

    return pipeline.sample(
        images("lq_features"),
        text,
        images("noise"),
        lq_latent=images("lr_latent"),
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        **{"steps": 2, "tile": 96, "overlap": 0.125, "tile_batch": tile_batch, "tile_grid": "moving", **more},
    )


def test_batches_change_nothing(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning) -> None:
    """Neither tiles in a call nor other images: an image's tiles follow its own seed."""
    apart = torch.cat([sample(pipeline, golden, text, [seed], 1) for seed in (0, 1)])
    assert difference(sample(pipeline, golden, text, [0, 1], 5), apart) < 1e-5
    assert difference(sample(pipeline, golden, text, [1, 0], 100), apart.flip(0)) < 1e-5


def test_tiles_lie_where_the_grids_say(pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning) -> None:
    seen: list[list[int]] = []
    handle = pipeline.base.unet.register_forward_hook(
        lambda _m, _a, kwargs, _o: seen.append(kwargs["added_cond_kwargs"]["time_ids"][0, 2:4].int().tolist()),
        with_kwargs=True,
    )
    try:
        sample(pipeline, golden, text, [4], 1, steps=2, cfg=1)
    finally:
        handle.remove()
    grids = TileGrids(25, 33, 96, 0.125, "moving", 4)
    expected = [[tile.top, tile.left] for sigma in sampling_sigmas(2)[:2] for tile in grids.at(float(sigma)).tiles]
    assert seen == expected
    assert seen[: len(grids)] != seen[len(grids) :]


def test_conditions_of_moved_tiles_are_forgotten(
    pipeline: FaithDiffPipeline, golden: Golden, text: TextConditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps fit into a budget of one: nothing stays of the first."""
    expected = sample(pipeline, golden, text, [0], 4)
    monkeypatch.setattr(pipeline, "condition_budget", 16 * 32 * 12 * 12 * 4)
    pipeline.base.scheduler = make_scheduler("heun")  # asks twice at the second noise level
    calls: list[int] = []
    handle = pipeline.alignment.condition_embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        sample(pipeline, golden, text, [0], 4)
        grids = TileGrids(25, 33, 96, 0.125, "moving", 0)
        assert len(calls) == 2 * len(grids)
    finally:
        handle.remove()
        pipeline.base.scheduler = make_scheduler()
    assert torch.equal(sample(pipeline, golden, text, [0], 4), expected)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m", "heun"])
def test_every_scheduler_has_the_same_noise_levels(name: str) -> None:
    scheduler = fresh_scheduler(make_scheduler(name))
    scheduler.set_timesteps(20)
    levels = sorted({noise_level(scheduler, t) for t in scheduler.timesteps}, reverse=True)
    expected = {int(t): float(s) for t, s in zip(leading_timesteps(20), sampling_sigmas(20), strict=False)}
    shared = [t for t in scheduler.timesteps if int(t) in expected]
    assert len(shared) > 15 or name == "dpmpp_2m"
    for t in shared:
        assert noise_level(scheduler, t) == pytest.approx(expected[int(t)], rel=1e-5)
    assert levels == sorted(levels, reverse=True)
    between = noise_level(scheduler, torch.tensor(100.5))
    assert noise_level(scheduler, torch.tensor(100)) < between < noise_level(scheduler, torch.tensor(101))
