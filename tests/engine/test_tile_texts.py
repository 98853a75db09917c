"""A text for each part of an image, in the engine: sampling equals tiles by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tile_texts import text_by_hand
from torch import Tensor

from faithdiff_core.backbone import tile_time_ids
from faithdiff_core.captions.tile_captions import TileCaptions, read_tile_captions
from faithdiff_core.captions.tile_texts import TileTexts
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning
from faithdiff_core.engine.attribution import Attribution
from faithdiff_core.errors import SettingsError
from faithdiff_core.tiling.layout import grid_layout
from faithdiff_core.tiling.moving import TileGrids

HEIGHT, WIDTH, TILE, MIX, SEED = 104, 152, 64, 0.6, 3
SIZE = (HEIGHT // 8, WIDTH // 8)
OVERLAPS = {"fixed": 0.5, "moving": 0.125}
LAYOUT = grid_layout(HEIGHT, WIDTH, 3, 2, overlap=0.2)


@pytest.fixture(scope="module")
def parts(text: TextConditioning) -> list[tuple[Tensor, Tensor]]:
    """Texts of the parts; one is twice as long, as a long prompt is."""
    generator = torch.Generator().manual_seed(0)
    assert text.pooled is not None
    lengths = (1, 1, 2, 1, 1, 1)
    return [
        (
            torch.randn((1, n * text.embeds.shape[1], text.embeds.shape[2]), generator=generator),
            torch.randn(text.pooled.shape, generator=generator),
        )
        for n in lengths
    ]


def told(text: TextConditioning, parts: list[tuple[Tensor, Tensor]], mix: float = MIX) -> TextConditioning:
    embeds, pooled = zip(*parts, strict=True)
    return replace(text, tiles=(TileTexts(LAYOUT, embeds, pooled, mix),))


def start(images: int = 1) -> tuple[Tensor, Tensor]:
    """LQ features and noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn((images, 64, *SIZE), generator=generator), torch.randn((images, 4, *SIZE), generator=generator)


def sample(pipeline: FaithDiffPipeline, text: TextConditioning, images: int = 1, **more: Any) -> Tensor:
    features, noise = start(images)
    settings: dict[str, Any] = {"steps": 1, "tile": TILE, "start": "noise", "cfg": 4.0} | more
    generators = [torch.Generator().manual_seed(SEED) for _ in range(images)]
    return pipeline.sample(features, text, noise, generators=generators, **settings)


@pytest.mark.parametrize(("grid_kind", "cfg"), [("fixed", 4.0), ("moving", 4.0), ("moving", 1.0)])
def test_tiles_by_hand(
    pipeline: FaithDiffPipeline, text: TextConditioning, parts: list[Any], grid_kind: str, cfg: float
) -> None:
    """One step of each tile with its own text in diffusers' U-Net, merged."""
    features, noise = start()
    scheduler = pipeline.base.scheduler
    scheduler.set_timesteps(1)
    sigma = float(scheduler.sigmas[0])
    grid = TileGrids(*SIZE, TILE, OVERLAPS[grid_kind], grid_kind, SEED).at(sigma)
    x = noise * (sigma**2 + 1) ** 0.5
    assert text.pooled is not None
    assert text.negative_embeds is not None
    assert text.negative_pooled is not None
    halves = {1.0: (text.embeds, text.pooled), 1 - cfg: (text.negative_embeds, text.negative_pooled)}
    expected = torch.zeros_like(noise)
    for tile in grid.tiles:
        halves[cfg] = text_by_hand(LAYOUT.boxes, parts, (text.embeds, text.pooled), tile, SIZE, MIX)
        ids = torch.tensor([tile_time_ids(*SIZE, tile.top, tile.left, TILE)], dtype=torch.float32)
        condition = pipeline.alignment.embed(tile.crop(features))
        hook = pipeline.base.unet.conv_in.register_forward_hook(
            lambda module, inputs, h, condition=condition: pipeline.alignment(h, condition)
        )
        with torch.no_grad():
            for factor in (cfg, *([1 - cfg] if cfg > 1 else [])):
                embeds, pooled = halves[factor]
                predicted = pipeline.base.unet(
                    scheduler.scale_model_input(tile.crop(x), scheduler.timesteps[0]),
                    scheduler.timesteps[0],
                    encoder_hidden_states=embeds,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
                ).sample
                grid.merge(expected, tile, predicted * factor)
            hook.remove()
    expected = x - sigma * expected  # Euler's only step
    for tile_batch in (1, 4):
        settings: dict[str, Any] = {
            "overlap": grid.overlap,
            "tile_batch": tile_batch,
            "tile_grid": grid_kind,
            "cfg": cfg,
        }
        got = sample(pipeline, told(text, parts), **settings)
        assert (got - expected).abs().max() / expected.abs().max() < 1e-5


