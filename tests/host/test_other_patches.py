"""FaithDiff's tiles with patches, prompts and MODELs that take for granted what tiles or a plain MODEL break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_host import Host
from support.host_sampling import Setup, gaussian, images, load, relative
from torch import Tensor

from faithdiff_core.tiling.grid import Tile, TileGrid

HEIGHT, WIDTH, TILE = 64, 128, 64
TOLERANCE = 1e-5

Conds = tuple[Any, Any]


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def features(setup: Setup) -> Any:
    return setup.features(images(HEIGHT, WIDTH, seed=1))


@pytest.fixture(scope="module")
def settings_error(host: Host) -> type[Exception]:
    error: type[Exception] = host.pack_module("faithdiff_core.errors").SettingsError
    return error


def conds_for(setup: Setup, features: Any, tile: Tile | None = None) -> Conds:
    """The golden conditionings with the features and the size conditioning of a tile, or of the whole image."""
    if tile is None:
        return setup.conditioned(features)
    conds = setup.conditioned(type(features)(tile.crop(features.tensor)))
    sizes = {"height": HEIGHT, "width": WIDTH, "crop_h": tile.top, "crop_w": tile.left}
    sizes |= {"target_height": TILE, "target_width": TILE}
    return tuple([[entry[0], {**entry[1], **sizes}] for entry in cond] for cond in conds)  # type: ignore[return-value]


def sample(setup: Setup, model: Any, conds: Conds, noise: Tensor, steps: int = 1, cfg: float = 4.0) -> Tensor:
    sigmas = setup.host.call("BasicScheduler", model=model, scheduler="normal", steps=max(steps, 3), denoise=1.0)[0]
    sigmas = sigmas if steps >= 3 else torch.tensor([2.0, 0.0])
    guider = setup.cfg_guider(model, *conds, cfg)
    return setup.guided(guider, noise, {"samples": torch.zeros_like(noise)}, sigmas)


def noise_of(width: int = WIDTH, batch: int = 1) -> Tensor:
    return gaussian(batch, 4, HEIGHT // 8, width // 8, seed=5)


def by_hand(setup: Setup, features: Any, patched: Callable[[Any, Tile], Any], steps: int) -> Tensor:
    """Tiles that do not overlap, each sampled alone from beginning to end."""
    noise = noise_of()
    out = torch.zeros_like(noise)
    for tile in TileGrid(HEIGHT // 8, WIDTH // 8, TILE, 0.0).tiles:
        conds = conds_for(setup, features, tile)
        tile.crop(out).copy_(sample(setup, patched(setup.model, tile), conds, tile.crop(noise), steps))
    return out


def easy_cache(setup: Setup, model: Any) -> Any:
    kw = {"reuse_threshold": 1.0, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    return setup.host.call("EasyCache", model=model, **kw)[0]


def remembering(model: Any, make: Callable[[], Callable[..., Tensor]]) -> Any:
    """A MODEL with an output block patch that keeps something from call to call."""
    clone = model.clone()
    clone.set_model_input_block_patch(make())
    return clone


def in_a_dict() -> Callable[..., Tensor]:
    kept: dict[str, Tensor] = {}

    def patch(h: Tensor, options: dict[str, Any]) -> Tensor:
        if options["block"] != ("input", 1):
            return h
        before, kept["last"] = kept.get("last", h), h
        return h + 0.3 * before

    return patch


def in_a_variable() -> Callable[..., Tensor]:
    last = None

    def patch(h: Tensor, options: dict[str, Any]) -> Tensor:
        nonlocal last
        if options["block"] != ("input", 1):
            return h
        before, last = h if last is None else last, h
        return h + 0.3 * before

    return patch


class InAnObject:
    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def __call__(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        if options["block"] == ("input", 1):
            self.sums.append(h)
            h = h + 0.3 * self.sums[-2 if len(self.sums) > 1 else -1]
        return h


def test_easy_cache(setup: Setup, features: Any) -> None:
    """Every tile has the cache that it would have had alone, before or after the tiling node."""
    expected = by_hand(setup, features, lambda model, _: easy_cache(setup, model), 8)
    for batch in (1, 2):
        model = easy_cache(setup, setup.tiled(setup.model, TILE, 0.0, batch))
        assert relative(sample(setup, model, conds_for(setup, features), noise_of(), 8), expected) < TOLERANCE
    before = setup.tiled(easy_cache(setup, setup.host.call("TestModel")[0]), TILE, 0.0, 2)
    plain = (setup.positive, setup.negative)
    after = easy_cache(setup, setup.tiled(setup.host.call("TestModel")[0], TILE, 0.0, 2))
    assert torch.equal(*(sample(setup, model, plain, noise_of(), 8) for model in (before, after)))
    uncached = sample(setup, setup.tiled(setup.model, TILE, 0.0), conds_for(setup, features), noise_of(), 8)
    assert relative(uncached, expected) > 0.01  # steps were skipped


def test_groups_of_tiles_do_not_matter_to_easy_cache(setup: Setup) -> None:
    features = setup.features(images(HEIGHT, 104, seed=1))
    results = [
        sample(
            setup,
            easy_cache(setup, setup.tiled(setup.model, TILE, 0.5, batch)),
            setup.conditioned(features),
            noise_of(104),
            8,
        )
        for batch in (1, 2, 3)
    ]
    assert max(relative(result, results[0]) for result in results) < TOLERANCE


@pytest.mark.parametrize("make", [in_a_dict, in_a_variable, InAnObject])
def test_whatever_a_patch_keeps_belongs_to_its_tile(setup: Setup, features: Any, make: Any) -> None:
    expected = by_hand(setup, features, lambda model, _: remembering(model, make), 3)
    model = setup.tiled(remembering(setup.model, make), TILE, 0.0, 2)
    for _ in range(2):  # and nothing stays for the next run but what stays without tiles
        model = setup.tiled(remembering(setup.model, make), TILE, 0.0, 2)
        assert relative(sample(setup, model, conds_for(setup, features), noise_of(), 3), expected) < TOLERANCE


def test_what_guides_with_a_single_call_is_refused(setup: Setup, features: Any, settings_error: Any) -> None:
    guided = setup.host.call("SelfAttentionGuidance", model=setup.model, scale=1.0, blur_sigma=2.0)[0]
    conds = conds_for(setup, features)
    with pytest.raises(settings_error, match=r"Self-Attention Guidance.* sampled in 3 tiles.*tile_size"):
        sample(setup, setup.tiled(guided, TILE, 0.5), conds, noise_of())
    one = sample(setup, setup.tiled(guided, WIDTH), [setup.positive, setup.negative], noise_of())  # type: ignore[arg-type]
    assert one.isfinite().all()

    def attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        seen["map"] = q
        return q

    def guide(args: dict[str, Any]) -> Tensor:
        result: Tensor = args["denoised"] + seen["map"].mean()
        return result

    seen: dict[str, Tensor] = {}
    other = setup.model.clone()
    other.set_model_attn1_patch(lambda q, k, v, options: (attention(q, k, v, options), k, v))
    other.set_model_sampler_post_cfg_function(guide)
    with pytest.raises(settings_error, match="takes what it saw in one U-Net call"):
        sample(setup, setup.tiled(other, TILE, 0.5), conds, noise_of())


class Masked:
    """Holds a mask of the image as IP-Adapter's attention patch does, and fits it to what it sees."""

    def __init__(self, mask: Tensor) -> None:
        self.kwargs: list[dict[str, Any]] = [{"mask": mask, "weight": 2.0}]

    def __call__(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        if options["block"] != ("input", 1):
            return h
        mask: Any = self.kwargs[0]["mask"]
        fitted = torch.nn.functional.interpolate(mask[:, None], h.shape[-2:], mode="area")
        return h + self.kwargs[0]["weight"] * fitted


@pytest.mark.parametrize("batch", [1, 2])
def test_masks_that_patches_hold_follow_the_tile(setup: Setup, features: Any, batch: int) -> None:
    mask = torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))

    def masked(model: Any, mask: Tensor) -> Any:
        return remembering(model, lambda: Masked(mask))

    expected = by_hand(setup, features, lambda model, tile: masked(model, tile.crop(mask, 8)), 1)
    model = masked(setup.model, mask)
    result = sample(setup, setup.tiled(model, TILE, 0.0, batch), conds_for(setup, features), noise_of())
    assert relative(result, expected) < TOLERANCE
    held = model.model_options["transformer_options"]["patches"]["input_block_patch"][-1].kwargs[0]["mask"]
    assert held is mask


