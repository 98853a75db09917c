"""Attribution in the engine: against diffusers' plain attention, and a planted case."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.attention import queries_of
from support.golden import Golden
from torch import Tensor

from faithdiff_core.attribution.overlay import image_maps, overlay
from faithdiff_core.cli import main
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.engine.attribution import Attribution
from faithdiff_core.errors import SettingsError
from faithdiff_core.tiling.grid import TileGrid

PROMPT = "a house with a red window and long hair"


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path, golden: Golden) -> FaithDiffPipeline:
    return FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")


class PlainAttention:
    """Diffusers' plain attention processor, which keeps the probabilities of one layer's calls."""

    def __init__(self, kept: list[Tensor], sizes: list[int], replaced: Any) -> None:
        self.kept, self.sizes, self.replaced = kept, sizes, replaced

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key)
        self.kept.append(probabilities.unflatten(0, (hidden_states.shape[0], attn.heads)))
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def plain(unet: Any) -> Iterator[list[Tensor]]:
    """The probabilities of all cross-attention calls, (rows, heads, queries, tokens), in order."""
    kept: list[Tensor] = []
    before = dict(unet.attn_processors)
    processors = {name: PlainAttention(kept, [], old) if ".attn2." in name else old for name, old in before.items()}
    unet.set_attn_processor(processors)
    try:
        yield kept
    finally:
        unet.set_attn_processor(before)


@pytest.fixture
def sharp(pipeline: FaithDiffPipeline) -> Iterator[None]:
    """Queries times 8: a tiny random model's attention is so even that no enlarged map is negative anywhere."""
    with queries_of(pipeline.base.unet, 8.0):
        yield


