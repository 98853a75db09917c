"""Only what is masked: tiles outside a noise mask are not computed, and nothing outside it changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from support.golden import Golden
from support.host_sampling import GivenNoise, Setup, gaussian, images, load, relative
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning

HEIGHT, WIDTH, TILE = 104, 152, 64
SIZE = (1, 4, HEIGHT // 8, WIDTH // 8)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def features(setup: Setup) -> Any:
    return setup.features(images(HEIGHT, WIDTH, seed=1))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """A soft mask in the corner of a few tiles."""
    mask = torch.zeros(1, 1, *SIZE[-2:])
    mask[..., 8:, 12:17] = 1.0
    mask[..., 8:, 17] = 0.5
    return mask


@pytest.fixture(scope="module")
def start() -> Tensor:
    return gaussian(*SIZE, seed=6)


class Calls:
    """U-Net calls that were counted."""

    rows = 0


@contextmanager
def counted(setup: Setup) -> Iterator[Calls]:
    """Count the rows that go through the U-Net."""
    calls, unet = Calls(), setup.model.model.diffusion_model

    def count(module: Any, args: tuple[Any, ...]) -> None:
        calls.rows += args[0].shape[0]

    hook = unet.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def everywhere(mask: Tensor) -> Tensor:
    """The same mask for sampling, but above 0 everywhere: so little that it changes nothing visible."""
    return mask.clamp_min(1e-30)


GRIDS = {"fixed": 0.5, "moving": 0.125}


@pytest.mark.parametrize(
    ("sampler", "grid"),
    [("euler", "fixed"), ("dpmpp_2m", "moving"), ("euler_cfg_pp", "fixed"), ("uni_pc", "moving"), ("ddpm", "moving")],
)
def test_inside_is_the_same_and_outside_is_given(
    setup: Setup, features: Any, mask: Tensor, start: Tensor, sampler: str, grid: str
) -> None:
    """Compared with a run that computes all tiles, for samplers of every kind."""
    settings = {"sampler_name": sampler, "tile_size": TILE, "overlap": GRIDS[grid], "tile_grid": grid, "steps": 2}
    settings |= {"scheduler": "normal", "tile_batch": 1}

    def run(noise_mask: Tensor) -> tuple[Tensor, int]:
        with counted(setup) as calls:
            latent = {"samples": start, "noise_mask": noise_mask}
            return setup.restore(features, latent_image=latent, **settings), calls.rows

    masked, rows = run(mask)
    whole, all_rows = run(everywhere(mask))
    inside = (mask > 0).expand_as(start)
    assert relative(masked[inside], whole[inside]) < 1e-6
    assert torch.equal(masked[~inside], start[~inside])
    assert relative(masked[inside], start[inside]) > 0.01
    assert 0 < rows < 0.7 * all_rows


def test_tiled_diffusion_in_two_runs(host: Host, setup: Setup, features: Any, mask: Tensor, start: Tensor) -> None:
    """KSampler, whole and split: noise that is left over is left everywhere, for the second run to take away."""
    positive, negative = setup.conditioned(features)
    model = setup.tiled(setup.model, TILE)
    common = {"model": model, "positive": positive, "negative": negative, "steps": 2, "cfg": 3.0}
    common |= {"sampler_name": "euler", "scheduler": "normal"}
    latent = {"samples": start, "noise_mask": mask}
    with counted(setup) as calls:
        whole = host.call("KSampler", seed=7, denoise=1.0, latent_image=latent, **common)[0]["samples"]
    inside = (mask > 0).expand_as(start)
    assert torch.equal(whole[~inside], start[~inside])
    assert calls.rows < 0.5 * 2 * 2 * 12
    advanced = {"noise_seed": 7, "start_at_step": 0, "end_at_step": 1, "add_noise": "enable"}
    left = host.call(
        "KSamplerAdvanced", latent_image=latent, return_with_leftover_noise="enable", **common, **advanced
    )[0]["samples"]
    assert relative(left[~inside], start[~inside]) > 0.1


def test_the_node_is_the_engine(host: Host, setup: Setup, tiny_sdxl: Path, golden: Golden, mask: Tensor) -> None:
    t = {name: golden.tensors[f"tiles_lr.{name}"] for name in ("lq_features", "noise", "lr_latent")}
    text = TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
    engine = FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    hard = torch.zeros(1, 1, *t["noise"].shape[-2:])
    hard[..., :9, :7] = 1.0
    settings: dict[str, Any] = {"steps": 3, "overlap": 0.5}
    expected = engine.sample(
        t["lq_features"], text, t["noise"], lq_latent=t["lr_latent"], mask=hard, tile=64, **settings
    )
    features = host.pack_module("nodes.bridge.graph_types").LQFeatures(t["lq_features"])
    latent = {"samples": t["lr_latent"] / SDXL.vae_scaling_factor, "noise_mask": hard}
    got = setup.restore(
        features, noise=GivenNoise(t["noise"]), latent_image=latent, start_point="lr", tile_size=64, **settings
    )
    assert relative(got * SDXL.vae_scaling_factor, expected) < 1e-4


def test_nothing_masked(setup: Setup, features: Any, start: Tensor) -> None:
    with counted(setup) as calls:
        latent = {"samples": start, "noise_mask": torch.zeros(1, 1, *SIZE[-2:])}
        result = setup.restore(features, latent_image=latent, tile_size=TILE)
    assert calls.rows == 0
    assert torch.equal(result, start)


def test_a_mask_for_each_image(setup: Setup, mask: Tensor, start: Tensor) -> None:
    """A tile is computed where any image's mask touches it."""
    features = setup.features(images(HEIGHT, WIDTH, 2, seed=2))
    masks, two = torch.cat([mask, mask.flip(-1)]), torch.cat([start, start.flip(-1)])
    noise = gaussian(2, *SIZE[1:], seed=4)
    settings = {"steps": 1, "tile_size": TILE, "tile_batch": 3}

    def run(rows: slice) -> Tensor:
        latent = {"samples": two[rows], "noise_mask": masks[rows]}
        given = type(features)(features.tensor[rows])
        return setup.restore(given, latent_image=latent, noise=GivenNoise(noise[rows]), **settings)

    both = run(slice(0, 2))
    for i in range(2):
        inside = (masks[i : i + 1] > 0).expand_as(start)
        assert relative(both[i : i + 1][inside], run(slice(i, i + 1))[inside]) < TOLERANCE
        assert torch.equal(both[i : i + 1][~inside], two[i : i + 1][~inside])