def test_gligen_boxes_move_with_tiles(host: Host) -> None:
    tile_conds = host.pack_module("nodes.bridge.tile_conds")
    box = ("position", "model", [("word", 4, 6, 2, 5), ("other", 2, 2, 0, 14)])
    moved = tile_conds._gligen_in_tile(box, Tile(0, 8, 8, 8))
    assert moved == ("position", "model", [("word", 4, 3, 2, 0), ("other", 2, 2, 0, 6)])
    assert tile_conds._gligen_in_tile(box, Tile(0, 0, 8, 4))[2] == []


def test_a_plain_model_cannot_ignore_the_image(setup: Setup, features: Any, settings_error: Any) -> None:
    plain = setup.host.call("TestModel")[0]
    merged = setup.host.call("ModelMergeSimple", model1=plain, model2=setup.model, ratio=0.5)[0]
    for model in (plain, merged, setup.tiled(plain, TILE)):
        with pytest.raises(settings_error, match="this MODEL has no alignment"):
            sample(setup, model, conds_for(setup, features), noise_of())
    assert sample(setup, plain, (setup.positive, setup.negative), noise_of()).isfinite().all()


def test_a_merged_checkpoint_is_the_users_own(host: Host, setup: Setup, features: Any) -> None:
    """(1 - s) * merged + s * FaithDiff's + LoRA, whatever was merged; 1 is FaithDiff's own weights."""
    models = host.testpack.models
    one, other = (host.call("TestModel", weights="other", seed=seed)[0] for seed in (4, 5))
    merged = host.call("ModelMergeSimple", model1=one, model2=other, ratio=0.25)[0]
    assert relative(load(host, model=merged).restore(features), setup.restore(features)) < TOLERANCE
    golden, a, b = models.golden_unet(), models.other_unet(4), models.other_unet(5)
    blended = {key: 0.4 * (0.25 * a[key] + 0.75 * b[key]) + 0.6 * golden[key] for key in golden}
    lora = {"seed": 9, "strength": 0.8}
    with_lora = load(host, model=host.call("TestLoRA", model=merged, **lora)[0], unet_strength=0.6)
    expected = load(host, model=host.call("TestLoRA", model=models.tiny_model(blended), **lora)[0], unet_strength=0.0)
    assert relative(with_lora.restore(features), expected.restore(features)) < TOLERANCE


