"""FaithDiff Attribution Record and Map: against queries and keys that ComfyUI's attention gets, and a planted word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from comfy_host import Host
from safetensors.torch import save_file
from support.attention import queries_of
from support.host_sampling import Setup, gaussian, images, load, relative
from torch import Tensor

from faithdiff_core.tiling.grid import TileGrid

HEIGHT, WIDTH = 72, 136
POSITIONS = [4, 5]
PROMPT = "a photograph of two cats near a window"


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture
def sharp(setup: Setup) -> Iterator[None]:
    """Queries times 8: a tiny random model's attention is so even that no enlarged map is negative anywhere."""
    with queries_of(setup.model.model.diffusion_model, 8.0):
        yield


@pytest.fixture(scope="module")
def demo(host: Host) -> Any:
    """MODEL, CLIP, VAE and FAITHDIFF of the demo model."""
    return host.call("FaithDiffDemoModels")


@pytest.fixture(scope="module")
def settings_error(host: Host) -> type[Exception]:
    error: type[Exception] = host.pack_module("faithdiff_core.errors").SettingsError
    return error


def recorded(setup: Setup, model: Any = None, prompt: str = "positive", memory: int = 512) -> tuple[Any, Any]:
    """A MODEL and its record."""
    return setup.host.call("FaithDiffAttributionRecord", model=model or setup.model, prompt=prompt, max_memory=memory)


