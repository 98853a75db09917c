"""FaithDiff together with other packs, in their current code, on the tiny model.

They run where the environment variable FAITHDIFF_PACKS names a folder with clones of them:

    FAITHDIFF_PACKS=~/packs python -m pytest tests/host/test_other_packs.py

Each is held to the same as the host's own nodes: what tiles sampled by hand give, or an error of ours that says what to
do. docs/compatibility.md has the results and the versions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, load_pack, packs_folder
from safetensors.torch import load_file, save_file
from support.host_sampling import Setup, images, load, random_restoration, relative, sized
from support.node_survey import Survey, find_nodes, survey_setup
from support.node_survey.trial import noise, sample
from support.node_survey.values import GRID, HEIGHT, OVERLAP, TILE, WIDTH, Values
from support.other_packs import (
    TinyIPAdapter,
    defaults,
    face,
    gguf_model,
    with_ipadapter,
    write_gguf,
)
from tiny_models.reduced_sdxl import write_narrow_faithdiff
from torch import Tensor

from faithdiff_core import read_faithdiff
from faithdiff_core.tiling.grid import Tile
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.unet_names import checkpoint_names

TOLERANCE = 1e-4

OWN_FAULTS = {
    "TokenPerturbationGuidance": "applied to a MODEL twice it wraps its own wrapper, with plain SDXL, too",
}
"""Nodes of other packs that give another result each time, whatever the MODEL is: nothing to compare with."""


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return survey_setup(host)


@pytest.fixture(scope="module")
def values(setup: Setup) -> Values:
    return Values(setup)


@pytest.fixture(scope="module")
def pack(host: Host) -> Callable[[str], set[str]]:
    """Loads a pack by its folder's name, once; gives the ids of its nodes. Skips where it is not there."""
    folder = packs_folder()
    assert folder is not None  # without one the test was skipped
    loaded: dict[str, set[str]] = {}

    def get(name: str) -> set[str]:
        if not (folder / name).is_dir():
            pytest.skip(f"NO {name} IN {folder}")
        if name not in loaded:
            loaded[name] = load_pack(host, folder / name)
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def ours(host: Host) -> type[Exception]:
    """The base of this pack's errors."""
    error: type[Exception] = host.pack_module("faithdiff_core.errors").FaithDiffError
    return error


Conds = tuple[Any, Any]
Models = Callable[[Tile | None], Any]
Conditions = Callable[[Conds, Tile | None], Conds]
SIGMAS = torch.tensor([2.0, 0.0])


def tiles_by_hand(values: Values, model: Models, conds: Conditions) -> Tensor:
    """One Euler step, each tile from its own part of everything."""
    setup = values.setup
    given = noise({"samples": torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)}, "A")
    out = torch.zeros_like(given)
    for tile in GRID.tiles:
        pair = [sized(c, tile, (HEIGHT, WIDTH), TILE) for c in conds(values.conds(tile), tile)]
        part = tile.crop(given)
        guider = setup.cfg_guider(model(tile), pair[0], pair[1], 4.0)
        result, _ = sample(guider, {"samples": torch.zeros_like(part)}, part, SIGMAS)
        tile.crop(out).add_(result * GRID.weights(tile))
    return out


def in_tiles(values: Values, model: Models, conds: Conditions, batch: int) -> Tensor:
    """The same with FaithDiff Tiled Diffusion."""
    setup = values.setup
    empty = {"samples": torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)}
    tiled = setup.tiled(model(None), TILE, OVERLAP, batch)
    guider = setup.cfg_guider(tiled, *conds(values.conds(None), None), 4.0)
    return sample(guider, empty, noise(empty, "A"), SIGMAS)[0]


def result_or_error(run: Callable[[], Tensor], ours: type[Exception]) -> Tensor | str:
    """What comes of it, or the text of our error."""
    try:
        return run()
    except ours as error:
        return str(error)


