"""FaithDiff together with what people combine it with.

Tiled sampling is compared with the same done by hand: every tile is sampled on its own, without tiling, from its own
crop of everything (noise, latent, LQ features, hint, mask, area), and the results are merged with the published
weights.
One Euler step is linear in the predictions, so both must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import GOLDEN, Host
from safetensors.torch import load_file, save_file
from support.host_sampling import Setup, gaussian, images, load, relative, sized
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.tiling.grid import Tile, TileGrid
from faithdiff_core.tiling.moving import TileGrids

HEIGHT, WIDTH, TILE, OVERLAP = 104, 152, 64, 0.5
OVERLAPS = {"fixed": OVERLAP, "moving": 0.125}
SIGMAS = torch.tensor([2.0, 0.0])
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(params=list(OVERLAPS))
def grid(request: pytest.FixtureRequest) -> TileGrid:
    """The tiles of the only step, of a fixed and of a moving grid."""
    kind = request.param
    return TileGrids(HEIGHT // 8, WIDTH // 8, TILE, OVERLAPS[kind], kind, 0).at(float(SIGMAS[0]))


def tiled_model(setup: Setup, model: Any, grid: TileGrid, tile_batch: int = 3) -> Any:
    """A MODEL that samples in these tiles."""
    kind = next(kind for kind, overlap in OVERLAPS.items() if overlap == grid.overlap)
    return setup.tiled(model, TILE, grid.overlap, tile_batch, tile_grid=kind)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return images(HEIGHT, WIDTH, seed=1)


@pytest.fixture(scope="module")
def features(setup: Setup, image: Tensor) -> Any:
    return setup.features(image)


@pytest.fixture(scope="module")
def adapter_file(host: Host) -> str:
    """The golden file without its U-Net, in the host's model folder."""
    tensors = load_file(GOLDEN / "faithdiff_tiny.safetensors")
    prefixes = ("denoise_encoder.", "condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    name = "tiny_adapter.safetensors"
    save_file({k: v for k, v in tensors.items() if k.startswith(prefixes)}, host.base / "models" / "faithdiff" / name)
    return name


Conds = tuple[Any, Any]
ForTile = Callable[[Tile | None], Conds]
"""Makes positive and negative for a tile, or for the whole image where there is none."""


def sample(
    setup: Setup, model: Any, conds: Conds, noise: Tensor, latent: dict[str, Any], guider: Callable[..., Any] | None
) -> Tensor:
    make = guider or (lambda m, p, n: setup.cfg_guider(m, p, n, 4.0))
    return setup.guided(make(model, *conds), noise, latent, SIGMAS)


def compare(
    setup: Setup,
    grid: TileGrid,
    conds: ForTile,
    *,
    model: Any = None,
    guider: Callable[..., Any] | None = None,
    noise_mask: Tensor | None = None,
    start: Tensor | None = None,
    tile_batch: int = 3,
) -> float:
    """Tiled sampling against tiles by hand: the relative difference."""
    model = setup.model if model is None else model
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=5)
    start = torch.zeros_like(noise) if start is None else start

    def latent(tile: Tile | None) -> dict[str, Any]:
        samples = start if tile is None else tile.crop(start)
        out: dict[str, Any] = {"samples": samples}
        if noise_mask is not None:
            out["noise_mask"] = noise_mask if tile is None else tile.crop(noise_mask)
        return out

    tiled = sample(setup, tiled_model(setup, model, grid, tile_batch), conds(None), noise, latent(None), guider)
    by_hand = torch.zeros_like(tiled)
    assert len(grid) == (12 if grid.overlap == OVERLAP else 9)
    for tile in grid.tiles:
        result = sample(setup, model, conds(tile), tile.crop(noise), latent(tile), guider)
        tile.crop(by_hand).add_(result * grid.weights(tile))
    assert relative(by_hand, tiled.mean().expand_as(tiled)) > 0.01
    return relative(tiled, by_hand)