class Captured:
    """Maps from the queries and keys of every U-Net call, by ComfyUI's own override of the attention.

    Attributes:
        calls: for each call, the maps of the positive rows, (rows, height, width), each layer, head and token enlarged
            and clamped by itself. Of the class: what an object keeps from call to call, FaithDiff's tiles keep apart.
    """

    calls: ClassVar[list[Tensor]] = []
    _maps: ClassVar[list[Tensor]] = []

    def __init__(self, model: Any, size: tuple[int, int], positive: int = 0) -> None:
        self.model, self.size, self.positive = model.clone(), size, positive
        self.calls.clear()
        options = self.model.model_options["transformer_options"]
        options["optimized_attention_override"] = self._attention
        self.model.set_model_unet_function_wrapper(self._unet)

    def _unet(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        self._maps.clear()
        out: Tensor = apply_model(args["input"], args["timestep"], **args["c"])
        if self._maps:
            self.calls.append(torch.stack(self._maps).mean(0))
        return out

    def _attention(self, plain: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kw: Any) -> Tensor:
        order = kw["transformer_options"]["cond_or_uncond"]
        if k.shape[1] == 77 and self.positive in order:  # no layer of these sizes has 77 positions
            place, rows = order.index(self.positive), q.shape[0] // len(order)
            mine = slice(place * rows, (place + 1) * rows)
            split = [x[mine].unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k)]
            probabilities = torch.softmax(split[0] @ split[1].mT / split[0].shape[-1] ** 0.5, dim=-1)
            height, width = next(
                (-(-self.size[0] // f), -(-self.size[1] // f))
                for f in (1, 2, 4)
                if -(-self.size[0] // f) * -(-self.size[1] // f) == q.shape[1]
            )
            for head in range(heads):
                one = probabilities[:, head].mT[:, POSITIONS].unflatten(2, (height, width))
                self._maps.append(F.interpolate(one, self.size, mode="bicubic").clamp(min=0).mean(1))
        return plain(q, k, v, heads, *args, **kw)


def close(got: Tensor, expected: Tensor) -> bool:
    """To 1e-4 of the largest value; the maps are far from being the same everywhere."""
    assert expected.std() > 1e-3 * expected.mean()
    return float((got - expected).abs().max()) < 1e-4 * float(expected.max())


@pytest.mark.usefixtures("sharp")
@pytest.mark.parametrize("which", ["positive", "negative", "lora"])
def test_a_batch_in_one_piece(setup: Setup, which: str) -> None:
    """Two images, guidance, two steps; each half of the guidance, and with a LoRA."""
    features = setup.features(images(HEIGHT, WIDTH, batch=2))
    model = setup.host.call("TestLoRA", model=setup.model, seed=1, strength=1.0)[0] if which == "lora" else setup.model
    captured = Captured(model, (9, 17), positive=1 if which == "negative" else 0)
    model, record = recorded(setup, captured.model, "negative" if which == "negative" else "positive")
    latent = setup.restore(features, model=model, steps=2)
    plain = setup.restore(features, model=captured.model, steps=2)
    assert torch.equal(latent, plain)  # recording changes nothing
    maps = record.recorder.recorded().mean(POSITIONS)
    assert close(maps, torch.stack(captured.calls[:2]).mean(0))
    if which == "positive":
        other = Captured(setup.model, (9, 17), positive=1)
        setup.restore(features, model=other.model, steps=2)
        assert not close(maps, torch.stack(other.calls).mean(0))


@pytest.mark.usefixtures("sharp")
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "heun"])
def test_tiles_are_merged_with_their_weights(setup: Setup, sampler: str) -> None:
    features = setup.features(images(HEIGHT, WIDTH))
    options = {"steps": 2, "tile_size": 64, "overlap": 0.25, "sampler_name": sampler}
    captured = Captured(setup.model, (8, 8))
    model, record = recorded(setup, captured.model)
    setup.restore(features, model=model, tile_batch=1, **options)
    grid = TileGrid(9, 17, 64, 0.25)
    steps = len(captured.calls) // len(grid)
    assert steps == {"euler": 2, "dpmpp_2m_sde": 2, "heun": 3}[sampler]
    expected = torch.zeros(9, 17)
    for i, call in enumerate(captured.calls):
        tile = grid.tiles[i % len(grid)]
        tile.crop(expected).add_(call[0] * grid.weights(tile) / steps)
    maps = record.recorder.recorded().mean(POSITIONS)
    assert close(maps[0], expected)
    if sampler == "euler":
        model, together = recorded(setup)
        setup.restore(features, model=model, tile_batch=3, **options)
        assert close(together.recorder.recorded().mean(POSITIONS), maps)


@pytest.mark.usefixtures("sharp")
def test_moving_tiles(setup: Setup) -> None:
    """The tiles' places are told by the steps' own grids."""
    features = setup.features(images(HEIGHT, WIDTH))
    grids: list[Any] = []
    module = setup.host.pack_module("faithdiff_core.tiling.grid")
    captured = Captured(setup.model, (8, 8))
    model, record = recorded(setup, captured.model)
    with pytest.MonkeyPatch.context() as patch:
        init = module.TileGrid.__init__

        def remembered(self: Any, *args: Any, **kw: Any) -> None:
            init(self, *args, **kw)
            grids.append(self)

        patch.setattr(module.TileGrid, "__init__", remembered)
        options = {"steps": 2, "tile_size": 64, "overlap": 0.125, "tile_batch": 1, "tile_grid": "moving"}
        setup.restore(features, model=model, **options)
    assert len(grids) == 2
    assert grids[0].starts != grids[1].starts
    expected = torch.zeros(9, 17)
    calls = iter(captured.calls)
    for grid in grids:
        for tile in grid.tiles:
            tile.crop(expected).add_(next(calls)[0] * grid.weights(tile) / 2)
    assert close(record.recorder.recorded().mean(POSITIONS)[0], expected)


@pytest.fixture(scope="module")
def scheduled(host: Host) -> Any:
    """HOOKS with the LoRA of TestLoRA, which a keyframe switches on halfway."""
    save_file(host.testpack.models.lora_state(1), host.base / "models" / "loras" / "hooked.safetensors")
    hooks = host.call("CreateHookLoraModelOnly", lora_name="hooked.safetensors", strength_model=1.0)[0]
    frames = None
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames = host.call("CreateHookKeyframe", strength_mult=strength, start_percent=start, prev_hook_kf=frames)[0]
    return host.call("SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]


def sampled(setup: Setup, model: Any, conditioned: tuple[Any, Any], noise: Tensor, start: Any, sigmas: Any) -> Tensor:
    """The stock sampler, guided."""
    guider = setup.cfg_guider(model, *conditioned, cfg=3.0)
    return setup.guided(guider, noise, {"samples": start}, torch.tensor(sigmas))


@pytest.mark.usefixtures("sharp")
@pytest.mark.parametrize("tile", [128, 64])
def test_a_hooked_lora_that_begins_halfway(setup: Setup, scheduled: Any, tile: int) -> None:
    """A step without and one with the LoRA: as the plain MODEL samples and records, and then the one with the LoRA.

    Hooks of the positive prompt alone have the prompts predicted in calls of their own.
    """
    conditioned = setup.conditioned(setup.features(images(HEIGHT, WIDTH)))
    hooked = tuple(setup.host.call("ConditioningSetProperties", cond_NEW=c, strength=1.0, set_cond_area="default",
                                   hooks=scheduled)[0] for c in conditioned)  # fmt: skip
    base = setup.tiled(setup.model, tile, overlap=0.25)
    noise, nothing = gaussian(1, 4, 9, 17), torch.zeros(1, 4, 9, 17)
    model, record = recorded(setup, base)
    result = sampled(setup, model, hooked, noise, nothing, [14.0, 0.7, 0.0])
    maps = record.recorder.recorded().mean(POSITIONS)

    first, record = recorded(setup, base)
    between = sampled(setup, first, conditioned, noise, nothing, [14.0, 0.7])
    before = record.recorder.recorded().mean(POSITIONS)
    changed = setup.host.call("TestLoRA", model=base, seed=1, strength=1.0)[0]
    second, record = recorded(setup, changed)
    expected = sampled(setup, second, conditioned, nothing, between, [0.7, 0.0])
    after = record.recorder.recorded().mean(POSITIONS)
    assert relative(result, expected) < 1e-5
    assert close(maps, (before + after) / 2)
    assert not close(maps, before)

    captured = Captured(base, (min(tile // 8, 9), min(tile // 8, 17)))
    model, record = recorded(setup, captured.model)
    sampled(setup, model, (hooked[0], conditioned[1]), noise, nothing, [14.0, 0.7, 0.0])
    grid = TileGrid(9, 17, tile, 0.25)
    merged = torch.zeros(9, 17)
    maps_of_tiles = torch.cat(captured.calls)
    assert len(maps_of_tiles) == 2 * len(grid)
    for i, one in enumerate(maps_of_tiles):
        place = grid.tiles[i % len(grid)]
        place.crop(merged).add_(one * grid.weights(place) / 2)
    assert close(record.recorder.recorded().mean(POSITIONS)[0], merged)


def test_guidance_that_asks_again_does_not_count(setup: Setup) -> None:
    """Perturbed-attention guidance predicts a second time at the same place; in one step both see the same latent."""
    features = setup.features(images(64, 64))
    model, alone = recorded(setup)
    setup.restore(features, model=model, steps=1)
    perturbed = setup.host.call("PerturbedAttentionGuidance", model=setup.model, scale=3.0)[0]
    model, record = recorded(setup, perturbed)
    setup.restore(features, model=model, steps=1)
    assert torch.equal(record.recorder.recorded().sums, alone.recorder.recorded().sums)
    model, record = recorded(setup, memory=1)
    setup.restore(features, model=model, steps=1, cfg=1.0)
    assert close(record.recorder.recorded().mean(POSITIONS), alone.recorder.recorded().mean(POSITIONS))


class Restored:
    """The demo model on an image, recorded, through the nodes."""

    def __init__(self, host: Host, demo: Any, text: str, **options: Any) -> None:
        self.host = host
        model, self.clip, vae, faithdiff = demo[:4]
        pixels = images(64, 96, seed=2)
        features = host.call("FaithDiffLQEncode", faithdiff=faithdiff, pixels=pixels, tile_size=1024, overlap=0.25)[0]
        positive, negative = (host.call("CLIPTextEncode", clip=self.clip, text=t)[0] for t in (text, ""))
        setup = Setup(host, model, faithdiff, positive, negative)
        recorded_model, self.record = recorded(setup)
        settings = {"model": recorded_model, "steps": 1, "cfg": 2.0} | options
        self.latent = setup.restore(features, **settings)
        self.image = host.call("VAEDecode", vae=vae, samples={"samples": self.latent})[0]

    def map(self, words: str, prompt: str, **changes: Any) -> Any:
        given = {"latent": {"samples": self.latent}, "image": self.image, "opacity": 1.0} | changes
        return self.host.call(
            "FaithDiffAttributionMap", record=self.record, clip=self.clip, prompt=prompt, words=words, **given
        )


def test_a_planted_word_is_found(host: Host, demo: Any) -> None:
    """The tokens of one word and the queries of the right half are made to fit, in tiles; the word lights up there."""
    text = "very " * 40 + PROMPT  # over 77 tokens
    tokens = demo[1].tokenize(text)["l"]
    assert len(tokens) > 1
    word = [t for t, _ in demo[1].tokenize("window")["l"][0][1:]]
    word = word[: word.index(demo[1].tokenizer.clip_l.end_token)]
    flat = [t for chunk in tokens for t, _ in chunk]
    (first,) = [i for i in range(len(flat)) if flat[i : i + len(word)] == word]
    positions = list(range(first, first + len(word)))
    unet = demo[0].model.diffusion_model
    handles, tile_left = [], 0
    record_module = host.pack_module("faithdiff_core.attribution.recorder")
    original = record_module.CrossAttentionRecorder.call

    def watched(self: Any, rows: Any, *args: Any) -> Any:
        nonlocal tile_left
        tile_left = rows[0].tile.left
        return original(self, rows, *args)

    def plant_query(module: Any, inputs: Any, q: Tensor) -> Tensor:
        side = int(q.shape[1] ** 0.5)
        right = (torch.arange(side) + 0.5) * 8 / side + tile_left > 6  # tiles of 8 x 8, of a latent of 8 x 12
        return q * 0.05 + 20.0 * right.repeat(side)[:, None]

    def plant_key(module: Any, inputs: Any, k: Tensor) -> Tensor:
        k = k * 0.05
        k[:, positions] = k[:, positions] + 1.0
        return k

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            handles += [module.to_q.register_forward_hook(plant_query), module.to_k.register_forward_hook(plant_key)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_module.CrossAttentionRecorder, "call", watched)
            done = Restored(host, demo, text, tile_size=64, overlap=0.5, tile_batch=1)
    finally:
        for handle in handles:
            handle.remove()
    overlay, mask = done.map("window, cats", text)
    assert overlay.shape == (2, 64, 96, 3)
    assert mask.shape == (2, 64, 96)
    assert mask[0, :, 64:].min() > 0.7
    assert mask[0, :, :32].max() < 0.3
    assert mask[1, :, :32].mean() > mask[1, :, 64:].mean()
    assert (overlay[0, :, 64:, 0] > overlay[0, :, 64:, 2]).all()  # red over blue


def test_what_the_map_refuses(host: Host, demo: Any, settings_error: type[Exception]) -> None:
    done = Restored(host, demo, PROMPT)
    assert done.map("window", PROMPT)[1].amax() == 1
    with pytest.raises(
        settings_error, match=r"Attribution Map: The word 'car' is not in the prompt\. Its words are: a, ph"
    ):
        done.map("window, car", PROMPT)
    with pytest.raises(settings_error, match="needs words"):
        done.map(" ", PROMPT)
    with pytest.raises(settings_error, match=r"The prompt has \d+ tokens with this CLIP, but the recorded cond"):
        done.map("window", "very " * 80 + PROMPT)
    with pytest.raises(settings_error, match="not the result of the last run that was recorded"):
        done.map("window", PROMPT, latent={"samples": done.latent + gaussian(*done.latent.shape)})
    with pytest.raises(settings_error, match=r"images of 96 x 64 pixels .*, but this image has 80 x 64"):
        done.map("window", PROMPT, image=done.image[:, :, :80])
    fresh = recorded(Setup(host, demo[0], demo[3], [], []))[1]
    with pytest.raises(settings_error, match="Nothing was recorded: the sampler has to get the MODEL"):
        host.call(
            "FaithDiffAttributionMap", record=fresh, latent={"samples": done.latent}, clip=done.clip, prompt=PROMPT,
            words="window", image=done.image, opacity=1.0,
        )  # fmt: skip


def test_what_recording_refuses(setup: Setup, settings_error: type[Exception]) -> None:
    features = setup.features(images(HEIGHT, WIDTH))
    model, _ = recorded(setup)
    both = setup.host.call("ConditioningCombine", conditioning_1=setup.positive, conditioning_2=setup.negative)[0]
    with pytest.raises(settings_error, match="expected one positive conditioning, got 2"):
        setup.restore(features, model=model, positive=both, steps=1)
    shrunk = setup.host.call(
        "PatchModelAddDownscale", model=setup.model, block_number=1, downscale_factor=2.0, start_percent=0.0,
        end_percent=1.0, downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic",
    )[0]  # fmt: skip
    model, _ = recorded(setup, shrunk)
    with pytest.raises(settings_error, match=r"expected cross-attention of 2 rows .*deep shrink"):
        setup.restore(features, model=model, steps=1)
    assert not any(module._forward_hooks for module in setup.model.model.diffusion_model.modules())