def ranged(setup: Setup, conditioning: Any, start: float, end: float) -> Any:
    return setup.host.call("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)[0]


def test_a_schedule_of_prompts_can_switch_the_image_off(setup: Setup, features: Any) -> None:
    """First half with the image, second half a plain prompt: as two runs, one after the other."""
    positive, negative = conds_for(setup, features)
    combine = lambda a, b: setup.host.call("ConditioningCombine", conditioning_1=a, conditioning_2=b)[0]  # noqa: E731
    scheduled = combine(ranged(setup, positive, 0.0, 0.5), ranged(setup, setup.positive, 0.5, 1.0))
    sampling = setup.model.get_model_object("model_sampling")
    middle = float(sampling.percent_to_sigma(0.5))
    first, second = torch.tensor([8.0, 4.0, middle + 0.1]), torch.tensor([middle - 0.1, 0.5, 0.0])
    noise = noise_of()

    def run(conds: Conds, sigmas: Tensor, samples: Tensor) -> Tensor:
        return setup.guided(setup.cfg_guider(setup.model, *conds, 4.0), noise, {"samples": samples}, sigmas)

    zeros = torch.zeros_like(noise)
    plain = (setup.positive, setup.negative)
    for prompts in ((scheduled, negative), (scheduled, setup.negative)):
        assert torch.equal(run(prompts, first, zeros), run((positive, negative), first, zeros))
        assert torch.equal(run(prompts, second, zeros), run(plain, second, zeros))
    assert relative(run((positive, negative), second, zeros), run(plain, second, zeros)) > 0.01
    # Regions, which act at the same time, do not switch it off.
    both = combine(positive, setup.positive)
    everywhere = combine(positive, positive)
    assert torch.equal(run((both, negative), second, zeros), run((everywhere, negative), second, zeros))


def test_the_same_features_twice_are_one_image(setup: Setup, features: Any) -> None:
    """A schedule of two prompts with the image, and a negative that passed neither."""
    first, negative = conds_for(setup, features)
    second = conds_for(setup, features)[0]
    scheduled = [*ranged(setup, first, 0.0, 0.5), *ranged(setup, second, 0.5, 1.0)]
    expected = sample(setup, setup.model, (first, negative), noise_of())
    assert torch.equal(sample(setup, setup.model, (scheduled, setup.negative), noise_of()), expected)


def test_prompts_belong_to_images(setup: Setup) -> None:
    """Two prompts for three images: the same ones in every tile, however many tiles a call holds."""
    features = setup.features(images(HEIGHT, 104, batch=3, seed=1))
    other = [[torch.cat([entry[0], entry[0].flip(1)]), entry[1]] for entry in setup.positive]
    positive = setup.host.call(
        "FaithDiffConditioning",
        positive=other,
        negative=other,
        lq_features=features,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )[0]
    conds = (positive, setup.negative)
    one, two = (sample(setup, setup.tiled(setup.model, TILE, 0.5, n), conds, noise_of(104, 3)) for n in (1, 2))
    assert relative(two, one) < TOLERANCE


def test_another_tiler_is_named(setup: Setup, features: Any, settings_error: Any) -> None:
    conds = conds_for(setup, features)

    def halves(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        return torch.cat([apply(half, t, **c) for half in x.chunk(2, dim=3)], dim=3)

    model = setup.model.clone()
    model.set_model_unet_function_wrapper(halves)
    with pytest.raises(settings_error, match=r"128 x 64 pixels .* sees 64 x 64: another node cuts the latent"):
        sample(setup, model, conds, noise_of())
    with pytest.raises(settings_error, match=r"128 x 64 pixels, but the latent is one of 64 x 64.*Tiled Diffusion"):
        sample(setup, setup.model, conds, noise_of(64))


def test_nodes_that_cut_images_are_refused(
    setup: Setup, features: Any, settings_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detailer whose crop happens to have the size of the features."""
    import nodes

    class Detailer:
        FUNCTION = "detail"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {"required": {"image": ("IMAGE",), "model": ("MODEL",)}}

        def detail(self, conds: Conds) -> Tensor:
            return sample(setup, setup.model, conds, noise_of())

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestDetailer", Detailer)
    with pytest.raises(settings_error, match="TestDetailer makes latents of an image itself"):
        Detailer().detail(conds_for(setup, features))
    assert Detailer().detail((setup.positive, setup.negative)).isfinite().all()