def as_by_hand(
    values: Values, ours: type[Exception], model: Models | None = None, conds: Conditions | None = None
) -> None:
    """Tiles of one, and of uneven groups, give what tiles by hand give; or our error."""
    model = model or (lambda tile: values.setup.model)
    conds = conds or (lambda pair, tile: pair)
    expected = tiles_by_hand(values, model, conds)
    without = tiles_by_hand(values, lambda tile: values.setup.model, lambda pair, tile: pair)
    assert relative(expected, without) > 1e-3  # the pack does something
    for batch in (1, 3, 4):
        found = result_or_error(lambda batch=batch: in_tiles(values, model, conds, batch), ours)  # type: ignore[misc]
        if isinstance(found, Tensor):
            assert relative(found, expected) < TOLERANCE, batch
        else:
            assert "FaithDiff" in found


@pytest.mark.parametrize(
    "name",
    [
        "ComfyUI_IPAdapter_plus",
        "ComfyUI-Advanced-ControlNet",
        "ComfyUI-TiledDiffusion",
        "sd-perturbed-attention",
        "Skimmed_CFG",
        "ComfyUI-AutomaticCFG",
        "ComfyUI-KJNodes",
        "ComfyUI-Impact-Pack",
        "ComfyUI-GGUF",
        "rgthree-comfy",
    ],
)
def test_every_node(packs: Path, pack: Callable[[str], set[str]], host: Host, setup: Setup, name: str) -> None:
    """All nodes of the pack that change a MODEL, a CONDITIONING or a LATENT, or make a GUIDER."""
    mine = pack(name)
    survey = Survey(setup)
    schemas = find_nodes(host, without=host.node_ids - mine)
    verdicts = survey.verdicts(schema for schema in schemas if schema.id not in OWN_FAULTS)
    wrong = [verdict for verdict in verdicts if verdict.status == "wrong"]
    for verdict in verdicts:
        sys.stdout.write(f"{name} | {verdict.node} | {verdict.kind} | {verdict.status} | {verdict.how}\n")
    assert not wrong


@pytest.mark.parametrize("masked", [False, True])
def test_ipadapter(packs: Path, pack: Callable[[str], set[str]], values: Values, ours: Any, masked: bool) -> None:
    """IPAdapter's attention patch with tiny weights; `attn_mask` is the mask's part in a tile."""
    pack("ComfyUI_IPAdapter_plus")
    adapter = TinyIPAdapter()
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1.0

    def model(tile: Tile | None) -> Any:
        part = mask if tile is None else tile.crop(mask, 8)
        return with_ipadapter(values.setup.model, adapter, part if masked else None)

    as_by_hand(values, ours, model)


@pytest.mark.parametrize("masked", ["no mask", "mask", "keyframe mask"])
def test_advanced_controlnet(
    packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any, masked: str
) -> None:
    pack("ComfyUI-Advanced-ControlNet")
    control = host.call("TestControlNet", seed=1)[0]
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1.0

    def conds(pair: Conds, tile: Tile | None) -> Conds:
        part = mask if tile is None else tile.crop(mask, 8)
        keyframe = None
        if masked == "keyframe mask":
            name = "ACN_TimestepKeyframe" if "ACN_TimestepKeyframe" in host.node_ids else "TimestepKeyframe"
            keyframe = host.call(name, start_percent=0.0, strength=1.0, mask_optional=part)[0]
        positive, negative = host.call(
            "ACN_AdvancedControlNetApply_v2",
            positive=pair[0],
            negative=pair[1],
            control_net=control,
            image=values.pixels(tile, 20),
            strength=0.7,
            start_percent=0.0,
            end_percent=1.0,
            mask_optional=part if masked == "mask" else None,
            timestep_kf=keyframe,
        )[:2]
        return positive, negative

    as_by_hand(values, ours, conds=conds)


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion"])
@pytest.mark.parametrize("ours_too", [False, True])
def test_tiled_diffusion(
    packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any, method: str, ours_too: bool
) -> None:
    """Another tiler on a FaithDiff MODEL is told to make way; with plain prompts it works as ever."""
    pack("ComfyUI-TiledDiffusion")
    setup = values.setup
    model = setup.tiled(setup.model, 72) if ours_too else setup.model
    model = host.call(
        "TiledDiffusion", model=model, method=method, tile_width=64, tile_height=64, tile_overlap=32, tile_batch_size=1
    )[0]
    empty = {"samples": torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)}
    with pytest.raises(ours, match=r"FaithDiff Tiled Diffusion"):
        sample(setup.cfg_guider(model, *values.conds(None), 4.0), empty, noise(empty, "A"), SIGMAS)
    out, _ = sample(setup.cfg_guider(model, setup.positive, setup.negative, 4.0), empty, noise(empty, "A"), SIGMAS)
    assert torch.isfinite(out).all()