def naive(
    layers: list[Tensor], row: int, positions: list[int], size: tuple[int, int], *, clamped: bool = True
) -> Tensor:
    """The definition for one row of one U-Net call: every layer, head and token enlarged and clamped by itself."""
    maps = []
    for layer in layers:
        queries = layer.shape[2]
        height, width = next(
            (-(-size[0] // f), -(-size[1] // f)) for f in (1, 2, 4) if -(-size[0] // f) * -(-size[1] // f) == queries
        )
        for head in layer[row]:
            one = head.T[positions].unflatten(1, (height, width))
            enlarged = F.interpolate(one[:, None], size, mode="bicubic")[:, 0]
            maps.append((enlarged.clamp(min=0) if clamped else enlarged).mean(0))
    return torch.stack(maps).mean(0)


def _positions(pipeline: FaithDiffPipeline, before: str, word: str) -> list[int]:
    """Where a word's tokens are, by the length of what stands before it."""
    first, length = (len(pipeline.base.tokenizer(text, add_special_tokens=False).input_ids) for text in (before, word))
    return list(range(1 + first, 1 + first + length))


def _images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("sharp")
def test_maps_equal_those_of_plain_attention(pipeline: FaithDiffPipeline) -> None:
    """Two images and prompts, guidance, two steps; one tile."""
    attribution = Attribution("window")
    prompts = [PROMPT, "the window"]
    images = _images(2, 72, 88)
    options: dict[str, Any] = {"scale": 1.0, "steps": 2, "cfg": 3.0, "seed": 5, "tile": 128}
    restored = pipeline(images, prompt=prompts, attribution=attribution, **options)
    with plain(pipeline.base.unet) as layers:
        again = pipeline(images, prompt=prompts, **options)
    assert torch.allclose(restored, again, atol=1e-5)
    per_call = len(layers) // 4  # tile_batch 1: a call for each image in each step
    for image, before in enumerate(["a house with a red", "the"]):
        positions = _positions(pipeline, before, "window")
        calls = [layers[(2 * step + image) * per_call :][:per_call] for step in range(2)]

        def mean(row: int, positions: list[int] = positions, calls: Any = calls, **kind: Any) -> Tensor:
            return torch.stack([naive(call, row, positions, (9, 11), **kind) for call in calls]).mean(0)

        got, expected = attribution.maps[image][0], mean(1)  # row 0 is the negative half's
        assert (got - expected).abs().max() < 1e-4 * expected.max()
        for other in (mean(0), mean(1, clamped=False).clamp(min=0)):
            assert (got - other).abs().max() > 1e-3 * expected.max()


@pytest.mark.usefixtures("sharp")
@pytest.mark.parametrize("kind", ["fixed", "moving"])
def test_tiles_are_merged_with_their_weights(pipeline: FaithDiffPipeline, kind: str) -> None:
    """Tiles by hand: each call's plain maps, merged with the published weights."""
    options: dict[str, Any] = {
        "scale": 1.0,
        "steps": 2,
        "cfg": 2.0,
        "seed": 3,
        "tile": 64,
        "overlap": 0.25,
        "tile_batch": 2,
    }
    attribution = Attribution("hair")
    image = _images(1, 72, 136)
    grids: list[TileGrid] = []
    original = TileGrid.__init__
    pipeline(image, prompt=PROMPT, attribution=attribution, tile_grid=kind, **options)
    with plain(pipeline.base.unet) as layers, pytest.MonkeyPatch.context() as patch:

        def remembered(self: TileGrid, *args: Any, **more: Any) -> None:
            original(self, *args, **more)
            grids.append(self)

        patch.setattr(TileGrid, "__init__", remembered)
        pipeline(image, prompt=PROMPT, tile_grid=kind, **options)
    positions = _positions(pipeline, PROMPT.removesuffix("hair"), "hair")
    steps = [grids[-1]] * 2 if kind == "fixed" else [grid for grid in grids if grid.rows is not None][-2:]
    calls = -(-len(steps[0]) // 2)
    per_call = len(layers) // (2 * calls)
    expected = torch.zeros(9, 17)
    for step, grid in enumerate(steps):
        for i, tile in enumerate(grid.tiles):
            call = layers[(step * calls + i // 2) * per_call :][:per_call]
            rows = call[0].shape[0]
            one = naive(call, rows // 2 + i % 2, positions, (8, 8))
            tile.crop(expected).add_(one * grid.weights(tile) / 2)
    got = attribution.maps[0][0]
    assert got.shape == (9, 17)
    assert (got - expected).abs().max() < 1e-4 * expected.max()


def test_a_planted_word_is_found(pipeline: FaithDiffPipeline) -> None:
    """Queries of the right half, and the keys of one token, are made to fit: it lights up there, others do not."""
    handles = []
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    positions = _positions(pipeline, "a house with a red", "window")

    def plant_query(module: Any, inputs: Any, output: Tensor) -> Tensor:
        side = int(output.shape[1] ** 0.5)
        assert side * side == output.shape[1]
        planted = torch.zeros(side, side, 1)
        planted[:, side // 2 :] = 60.0
        heads = output.shape[-1] // 64
        return output * 0.1 + planted.flatten(0, 1) * direction.repeat(heads)

    def plant_key(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output * 0.1
        output[:, positions] = output[:, positions] + direction.repeat(output.shape[-1] // 64)
        return output

    for name, module in pipeline.base.unet.named_modules():
        if name.endswith("attn2"):
            handles += [module.to_q.register_forward_hook(plant_query), module.to_k.register_forward_hook(plant_key)]
    try:
        attribution = Attribution("window, hair")
        image = _images(1, 128, 128)
        restored = pipeline(image, prompt=PROMPT, attribution=attribution, scale=1.0, steps=1, cfg=2.0, seed=0)
    finally:
        for handle in handles:
            handle.remove()
    window, hair = attribution.maps[0]
    assert window[:, 9:].min() > 5 * window[:, :7].max()
    assert hair[:, :7].min() > hair[:, 9:].max()
    shown = overlay(restored, image_maps(window[None], 128, 128), opacity=1.0)
    assert (shown[0, 0, :, 80:] > 0.4).all()  # red
    assert torch.allclose(shown[..., :40], restored[..., :40], atol=0.2)


def test_long_prompts_and_memory(pipeline: FaithDiffPipeline) -> None:
    long = "a photograph of " + "very " * 90 + "long hair and a window"
    options: dict[str, Any] = {"scale": 1.0, "steps": 1, "cfg": 2.0, "seed": 1, "tile": 64, "overlap": 0.25}
    image = _images(2, 96, 80)
    fine = Attribution("hair")
    pipeline(image, prompt=[long, PROMPT], attribution=fine, **options)
    turned = Attribution("hair")
    pipeline(image, prompt=[PROMPT, long], attribution=turned, **options)
    assert turned.maps[0].shape == fine.maps[0].shape
    alone = Attribution("hair")
    pipeline(image[1:], prompt=PROMPT, seed=2, attribution=alone, **{k: v for k, v in options.items() if k != "seed"})
    assert torch.allclose(fine.maps[1], alone.maps[0], atol=1e-6)  # the other's length does not matter
    with pytest.raises(SettingsError, match="'hair' is not in the prompt"):
        pipeline(image, prompt=long, attribution=fine, long_prompt="cut", **options)
    with pytest.raises(SettingsError, match="must be at least 1 MiB"):
        pipeline(image, prompt=long, attribution=Attribution("hair", memory=1000), **options)


def test_a_word_that_is_not_there(pipeline: FaithDiffPipeline) -> None:
    for words in ("window, car", "red hair"):
        with pytest.raises(
            SettingsError, match=r"is not in the prompt\. Its words are: a, house, with, red, window, and, long"
        ):
            pipeline(_images(1, 64, 64), prompt=PROMPT, attribution=Attribution(words), steps=1)
    with pytest.raises(SettingsError, match="none: it is empty"):
        pipeline(_images(1, 64, 64), attribution=Attribution("hair"))
    with pytest.raises(SettingsError, match="needs words"):
        Attribution(" , ")
    with pytest.raises(SettingsError, match=r"recorded for images of 72 x 64 pixels .* but this image has 64 x 64"):
        image_maps(torch.rand(1, 8, 9), 64, 64)
    assert (image_maps(torch.ones(1, 8, 8), 64, 63) == 0).all()


def test_restore_writes_the_maps(tiny_sdxl: Path, golden: Golden, tmp_path: Path, capsys: Any) -> None:
    Image.new("RGB", (32, 32), (90, 80, 70)).save(tmp_path / "a.png")
    words = ["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out.png"), "--model", str(tiny_sdxl)]
    words += ["--faithdiff", str(golden.model), "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--quiet"]
    assert main([*words, "--prompt", PROMPT]) == 0
    assert main([*words, "--prompt", PROMPT, "--attribute", "hair,red window"]) == 0  # the result alone is not all
    with Image.open(tmp_path / "out.attribution.png") as sheet:
        assert sheet.width > 3 * 64
    assert main([*words, "--prompt", "a car", "--attribute", "hair", "--overwrite"]) == 1
    assert "The word 'hair' is not in the prompt. Its words are: a, car." in capsys.readouterr().err


def test_prompts_over_77_tokens_are_encoded_as_their_chunks(
    pipeline: FaithDiffPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Each chunk by diffusers' own encoding, one after the other; cut, the first one alone."""
    words = "a b c d e f g h i " * 20
    tokenizer = pipeline.base.tokenizer
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert len(ids) > 150
    with caplog.at_level(logging.WARNING):
        text = pipeline.encode_text([words], ["blurry"])
        cut = pipeline.encode_text([words], ["blurry"], long_prompt="cut")
        whole = pipeline.encode_text([words, "a house"], guided=False)
    assert not caplog.records
    chunks = [tokenizer.decode(ids[i : i + 75]) for i in range(0, len(ids), 75)]
    each = [pipeline.encode_text([chunk], guided=False) for chunk in chunks]
    assert torch.allclose(text.embeds, torch.cat([one.embeds for one in each], dim=1), atol=1e-6)
    assert text.pooled is not None
    assert each[0].pooled is not None
    assert torch.allclose(text.pooled, each[0].pooled, atol=1e-6)
    assert torch.allclose(cut.embeds, each[0].embeds, atol=1e-6)
    negative = pipeline.encode_text(["blurry"], guided=False).embeds
    assert text.negative_embeds is not None
    assert torch.allclose(text.negative_embeds, negative.repeat(1, len(chunks), 1), atol=1e-6)
    short = pipeline.encode_text(["a house"], guided=False).embeds
    assert torch.allclose(whole.embeds[1:], short.repeat(1, len(chunks), 1), atol=1e-6)
    assert not torch.allclose(text.embeds[:, 77:154], text.embeds[:, :77])
