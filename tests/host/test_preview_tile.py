"""One tile of a large image at full settings: what that tile is on its own, in the work of a tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_host import Host
from support.host_sampling import GivenNoise, gaussian, images, load, relative

from faithdiff_core.tiling.grid import TileGrid

HEIGHT, WIDTH, TILE = 104, 152, 64


@pytest.mark.parametrize("number", [0, 6])
def test_a_tile_by_itself(host: Host, number: int) -> None:
    """By hand: the tile alone, with its part of everything and its size conditioning, in an untiled run."""
    setup = load(host)
    features = setup.features(images(HEIGHT, WIDTH, seed=1))
    start, noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=6), gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=2)
    tile = TileGrid(HEIGHT // 8, WIDTH // 8, TILE, 0.5).tiles[number]
    settings: dict[str, Any] = {"steps": 2, "scheduler": "normal", "sampler_name": "dpmpp_2m"}
    rows = 0

    def count(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    hook = setup.model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        for grid in ("fixed", "moving"):
            got = setup.restore(
                features,
                noise=GivenNoise(noise),
                latent_image={"samples": start},
                start_point="lr",
                tile_size=TILE,
                tile_grid=grid,
                preview_tile=number,
                **settings,
            )
            # Where no tile size is given to ComfyUI, its size conditioning is the one that nodes set.
            sizes = {"height": HEIGHT, "width": WIDTH, "crop_h": tile.top, "crop_w": tile.left}
            sizes |= {"target_height": TILE, "target_width": TILE}
            inside = torch.zeros_like(start, dtype=torch.bool)
            tile.crop(inside).fill_(True)
            assert torch.equal(got[~inside], start[~inside])
    finally:
        hook.remove()
    assert rows == 2 * 2 * 2
    part = type(features)(tile.crop(features.tensor))
    positive, negative = (
        [[entry[0], {**entry[1], **sizes}] for entry in conditioning] for conditioning in setup.conditioned(part)
    )
    module = host.pack_module("nodes.bridge.restoration")
    sigmas = module.restoration_sigmas(setup.model, "normal", 2, 1.0)
    drawn = module._starting_noise(setup.model, module.StartPoint.LR, start, noise, sigmas)
    by_hand = setup.guided(
        setup.cfg_guider(setup.model, positive, negative, 5.0),
        tile.crop(drawn),
        {"samples": tile.crop(start)},
        sigmas,
        "dpmpp_2m",
    )
    assert relative(tile.crop(got), by_hand) < 1e-5


def test_what_it_needs(host: Host) -> None:
    setup = load(host)
    features = setup.features(images(HEIGHT, WIDTH, seed=1))
    start = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=6)
    with pytest.raises(Exception, match=r"from 0 to 11, got 12: there are 4 x 3 tiles"):
        setup.restore(features, latent_image={"samples": start}, tile_size=TILE, preview_tile=12)
    with pytest.raises(Exception, match="preview_tile needs latent_image"):
        setup.restore(features, tile_size=TILE, preview_tile=1)
    # A noise mask holds within the tile, too.
    mask = torch.zeros(1, 1, HEIGHT // 8, WIDTH // 8)
    mask[..., :4, :4] = 1.0
    settings: dict[str, Any] = {"tile_size": TILE, "preview_tile": 0, "steps": 1}
    result = setup.restore(features, latent_image={"samples": start, "noise_mask": mask}, **settings)
    inside = (mask > 0).expand_as(start)
    assert torch.equal(result[~inside], start[~inside])
    assert relative(result[inside], start[inside]) > 0.01