def test_guidance_over_the_whole_latent_sees_all_tiles(
    host: Host, setup: Setup, features: Any, mask: Tensor, start: Tensor
) -> None:
    """RescaleCFG takes a deviation over the latent: without all tiles the inside would change."""
    model = host.call("RescaleCFG", model=setup.model, multiplier=0.7)[0]

    def run(noise_mask: Tensor) -> tuple[Tensor, int]:
        with counted(setup) as calls:
            latent = {"samples": start, "noise_mask": noise_mask}
            return setup.restore(features, model=model, latent_image=latent, tile_size=TILE, steps=1), calls.rows

    (masked, rows), (whole, all_rows) = run(mask), run(everywhere(mask))
    inside = (mask > 0).expand_as(start)
    assert relative(masked[inside], whole[inside]) < 1e-6
    assert torch.equal(masked[~inside], start[~inside])
    assert rows == all_rows


def test_a_mask_that_grows(host: Host, setup: Setup, features: Any, start: Tensor) -> None:
    """Differential Diffusion changes ever more of the latent: tiles follow, and what changed is not put back."""
    model = host.call("DifferentialDiffusion", model=setup.model, strength=1.0)[0]
    gradient = torch.linspace(0, 1, SIZE[-1]).expand(1, 1, *SIZE[-2:])

    def run(noise_mask: Tensor, tile: int) -> tuple[Tensor, int]:
        with counted(setup) as calls:
            latent = {"samples": start, "noise_mask": noise_mask}
            return setup.restore(features, model=model, latent_image=latent, tile_size=tile, steps=4), calls.rows

    tiled, rows = run(gradient, TILE)
    assert 4 * 2 < rows < 4 * 2 * 12
    assert relative(tiled, start) > 0.01


