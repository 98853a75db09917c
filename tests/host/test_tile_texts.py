"""A text for each part of an image: sampling equals tiles by hand, each told its own mixture of texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from support.golden import Golden
from support.host_sampling import GivenNoise, Setup, gaussian, images, load, relative, sized
from support.tile_texts import text_by_hand
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.captions.tile_texts import TileTexts
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning
from faithdiff_core.tiling.grid import Tile, TileGrid
from faithdiff_core.tiling.layout import TileLayout
from faithdiff_core.tiling.moving import TileGrids

HEIGHT, WIDTH, TILE, MIX = 104, 152, 64, 0.6
OVERLAPS = {"fixed": 0.5, "moving": 0.125}
SIGMAS = torch.tensor([2.0, 0.0])
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def features(setup: Setup) -> Any:
    return setup.features(images(HEIGHT, WIDTH, seed=1))


@pytest.fixture(scope="module")
def layout(host: Host) -> Any:
    """Three columns and two rows that overlap, of an image of half the size."""
    crops, layout = host.call(
        "FaithDiffTileCaptions",
        image=images(HEIGHT // 2, WIDTH // 2),
        columns=3,
        rows=2,
        tile_size=0,
        overlap=0.2,
    )
    assert len(crops) == 6
    return layout


@pytest.fixture(scope="module")
def texts(host: Host) -> list[Any]:
    """Texts of the parts; one of them is twice as long, as a long prompt is."""
    parts = [host.call("TestConditioning", which="random", seed=20 + i)[0] for i in range(6)]
    longer = torch.cat([parts[2][0][0], parts[4][0][0].flip(1)], dim=1)
    parts[2] = [[longer, parts[2][0][1]]]
    return parts


def told(host: Host, layout: Any, texts: list[Any], whole: Any, mix: float = MIX) -> Any:
    """The CONDITIONING of FaithDiff Tile Conditioning."""
    return host.call("FaithDiffTileConditioning", layout=[layout], conditionings=texts, whole=[whole], mix=[mix])[0]


def by_hand(layout: Any, texts: list[Any], whole: Any, tile: Tile, mix: float = MIX) -> Any:
    """The CONDITIONING of a tile."""
    text, *parts = [(each[0][0], each[0][1]["pooled_output"]) for each in (whole, *texts)]
    embeds, pooled = text_by_hand(layout.boxes, parts, text, tile, (HEIGHT // 8, WIDTH // 8), mix)
    return [[embeds, {**whole[0][1], "pooled_output": pooled}]]


def with_extras(host: Host, setup: Setup, what: str, positive: Any, negative: Any, tile: Tile | None) -> Any:
    """A ControlNet on both conditionings, where it is asked for."""
    if "controlnet" in what:
        hint = images(HEIGHT, WIDTH, seed=22)
        hint = hint if tile is None else tile.crop(hint.movedim(-1, 1), 8).movedim(1, -1)
        settings = {"strength": 0.7, "start_percent": 0.0, "end_percent": 1.0, "image": hint}
        settings["control_net"] = host.call("TestControlNet", seed=1)[0]
        return host.call("ControlNetApplyAdvanced", positive=positive, negative=negative, **settings)
    return positive, negative


@pytest.mark.parametrize(
    ("grid_kind", "extra", "cfg"),
    [
        ("fixed", "controlnet and lora", 4.0),
        ("moving", "controlnet and lora", 4.0),
        ("fixed", "", 1.0),
        ("moving", "negative", 3.0),
    ],
)
def test_tiles_by_hand(
    host: Host, setup: Setup, features: Any, layout: Any, texts: list[Any], grid_kind: str, extra: str, cfg: float
) -> None:
    """Fixed and moving, both guidance halves or one, a ControlNet, a LoRA, and a negative with texts of its own."""
    grid: TileGrid = TileGrids(HEIGHT // 8, WIDTH // 8, TILE, OVERLAPS[grid_kind], grid_kind, 0).at(float(SIGMAS[0]))
    noise = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=5)
    model = setup.model
    if "lora" in extra:
        model = host.call("TestLoRA", model=model, seed=9, strength=0.8)[0]
    own_negative = list(reversed(texts)) if extra == "negative" else None

    def conds(tile: Tile | None) -> Any:
        if tile is None:
            positive, negative = told(host, layout, texts, setup.positive), setup.negative
            if own_negative:
                negative = told(host, layout, own_negative, negative)
            part = features
        else:
            positive, negative = by_hand(layout, texts, setup.positive, tile), setup.negative
            if own_negative:
                negative = by_hand(layout, own_negative, negative, tile)
            positive, negative = (
                sized(positive, tile, (HEIGHT, WIDTH), TILE),
                sized(negative, tile, (HEIGHT, WIDTH), TILE),
            )
            part = type(features)(tile.crop(features.tensor))
        settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lq_features": part}
        both = host.call("FaithDiffConditioning", positive=positive, negative=negative, **settings)
        return with_extras(host, setup, extra, both[0], both[1], tile)

    def sample(used: Any, tile: Tile | None) -> Tensor:
        x = noise if tile is None else tile.crop(noise)
        positive, negative = conds(tile)
        guider = setup.cfg_guider(used, positive, negative, cfg)
        return setup.guided(guider, x, {"samples": torch.zeros_like(x)}, SIGMAS)

    expected = torch.zeros_like(noise)
    for tile in grid.tiles:
        tile.crop(expected).add_(sample(model, tile) * grid.weights(tile))
    for tile_batch in (1, 4):
        tiled = setup.tiled(model, TILE, grid.overlap, tile_batch, tile_grid=grid_kind)
        assert relative(sample(tiled, None), expected) < TOLERANCE


@pytest.mark.parametrize("grid_kind", ["fixed", "moving"])
def test_the_node_is_the_engine(
    host: Host, setup: Setup, layout: Any, texts: list[Any], tiny_sdxl: Path, golden: Golden, grid_kind: str
) -> None:
    t = {name: golden.tensors[f"tiles_lr.{name}"] for name in ("lq_features", "noise", "lr_latent")}
    text = TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
    embeds, pooled = zip(*((each[0][0], each[0][1]["pooled_output"]) for each in texts), strict=True)
    told_engine = replace(text, tiles=(TileTexts(TileLayout(layout.boxes), embeds, pooled, MIX),))
    engine = FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    settings: dict[str, Any] = {"steps": 2, "overlap": OVERLAPS[grid_kind], "tile_grid": grid_kind, "tile_batch": 2}
    given: dict[str, Any] = {
        "lq_latent": t["lr_latent"],
        "generators": [torch.Generator().manual_seed(5)],
        "tile": TILE,
    }
    expected = engine.sample(t["lq_features"], told_engine, t["noise"], **given, **settings)
    features = host.pack_module("nodes.bridge.graph_types").LQFeatures(t["lq_features"])
    latent = {"samples": t["lr_latent"] / SDXL.vae_scaling_factor}
    settings |= {"noise": GivenNoise(t["noise"], 5), "latent_image": latent, "start_point": "lr", "tile_size": TILE}
    got = setup.restore(features, positive=told(host, layout, texts, setup.positive), **settings)
    plain = setup.restore(features, **settings)
    assert relative(got * SDXL.vae_scaling_factor, expected) < TOLERANCE
    assert relative(plain, got) > 100 * TOLERANCE


def test_mix_0_untiled_and_zeroed_out_are_the_whole_images(
    host: Host, setup: Setup, features: Any, layout: Any, texts: list[Any]
) -> None:
    """To the bit; and the parts' texts do something."""
    settings: dict[str, Any] = {"steps": 1, "tile_size": TILE, "tile_batch": 3}
    plain = setup.restore(features, **settings)
    mixed = setup.restore(features, positive=told(host, layout, texts, setup.positive), **settings)
    assert relative(mixed, plain) > 1e-3
    zero = told(host, layout, texts, setup.positive, 0.0)
    assert torch.equal(setup.restore(features, positive=zero, **settings), plain)
    whole = setup.restore(features, steps=1)
    assert torch.equal(setup.restore(features, positive=told(host, layout, texts, setup.positive), steps=1), whole)
    out = host.call("ConditioningZeroOut", conditioning=told(host, layout, texts, setup.negative))[0]
    expected = host.call("ConditioningZeroOut", conditioning=setup.negative)[0]
    assert torch.equal(
        setup.restore(features, negative=out, **settings), setup.restore(features, negative=expected, **settings)
    )