def test_mix_0_and_one_tile_are_the_prompt(
    pipeline: FaithDiffPipeline, text: TextConditioning, parts: list[Any]
) -> None:
    """To the bit; and the parts' texts do something, in each image of a batch that has them."""
    plain = sample(pipeline, text, 2)
    assert torch.equal(sample(pipeline, told(text, parts, 0.0), 2), plain)
    whole = {"tile": 512}
    assert torch.equal(sample(pipeline, told(text, parts), **whole), sample(pipeline, text, **whole))
    own = told(text, parts).tiles
    assert own is not None
    mixed = sample(pipeline, replace(text, tiles=(None, *own)), 2)
    assert (mixed[0] - plain[0]).abs().max() < 1e-4 * plain.abs().max()
    assert (mixed[1] - plain[1]).abs().max() > 1e-3 * plain.abs().max()
    with pytest.raises(SettingsError, match="expected 1 or 2, one for each image, got 3"):
        sample(pipeline, replace(text, tiles=own * 3), 2)


def test_captions_of_parts(pipeline: FaithDiffPipeline) -> None:
    """A call with captions is a call of the stages with each text encoded by itself."""
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(2))
    long = "a very long text about the sky " * 20
    captions = TileCaptions(HEIGHT, WIDTH, grid_layout(HEIGHT, WIDTH, 2, 1), ("sky", long))
    settings: dict[str, Any] = {"scale": 1.0, "steps": 1, "cfg": 2.0, "tile": TILE}
    result = pipeline(image, prompt="a harbour", seed=SEED, tile_captions=captions, tile_mix=MIX, **settings)
    assert (result - pipeline(image, prompt="a harbour", seed=SEED, **settings)).abs().max() > 1e-3
    encoded = [pipeline.encode_text([each], guided=False) for each in captions.captions]
    tiles = TileTexts(captions.layout, tuple(e.embeds for e in encoded), tuple(e.pooled for e in encoded), MIX)
    whole = pipeline.encode_text(["a harbour"], [""])
    by_hand = pipeline(
        image,
        seed=SEED,
        prompt_embeds=whole.embeds,
        pooled_prompt_embeds=whole.pooled,
        negative_prompt_embeds=whole.negative_embeds,
        negative_pooled_prompt_embeds=whole.negative_pooled,
        tile_captions=captions,
        tile_mix=MIX,
        **settings,
    )
    assert torch.allclose(by_hand, result, atol=1e-5)
    got = pipeline.encode_tiles([None, captions], MIX)
    assert got[0] is None
    assert got[1] is not None
    for i in range(2):
        length = tiles.embeds[i].shape[1]
        assert torch.allclose(got[1].embeds[i][:, :length], tiles.embeds[i], atol=1e-5)
        mine, expected = got[1].pooled[i], tiles.pooled[i]
        assert mine is not None
        assert expected is not None
        assert torch.allclose(mine, expected, atol=1e-5)
    enlarged = pipeline(image[..., ::2, ::2], prompt="a harbour", tile_captions=[captions], **settings | {"scale": 2.0})
    assert enlarged.shape == image.shape


def test_captions_that_do_not_fit(pipeline: FaithDiffPipeline) -> None:
    image = torch.rand(2, 3, 32, 48)
    captions = TileCaptions(16, 24, grid_layout(16, 24, 2, 1), ("sky", "sea"))
    with pytest.raises(SettingsError, match="one entry for each image, 2, got 1"):
        pipeline(image, tile_captions=[captions])
    with pytest.raises(SettingsError, match="an image of 24 x 16 pixels; this one has 32 x 32"):
        pipeline(image[..., :32], tile_captions=captions)
    with pytest.raises(SettingsError, match="mix must lie between 0 and 1, got 2"):
        pipeline(image, tile_captions=captions, tile_mix=2.0)
    with pytest.raises(SettingsError, match="1 captions for 2 parts"):
        replace(captions, captions=("sky",))
    with pytest.raises(SettingsError, match="Leave one of the two out"):
        pipeline(image, prompt="sky", tile_captions=captions, attribution=Attribution("sky"))


def test_the_file() -> None:
    """What is written is read again, with a BOM too, and everything else is refused by name."""
    captions = TileCaptions(31, 47, grid_layout(31, 47, 3, 2, overlap=0.2), tuple("abcdef"))
    again = read_tile_captions(b"\xef\xbb\xbf" + captions.to_json(), "a.tiles.json")
    assert (again.height, again.width, again.captions) == (31, 47, captions.captions)
    assert again.to_json() == captions.to_json()
    assert again.layout.pixel_boxes(31, 47) == captions.layout.pixel_boxes(31, 47)
    tile = '{"left": 0, "top": 0, "width": 4, "height": 4, "caption": "a"}'
    for content, message in (
        (b"\xff{}", "not UTF-8"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected `height` in whole pixels, got None"),
        (b'{"width": 4, "height": 4}', "expected a list of tiles"),
        (b'{"width": 4, "height": true, "tiles": []}', "expected `height`"),
        (b'{"width": 4, "height": 4, "tiles": ["a"]}', "part 1: expected `top`"),
        (f'{{"width": 4, "height": 3, "tiles": [{tile}]}}'.encode(), "part 1 does not lie in the image of 4 x 3"),
        (f'{{"width": 4, "height": 5, "tiles": [{tile}]}}'.encode(), "the parts do not cover the image"),
        (f'{{"width": 4, "height": 4, "tiles": [{tile.replace("caption", "text")}]}}'.encode(), "part 1: expected a c"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_tile_captions(content, "a.tiles.json")