def test_sliding_window_guidance(
    packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any
) -> None:
    """It predicts windows of the latent within the guidance: told to make way."""
    pack("sd-perturbed-attention")
    setup, name = values.setup, "SlidingWindowGuidanceAdvanced"
    windows = {"tile_width": 64, "tile_height": 64, "tile_overlap": 32, "sigma_start": -1.0, "sigma_end": -1.0}
    model = host.call(name, **defaults(host, name) | windows | {"model": setup.model})[0]
    empty = {"samples": torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8)}
    with pytest.raises(ours, match=r"FaithDiff Tiled Diffusion"):
        sample(setup.cfg_guider(model, *values.conds(None), 4.0), empty, noise(empty, "A"), SIGMAS)


def quarters(batch: int = 1) -> Tensor:
    """An image of four of the tiles that Ultimate SD Upscale makes below."""
    return images(256, 256, batch, seed=3)


def test_ultimate_sd_upscale(
    packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any
) -> None:
    """It cuts the image itself: our error says what to use instead. Without LQ features it is as with plain SDXL."""
    pack("ComfyUI_UltimateSDUpscale")
    setup, name = values.setup, "UltimateSDUpscaleNoUpscale"
    vae = host.call("TestVAE")[0]

    def upscale(model: Any, conds: Conds, padding: int = 32) -> Tensor:
        given = {"upscaled_image": quarters(), "model": model, "positive": conds[0], "negative": conds[1], "vae": vae}
        steps = {"seed": 1, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5}
        tiles = {"tile_width": 128, "tile_height": 128, "tile_padding": padding, "seam_fix_mode": "None"}
        out: Tensor = host.call(name, **defaults(host, name) | given | steps | tiles)[0]
        return out

    plain = host.call("TestModel")[0]
    texts = (setup.positive, setup.negative)
    freeu = host.call("FreeU_V2", model=plain, b1=1.3, b2=1.4, s1=0.9, s2=0.2)[0]
    try:
        upscale(freeu, texts)
    except UnboundLocalError as error:
        # Its own fault with any MODEL that has a patch (34a3c2c); nothing of FaithDiff's is reached.
        with pytest.raises(type(error)):
            upscale(setup.model, texts)
        return
    assert relative(upscale(setup.model, texts), upscale(plain, texts)) < TOLERANCE
    for padding in (0, 32):
        with pytest.raises(ours, match="FaithDiff"):
            upscale(setup.model, setup.conditioned(setup.features(quarters())), padding)


def test_impact_detailer(packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any) -> None:
    """A detailer cuts and enlarges a face: our error where the sizes differ; plain prompts are as with plain SDXL."""
    pack("ComfyUI-Impact-Pack")
    setup, name = values.setup, "DetailerForEach"
    vae, clip = host.call("TestVAE")[0], host.call("TestCLIP")[0]

    def detail(model: Any, conds: Conds, guide: int) -> Tensor:
        given = {"image": quarters(), "segs": ((256, 256), [face(64, 64, 192, 192)]), "model": model, "clip": clip}
        given |= {"vae": vae, "positive": conds[0], "negative": conds[1], "guide_size": guide, "max_size": guide}
        steps = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.5}
        # Without feathers: for those it calls a function that ComfyUI no longer has.
        more = {"force_inpaint": True, "wildcard": "", "cycle": 1, "feather": 0, "noise_mask_feather": 0}
        out: Tensor = host.call(name, **defaults(host, name) | given | steps | more)[0]
        return out

    texts = (setup.positive, setup.negative)
    plain = detail(host.call("TestModel")[0], texts, 128)
    assert relative(plain, quarters()) > 1e-3
    assert relative(detail(setup.model, texts, 128), plain) < TOLERANCE
    for model in (setup.model, setup.tiled(setup.model, TILE)):
        with pytest.raises(ours, match="FaithDiff"):
            detail(model, setup.conditioned(setup.features(quarters())), 128)