def test_features_around_a_mask(host: Host, setup: Setup) -> None:
    """They are the usual ones as far as the margin; a sampler that needs others says so."""
    side, tile = 256, 64
    image = images(side, side, seed=3)
    mask = torch.zeros(1, side // 2, side // 2)  # drawn at another size
    mask[:, 96:, :24] = 1.0
    settings = {"faithdiff": setup.faithdiff, "pixels": image, "tile_size": tile, "overlap": 0.25}
    whole = host.call("FaithDiffLQEncode", **settings)[0]
    part = host.call("FaithDiffLQEncode", restore_mask=mask, mask_margin=tile, **settings)[0]
    assert whole.encoded is None
    assert part.encoded[24 - 8 :, : 6 + 8].all()
    assert not part.encoded[:8].any()
    assert torch.equal(part.tensor[..., part.encoded], whole.tensor[..., part.encoded])
    assert not part.tensor[..., :6, :].any()

    latent = {"samples": gaussian(1, 4, side // 8, side // 8), "noise_mask": mask.unsqueeze(0)}
    restored, expected = (
        setup.restore(features, latent_image=latent, tile_size=tile, steps=1) for features in (part, whole)
    )
    assert torch.equal(restored, expected)
    with pytest.raises(Exception, match="encoded around a mask only") as error:
        setup.restore(part, latent_image={"samples": latent["samples"]}, tile_size=tile, steps=1)
    assert "mask_margin" in str(error.value)
    with pytest.raises(Exception, match="encoded around a mask only"):
        setup.guided(
            setup.cfg_guider(setup.model, *setup.conditioned(part), 2.0),
            latent["samples"],
            {"samples": latent["samples"]},
            torch.tensor([2.0, 0.0]),
        )


def test_a_part_goes_back_into_its_image(host: Host) -> None:
    """Decode and finish: outside the soft edge nothing changes, inside is what the whole decode gives."""
    vae = host.call("TestVAE")[0]
    height, width = 72, 104
    image = images(height, width, 2, seed=5)
    mask = torch.zeros(2, height, width)
    mask[0, 32:48, 40:64] = 1.0
    latent = {"samples": gaussian(2, 4, height // 8, width // 8, seed=8)}
    settings = {"samples": latent, "vae": vae, "tile_size": 64, "overlap": 0.25}
    whole = host.call("FaithDiffTiledVAEDecode", **settings)[0]
    part = host.call("FaithDiffTiledVAEDecode", restore_mask=mask, original=image, feather=8, **settings)[0]
    assert torch.equal(part[0, 32:48, 40:64], whole[0, 32:48, 40:64])
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[24:56, 32:72] = False
    assert torch.equal(part[0, outside], image[0, outside])
    assert torch.equal(part[1], image[1])
    edge = part[0, 40, 32:40]  # between the two, and never further from the one than the pixel before
    share = (edge - image[0, 40, 32:40]) / (whole[0, 40, 32:40] - image[0, 40, 32:40])
    assert (share.mean(-1).diff() >= -1e-5).all()
    assert 0.0 <= float(share.min()) < 0.2 < 0.8 < float(share.max()) <= 1.0

    prepared, frame = host.call("FaithDiffPrepareImage", image=image, scale_by=1.0, longest_side=0, multiple=8)
    assert torch.equal(prepared, image)
    finished = host.call(
        "FaithDiffFinishImage", image=part, frame=frame, color_fix="adain", restore_mask=mask, feather=8
    )[0]
    assert torch.equal(finished[0, outside], image[0, outside])
    assert torch.equal(finished[1], image[1])
    # Colours are those of the masked part: by hand, of that part alone where the edge has no width.
    hard = host.call("FaithDiffFinishImage", image=whole, frame=frame, color_fix="adain", restore_mask=mask, feather=0)
    inside = hard[0][0, 32:48, 40:64].flatten(0, 1)
    original = image[0, 32:48, 40:64].flatten(0, 1)
    decoded = whole[0, 32:48, 40:64].flatten(0, 1)
    expected = (decoded - decoded.mean(0)) / (decoded.var(0) + 1e-5).sqrt() * (original.var(0) + 1e-5).sqrt()
    assert relative(inside, (expected + original.mean(0)).clamp(0, 1)) < TOLERANCE
    with pytest.raises(Exception, match="original is not connected"):
        host.call("FaithDiffTiledVAEDecode", restore_mask=mask, **settings)
    with pytest.raises(Exception, match="must be the image that the latents are of"):
        host.call("FaithDiffTiledVAEDecode", restore_mask=mask, original=image[:, :64], **settings)


def test_a_quarter_of_a_large_latent_is_a_third_of_the_work(host: Host) -> None:
    """4096 x 4096 px, tiles of 1024 with the published overlap, counted without a U-Net."""
    grid = host.pack_module("nodes.bridge.sampling_run").Tiling(1024, 0.5).grids(512, 512).at(1.0)
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., :256, 256:] = 1.0
    noise_mask = host.pack_module("nodes.bridge.noise_mask").NoiseMask(mask)
    guider = type("Guider", (sys.modules["comfy.samplers"].CFGGuider,), {})
    noise_mask.begin(object.__new__(guider), {})
    assert len(noise_mask.touched(grid.tiles, (512, 512))) / len(grid) <= 1 / 3