def tile_conds(setup: Setup, features: Any, tile: Tile | None, **kw: Any) -> Conds:
    """The golden conditionings with the features and the size conditioning of a tile."""
    if tile is not None:
        features = type(features)(tile.crop(features.tensor))
    conds = setup.conditioned(features, **kw)
    return (
        conds
        if tile is None
        else (sized(conds[0], tile, (HEIGHT, WIDTH), TILE), sized(conds[1], tile, (HEIGHT, WIDTH), TILE))
    )


def test_tiles(setup: Setup, features: Any, grid: TileGrid) -> None:
    assert compare(setup, grid, lambda tile: tile_conds(setup, features, tile)) < TOLERANCE


def test_cfg_1(setup: Setup, features: Any, grid: TileGrid) -> None:
    """One row: the negative prompt is left out."""

    def guider(model: Any, positive: Any, negative: Any) -> Any:
        return setup.cfg_guider(model, positive, negative, 1.0)

    def positive_only(model: Any, positive: Any, _: Any) -> Any:
        return setup.host.call("BasicGuider", model=model, conditioning=positive)[0]

    conds = lambda tile: tile_conds(setup, features, tile)  # noqa: E731
    assert compare(setup, grid, conds, guider=guider) < TOLERANCE
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}
    one, other = (sample(setup, setup.model, conds(None), noise, latent, g) for g in (guider, positive_only))
    assert relative(one, other) < TOLERANCE


def test_strength_and_range(setup: Setup, features: Any) -> None:
    """Strength 0 is the plain model to the bit; a range that is over acts as strength 0; half is something between."""
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}

    def run(model: Any, conds: Conds) -> Tensor:
        return sample(setup, model, conds, noise, latent, None)

    plain = run(setup.host.call("TestModel")[0], (setup.positive, setup.negative))
    assert torch.equal(run(setup.model, (setup.positive, setup.negative)), plain)
    assert torch.equal(run(setup.model, setup.conditioned(features, strength=0.0)), plain)
    assert torch.equal(run(setup.model, setup.conditioned(features, end_percent=0.1)), plain)
    assert torch.equal(run(setup.model, setup.conditioned(features, start_percent=0.99)), plain)
    full = run(setup.model, setup.conditioned(features))
    assert torch.equal(run(setup.model, setup.conditioned(features, start_percent=0.1, end_percent=0.99)), full)
    assert relative(full, plain) > 0.01
    half = run(setup.model, setup.conditioned(features, strength=0.5))
    assert relative(half, plain) > 0.001
    assert relative(half, full) > 0.001