@pytest.mark.parametrize("tile", [1024, TILE])
def test_gguf(packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values, ours: Any, tile: int) -> None:
    """A quantised MODEL gives what its dequantised weights give; blending its U-Net is right, too, or refused."""
    pack("ComfyUI-GGUF")
    models, features = host.testpack.models, values.features(None)
    packed, plain = gguf_model(host, models.other_unet(4))
    unpacked = models.tiny_model(plain)
    for strength in (0.0, 0.6, 1.0):
        expected = load(host, model=unpacked, unet_strength=strength).restore(features, tile_size=tile)

        def restored(s: float = strength) -> Tensor:
            return load(host, model=packed, unet_strength=s).restore(features, tile_size=tile)

        found = result_or_error(restored, ours)
        if isinstance(found, Tensor):
            assert relative(found, expected) < 5e-3  # the pack computes in half precision in places
        else:
            assert strength > 0.0
            assert "GGUF" in found
            assert "unet_strength" in found


@torch.no_grad()
def test_a_gguf_file(packs: Path, pack: Callable[[str], set[str]], host: Host, tmp_path: Path) -> None:
    """The U-Net of `convert`, made a GGUF file: the pack's loader and our adapter restore as its weights do."""
    pack("ComfyUI-GGUF")
    models = host.base / "models"
    for folder in ("diffusion_models", "faithdiff"):
        (models / folder).mkdir(exist_ok=True)
    write_narrow_faithdiff(tmp_path / "gguf.bin")
    unet, adapter = convert(tmp_path / "gguf.bin", models / "faithdiff")
    # By diffusers' names ComfyUI knows a U-Net of SDXL's full widths alone.
    names = checkpoint_names(read_faithdiff(unet).parts["unet"].config)
    state = {names[key]: value for key, value in load_file(unet).items()}
    plain = write_gguf(models / "diffusion_models" / "narrow.gguf", state)
    save_file(plain, models / "diffusion_models" / "narrow_plain.safetensors")
    results = []
    for node, name, more in (
        ("UnetLoaderGGUF", "narrow.gguf", {}),
        ("UNETLoader", "narrow_plain.safetensors", {"weight_dtype": "default"}),
    ):
        (model,) = host.call(node, unet_name=name, **more)
        model, faithdiff = host.call(
            "FaithDiffModelLoader", faithdiff_name=adapter.name, weight_dtype="default", model=model
        )
        results.append(random_restoration(host, model, faithdiff))
    assert relative(*results) < 5e-3  # the pack computes in half precision in places


def test_rgthree(packs: Path, pack: Callable[[str], set[str]], host: Host, values: Values) -> None:
    """Power Lora Loader is the host's own loader, tiled."""
    pack("rgthree-comfy")
    setup = values.setup
    file = "power.safetensors"
    save_file(host.testpack.models.lora_state(9), host.base / "models" / "loras" / file)
    core = host.call("LoraLoaderModelOnly", model=setup.model, lora_name=file, strength_model=1.0)[0]
    power = host.call(
        "Power Lora Loader (rgthree)", model=setup.model, lora_1={"on": True, "lora": file, "strength": 1.0}
    )[0]
    features = values.features(None)
    expected = setup.restore(features, model=core, tile_size=TILE)
    assert relative(setup.restore(features, model=power, tile_size=TILE), expected) < TOLERANCE
    assert relative(expected, setup.restore(features, tile_size=TILE)) > 1e-3