def test_a_batch_of_images(host: Host, setup: Setup, layout: Any, texts: list[Any]) -> None:
    """The rows of a call are told their tile's text, whatever the image."""
    two = setup.features(images(HEIGHT, WIDTH, 2, seed=3))
    noise = gaussian(2, 4, HEIGHT // 8, WIDTH // 8, seed=4)
    positive = told(host, layout, texts, setup.positive)

    def run(rows: slice, tile_batch: int) -> Tensor:
        part = type(two)(two.tensor[rows])
        told_both = setup.host.call(
            "FaithDiffConditioning",
            positive=positive,
            negative=setup.negative,
            lq_features=part,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        x = noise[rows]
        model = setup.tiled(setup.model, TILE, 0.5, tile_batch)
        guider = setup.cfg_guider(model, told_both[0], told_both[1], 3.0)
        return setup.guided(guider, x, {"samples": torch.zeros_like(x)}, SIGMAS)

    both = run(slice(0, 2), 5)
    for i in range(2):
        assert relative(run(slice(i, i + 1), 1), both[i : i + 1]) < TOLERANCE


def test_parts_and_texts_that_do_not_go_together(host: Host, setup: Setup, layout: Any, texts: list[Any]) -> None:
    for parts, message in (
        (texts[:5], "5 conditionings for the 6 parts"),
        ([*texts[:5], [*texts[5], *texts[5]]], "part 6 has 2 entries"),
        ([*texts[:5], [[texts[5][0][0], {"mask": torch.ones(1, 4, 4)}]]], "carries `mask`"),
        ([[[texts[0][0][0][..., :8], {}]], *texts[1:]], "part 1 has the shape"),
    ):
        with pytest.raises(Exception, match=message):
            told(host, layout, parts, setup.positive)
    with pytest.raises(Exception, match="got a batch of 2"):
        host.call("FaithDiffTileCaptions", image=images(64, 64, 2), columns=2, rows=1, tile_size=0, overlap=0.0)
    recorded = host.call("FaithDiffAttributionRecord", model=setup.model, prompt="positive", max_memory=64)[0]
    features = setup.features(images(HEIGHT, WIDTH, seed=1))
    positive = told(host, layout, texts, setup.positive)
    with pytest.raises(Exception, match="each tile gets another text"):
        setup.restore(features, model=recorded, positive=positive, tile_size=TILE)
    with pytest.raises(Exception, match="layout: expected the layout from FaithDiff Tile Captions"):
        told(host, None, texts, setup.positive)