def test_loras_keep_their_strength(host: Host, features: Any) -> None:
    """Before or after the loader, with any unet_strength: (1 - s) * own + s * FaithDiff's + LoRA, computed by hand."""
    strength, lora_strength, seed = 0.6, 0.8, 9
    models = host.testpack.models
    golden, own = models.golden_unet(), models.other_unet(4)
    blended = {key: (1 - strength) * own[key] + strength * golden[key] for key in own}
    lora = models.lora_state(seed)
    for name in {key.split(".")[0] for key in lora}:
        key = next(k for k in blended if "lora_unet_" + k.removesuffix(".weight").replace(".", "_") == name)
        up, down, alpha = (lora[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        blended[key] = blended[key] + lora_strength * float(alpha) / down.shape[0] * (up @ down)
    by_hand = load(host, model=models.tiny_model(blended), unet_strength=0.0)

    base = host.call("TestModel", weights="other", seed=4)[0]
    with_lora = host.call("TestLoRA", model=base, seed=seed, strength=lora_strength)[0]
    before = load(host, model=with_lora, unet_strength=strength)
    after = load(host, model=base, unet_strength=strength)
    after.model = host.call("TestLoRA", model=after.model, seed=seed, strength=lora_strength)[0]
    without = load(host, model=base, unet_strength=strength)

    expected = by_hand.restore(features, steps=2)
    assert relative(before.restore(features, steps=2), expected) < TOLERANCE
    assert relative(after.restore(features, steps=2), expected) < TOLERANCE
    assert relative(without.restore(features, steps=2), expected) > 1e-3
    # What was given stays as it was: the LoRA's own model has no more patches than before.
    assert (
        relative(load(host, model=with_lora, unet_strength=strength).restore(features, steps=2), expected) < TOLERANCE
    )


def test_lora(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    model = host.call("TestLoRA", model=setup.model, seed=9, strength=0.8)[0]
    assert compare(setup, grid, lambda tile: tile_conds(setup, features, tile), model=model) < TOLERANCE


def test_adapter_file_leaves_the_unet_alone(host: Host, setup: Setup, features: Any, adapter_file: str) -> None:
    base = host.call("TestModel", weights="other", seed=4)[0]
    adapter = load(host, adapter_file, model=base)
    none = load(host, model=base, unet_strength=0.0)
    assert torch.equal(adapter.restore(features), none.restore(features))
    assert relative(adapter.restore(features), setup.restore(features)) > 0.01


@pytest.mark.parametrize("chained", [False, True])
def test_controlnet(host: Host, setup: Setup, features: Any, grid: TileGrid, chained: bool) -> None:
    """Every tile gets its part of the hint. The hint is smaller than the image and of another shape."""
    hints = [images(HEIGHT, WIDTH, seed=20 + i) for i in range(2 if chained else 1)]
    controls = [host.call("TestControlNet", seed=i)[0] for i in range(len(hints))]

    def conds(tile: Tile | None) -> Conds:
        positive, negative = tile_conds(setup, features, tile)
        for control, hint in zip(controls, hints, strict=True):
            crop = hint if tile is None else tile.crop(hint.movedim(-1, 1), 8).movedim(1, -1)
            positive, negative = host.call(
                "ControlNetApplyAdvanced",
                positive=positive,
                negative=negative,
                control_net=control,
                image=crop,
                strength=0.7,
                start_percent=0.0,
                end_percent=1.0,
            )
        return positive, negative

    assert compare(setup, grid, conds) < TOLERANCE
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}
    with_control = sample(setup, setup.model, conds(None), noise, latent, None)
    without = sample(setup, setup.model, tile_conds(setup, features, None), noise, latent, None)
    assert relative(with_control, without) > 0.001


def test_controlnet_hint_of_another_size(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    """A hint of half the size is enlarged as a whole before it is cut, so tiles see what an untiled call would see."""
    half = images(HEIGHT // 2, WIDTH // 2, seed=22)
    enlarged = torch.nn.functional.interpolate(half.movedim(-1, 1), (HEIGHT, WIDTH), mode="nearest-exact").movedim(
        1, -1
    )
    control = host.call("TestControlNet", seed=1)[0]
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)

    def run(hint: Tensor) -> Tensor:
        positive, negative = setup.conditioned(features)
        positive, negative = host.call(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=control,
            image=hint,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        model = tiled_model(setup, setup.model, grid, 0)
        return sample(setup, model, (positive, negative), noise, {"samples": torch.zeros_like(noise)}, None)

    assert relative(run(half), run(enlarged)) < TOLERANCE
    assert control.cond_hint_original is None  # nothing of the run stays on the control


def test_mask(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    """Two prompts, each with half of a soft mask."""
    mask = torch.linspace(0, 1, WIDTH // 8).expand(1, HEIGHT // 8, -1) ** 2

    def conds(tile: Tile | None) -> Conds:
        positive, negative = tile_conds(setup, features, tile)
        other = [[entry[0].flip(1), dict(entry[1])] for entry in positive]
        crop = mask if tile is None else tile.crop(mask)
        parts = [
            host.call("ConditioningSetMask", conditioning=c, mask=m, strength=1.0, set_cond_area="default")[0]
            for c, m in ((positive, crop), (other, 1 - crop))
        ]
        return host.call("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])[0], negative

    assert compare(setup, grid, conds) < TOLERANCE


def test_noise_mask(setup: Setup, features: Any, grid: TileGrid) -> None:
    """Inpainting: what the mask leaves out comes back unchanged."""
    mask = (torch.rand(1, 1, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    start = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=6) / SDXL.vae_scaling_factor
    assert (
        compare(setup, grid, lambda tile: tile_conds(setup, features, tile), noise_mask=mask, start=start) < TOLERANCE
    )
    restored = setup.restore(
        features, start_point="lr", tile_size=TILE, latent_image={"samples": start, "noise_mask": mask}, steps=2
    )
    kept = (mask == 0).expand_as(restored)
    assert relative(restored[kept], start[kept]) < TOLERANCE
    assert relative(restored[~kept], start[~kept]) > 0.01


def test_two_regions(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    """Areas, which cross tiles: in a tile each is what of it lies there.

    The host softens an area's border only inside an image, so by hand the weights of the whole image are used: every
    area of a tile is predicted on its own, without tiling, and put together with the host's weights.
    """
    areas = [(HEIGHT // 8, 8, 0, 0), (HEIGHT // 8, WIDTH // 8 - 6, 0, 6)]  # height, width, top, left; they overlap

    def area_conds(which: int, tile: Tile | None) -> Conds:
        positive, negative = tile_conds(setup, features, tile)
        if which:
            positive = [[entry[0].flip(1), dict(entry[1])] for entry in positive]
        return positive, negative

    positives = []
    for which, (height, width, top, left) in enumerate(areas):
        positives.append(
            host.call(
                "ConditioningSetArea",
                conditioning=area_conds(which, None)[0],
                width=width * 8,
                height=height * 8,
                x=left * 8,
                y=top * 8,
                strength=1.0,
            )[0]
        )
    combined = host.call("ConditioningCombine", conditioning_1=positives[0], conditioning_2=positives[1])[0]
    negative = area_conds(0, None)[1]
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=5)
    model = tiled_model(setup, setup.model, grid, 4)
    tiled = sample(
        setup,
        model,
        (combined, negative),
        noise,
        {"samples": torch.zeros_like(noise)},
        lambda m, p, n: setup.cfg_guider(m, p, n, 1.0),
    )

    by_hand = torch.zeros_like(tiled)
    for tile in grid.tiles:
        total, weight = torch.zeros(1, 4, tile.height, tile.width), torch.zeros(1, 4, tile.height, tile.width)
        for which, (_, width, _, left) in enumerate(areas):
            first, last = max(left - tile.left, 0), min(left + width - tile.left, tile.width)
            if first >= last:
                continue
            part = Tile(tile.top, tile.left + first, tile.height, last - first)
            positive = [[e[0], {**e[1], "crop_w": tile.left}] for e in area_conds(which, part)[0]]
            result = sample(
                setup,
                setup.model,
                (positive, negative),
                part.crop(noise),
                {"samples": torch.zeros_like(part.crop(noise))},
                lambda m, p, n: setup.cfg_guider(m, p, n, 1.0),
            )
            soft = torch.ones_like(result)
            fade = min(8, soft.shape[3] // 4)
            for t in range(fade):
                if first > 0:
                    soft[..., t] *= (t + 1) / fade
                if last < tile.width:
                    soft[..., -1 - t] *= (t + 1) / fade
            total[..., first:last] += result * soft
            weight[..., first:last] += soft
        tile.crop(by_hand).add_(total / weight * grid.weights(tile))
    assert relative(tiled, by_hand) < TOLERANCE


def test_perp_neg(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    """Perpendicular guidance looks at the whole latent, so by hand it is computed from three merged predictions: each
    is made tile by tile without tiling.

    The empty prompt passes through no FaithDiffConditioning; it is about the same image as the others all the same.
    """
    empty = host.call("TestConditioning", which="random", seed=8)[0]
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}
    cfg, neg_scale = 4.0, 0.7

    def perp_neg(m: Any, p: Any, n: Any) -> Any:
        return host.call(
            "PerpNegGuider", model=m, positive=p, negative=n, empty_conditioning=empty, cfg=cfg, neg_scale=neg_scale
        )[0]

    def merged(conditioning: Callable[[Conds], Any]) -> Tensor:
        out = torch.zeros_like(noise)
        for tile in grid.tiles:
            part = conditioning(tile_conds(setup, features, tile))
            guider = host.call("BasicGuider", model=setup.model, conditioning=part)[0]
            x = tile.crop(noise)
            tile.crop(out).add_(setup.guided(guider, x, {"samples": torch.zeros_like(x)}, SIGMAS) * grid.weights(tile))
        return out

    model = tiled_model(setup, setup.model, grid)
    result = sample(setup, model, setup.conditioned(features), noise, latent, perp_neg)
    nothing = merged(lambda conds: [[empty[0][0], {**conds[0][0][1], **empty[0][1]}]])
    pos, neg = merged(lambda conds: conds[0]) - nothing, merged(lambda conds: conds[1]) - nothing
    perpendicular = neg - (neg * pos).sum() / (pos**2).sum() * pos
    assert relative(result, nothing + cfg * (pos - neg_scale * perpendicular)) < TOLERANCE


def test_perturbed_attention(host: Host, setup: Setup, features: Any, grid: TileGrid) -> None:
    model = host.call("PerturbedAttentionGuidance", model=setup.model, scale=3.0)[0]
    assert compare(setup, grid, lambda tile: tile_conds(setup, features, tile), model=model) < TOLERANCE
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}
    conds = tile_conds(setup, features, None)
    assert (
        relative(
            sample(setup, model, conds, noise, latent, None), sample(setup, setup.model, conds, noise, latent, None)
        )
        > 1e-3
    )


def test_different_features_for_two_prompts(setup: Setup, features: Any, image: Tensor) -> None:
    """Rows with LQ features of their own: each guidance half follows its own image."""
    other = setup.features(image.flip(1))
    positive = setup.conditioned(features)[0]
    negative = setup.conditioned(other, strength=0.5)[1]
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8)
    latent = {"samples": torch.zeros_like(noise)}

    def run(p: Any, n: Any, cfg: float) -> Tensor:
        return sample(setup, setup.model, (p, n), noise, latent, lambda m, a, b: setup.cfg_guider(m, a, b, cfg))

    both = run(positive, negative, 4.0)
    alone_positive = run(positive, positive, 1.0)
    alone_negative = run(negative, negative, 1.0)
    assert relative(both, alone_negative + 4.0 * (alone_positive - alone_negative)) < TOLERANCE


def test_layers_of_memory_do_not_matter(
    host: Host, setup: Setup, features: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory the host calls the U-Net once for each guidance half; the result is the same."""
    import comfy.model_patcher

    expected = setup.restore(features, tile_size=TILE)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    assert relative(setup.restore(features, tile_size=TILE), expected) < TOLERANCE


def test_loader_refuses_what_does_not_fit(host: Host, adapter_file: str, tmp_path: Path) -> None:
    errors = host.pack_module("faithdiff_core.errors")
    with pytest.raises(errors.WeightsError, match=r"FaithDiff Model Loader: .* no U-Net. Connect a MODEL to `model`"):
        host.call("FaithDiffModelLoader", faithdiff_name=adapter_file, weight_dtype="default")
    with pytest.raises(errors.WeightsError, match=r"FaithDiff Model Loader: .* in none of the model folders"):
        host.call("FaithDiffModelLoader", faithdiff_name="missing.safetensors", weight_dtype="default")
    with pytest.raises(errors.WeightsError, match="ComfyUI does not know a U-Net of these sizes"):
        host.call("FaithDiffModelLoader", faithdiff_name="faithdiff_tiny.safetensors", weight_dtype="default")
