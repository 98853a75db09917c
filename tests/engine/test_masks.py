"""Only what is masked, in the engine: noise levels outside, work, and the composited image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import Golden
from torch import Tensor

from faithdiff_core import ImageError, SettingsError
from faithdiff_core.engine import SCHEDULERS, FaithDiffPipeline, TextConditioning, make_scheduler
from faithdiff_core.engine.kept import Kept
from faithdiff_core.engine.schedulers import fresh_scheduler, initial_latent
from faithdiff_core.images.masks import find_masks
from faithdiff_core.images.region import feathered, mask_for


@pytest.mark.parametrize("name", [*SCHEDULERS, "DDPMScheduler", "DEISMultistepScheduler"])
def test_what_stays_has_the_schedulers_noise(name: str) -> None:
    """At every step, by the scheduler's own forward process."""
    scheduler = fresh_scheduler(make_scheduler(name))
    scheduler.set_timesteps(6)
    z, noise = torch.randn((2, 1, 4, 6, 5), generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 3:] = 0.3
    start = initial_latent(scheduler, "lr", noise, z)
    kept = Kept.of(scheduler, start, z, mask)
    outside = (mask == 0).expand_as(z)
    assert torch.allclose(kept.put_back(start, scheduler, 0), start, rtol=1e-4, atol=1e-4)
    sampled = torch.full_like(z, 7.0)
    for step, t in enumerate(scheduler.timesteps):
        x = kept.put_back(sampled, scheduler, step)
        expected = scheduler.add_noise(z, kept.noise, t.view(1))
        assert torch.allclose(x[outside], expected[outside], rtol=2e-3, atol=2e-3), step
        assert (x[~outside] == 7.0).all()
    assert torch.equal(kept.finish(sampled)[outside], z[outside])


@pytest.mark.parametrize("grid", ["fixed", "moving"])
def test_tiles_outside_are_not_computed(pipeline: FaithDiffPipeline, golden: Golden, grid: str) -> None:
    """Inside, the result is that of a run whose mask touches all tiles, but keeps the same of them."""
    t = {name: golden.tensors[f"tiles_lr.{name}"] for name in ("lq_features", "noise", "lr_latent")}
    text = TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
    height, width = t["noise"].shape[-2:]
    mask = torch.zeros(1, 1, height, width)
    mask[..., : height // 4, : width // 4] = 1.0
    calls: dict[bool, int] = {}

    def run(everything: bool, **more: Any) -> Tensor:
        def progress(stage: str, done: int, total: int) -> None:
            calls[everything] = done
            assert done <= total

        return pipeline.sample(
            t["lq_features"],
            text,
            t["noise"],
            lq_latent=t["lr_latent"],
            mask=mask,
            steps=2,
            tile=64,
            overlap={"fixed": 0.5, "moving": 0.125}[grid],
            tile_grid=grid,
            generators=[torch.Generator().manual_seed(3)],
            progress=progress,
            **more,
        )

    masked = run(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "any", lambda self, *args, **kw: torch.tensor(True))
        whole = run(True)
    assert torch.equal(masked, whole)
    outside = (mask == 0).expand_as(masked)
    assert torch.equal(masked[outside], t["lr_latent"][outside])
    assert (masked - t["lr_latent"])[~outside].abs().mean() > 0.01
    assert calls[False] < calls[True] / 2


def test_images(pipeline: FaithDiffPipeline) -> None:
    """Two passes over a batch: outside the soft edge, the enlarged image; an image without a mask is not worked on."""
    images = torch.rand((2, 3, 40, 56), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 20, 28)
    mask[0, :, 10:, 14:] = 1.0
    settings: dict[str, Any] = {"scale": 1.0, "steps": 1, "tile": 64, "cfg": 1.0, "seed": 2, "feather": 4}
    result = pipeline(images, mask=mask, passes=2, **settings)
    assert result.shape == images.shape
    assert torch.equal(result[1], images[1])
    assert torch.equal(result[0, :, :12], images[0, :, :12])
    assert torch.equal(result[0, :, :, :20], images[0, :, :, :20])
    assert (result[0, :, 24:, 32:] - images[0, :, 24:, 32:]).abs().mean() > 0.01
    alone = pipeline(images[:1], mask=mask[:1], passes=2, **settings)
    assert torch.allclose(alone[0], result[0], atol=1e-5)
    with pytest.raises(SettingsError, match="one row for each image"):
        pipeline(images, mask=mask[:1], **settings)


def test_soft_edges() -> None:
    """Around a point: 1 there, falling, and exactly 0 from the width on."""
    mask = torch.zeros(1, 1, 41, 41)
    mask[..., 20, 20] = 1.0
    soft = feathered(mask, 8)[0, 0]
    assert soft[20, 20] == 1.0
    assert (soft[20, 20:].diff() <= 0).all()
    assert soft[20, 20 + 7] > 0
    assert not soft[20, 20 + 9 :].any()
    assert not soft[20 + 9 :].any()
    assert torch.equal(feathered(mask, 0), mask)
    assert mask_for(torch.ones(1, 1, 3, 4), 41, 41, 5).shape == (1, 1, 41, 41)
    with pytest.raises(ImageError, match="3 masks for 2 images"):
        mask_for(torch.ones(3, 1, 4, 4), 8, 8, 2)


def test_masks_of_a_folder(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for name in ("a/1.png", "b/1.png", "2.jpg"):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / name).touch()
    images = [tmp_path / "in" / name for name in ("a/1.jpg", "b/1.jpg", "c/2.png")]
    assert find_masks(images, masks) == {
        images[0]: masks / "a" / "1.png",
        images[1]: masks / "b" / "1.png",
        images[2]: masks / "2.jpg",
    }
    with pytest.raises(SettingsError, match="no image by the name 3"):
        find_masks([tmp_path / "3.png"], masks)
    with pytest.raises(SettingsError, match="mask of both"):
        find_masks([tmp_path / "d" / "2.png", tmp_path / "e" / "2.png"], masks)
    with pytest.raises(SettingsError, match="is one mask, but there are 3 images"):
        find_masks(images, masks / "2.jpg")
