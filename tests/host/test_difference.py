"""`base_model`: what FaithDiff learned, added to a MODEL of the user's, against weights computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from safetensors.torch import load_file
from support.host_sampling import images, load, relative
from torch import Tensor

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base_state(host: Host) -> State:
    """What FaithDiff was trained from: its U-Net without a small difference. All values are those of 8-bit floats."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: (value + 0.1 * value.std(correction=0) * torch.randn(value.shape, generator=generator))
        .to(torch.float8_e4m3fn)
        .float()
        for key, value in host.testpack.models.golden_unet().items()
    }


@pytest.mark.parametrize("strength", [1.0, 0.4])
@torch.no_grad()
def test_the_difference_is_added(host: Host, base_state: State, strength: float) -> None:
    """mine + strength * (FaithDiff - base) by hand, with LoRAs before and after, and a base whose weights are fp8."""
    models = host.testpack.models
    faithdiff, mine = models.golden_unet(), models.other_unet(1)
    expected_state = {key: mine[key] + strength * (faithdiff[key] - base_state[key]) for key in mine}
    features = load(host).features(images(64, 64))

    def restored(model: Any, lora_after: bool = False, **kw: Any) -> Tensor:
        setup = load(host, model=model, **kw)
        if lora_after:
            setup.model = host.call("TestLoRA", model=setup.model, seed=3, strength=0.5)[0]
        return setup.restore(features, steps=2)

    own = models.tiny_model(mine)
    bases = [models.tiny_model(base_state), models.tiny_model(base_state, dtype=torch.float8_e4m3fn)]
    settings = {"unet_strength": strength, "base_model": bases[0]}
    by_hand = models.tiny_model(expected_state)
    expected = restored(by_hand, unet_strength=0.0)
    assert relative(restored(own, **settings), expected) < 1e-4
    assert relative(restored(own, unet_strength=strength, base_model=bases[1]), expected) < 1e-4
    with_lora = restored(by_hand, lora_after=True, unet_strength=0.0)
    assert relative(with_lora, expected) > 1e-2
    assert relative(restored(own, lora_after=True, **settings), with_lora) < 1e-4
    before = host.call("TestLoRA", model=own, seed=3, strength=0.5)[0]
    assert relative(restored(before, **settings), with_lora) < 1e-4


@torch.no_grad()
def test_strengths_zero_and_the_base_itself(host: Host, base_state: State) -> None:
    models = host.testpack.models
    features = load(host).features(images(64, 64))
    base = models.tiny_model(base_state)
    golden = load(host).restore(features, steps=2)
    assert relative(load(host, model=base, base_model=base).restore(features, steps=2), golden) < 1e-4
    none = load(host, model=base, base_model=base, unet_strength=0.0)
    assert not none.model.patches


def test_what_does_not_belong_together(host: Host, base_state: State) -> None:
    models = host.testpack.models
    own, base = models.tiny_model(models.other_unet(1)), models.tiny_model(base_state)
    for arguments, message in (
        ({"model": None, "base_model": base}, "`base_model` works with your own MODEL at `model`"),
        (
            {"model": own, "base_model": models.tiny_model(models.other_unet(2))},
            "`base_model` is not what faithdiff_tiny",
        ),
        (
            {"model": own, "base_model": models.tiny_model(base_state, ("v_pred",))},
            "`base_model` is a v-prediction model",
        ),
        ({"model": models.tiny_model(base_state, ("v_pred",)), "base_model": base}, "`model` is a v-prediction model"),
    ):
        with pytest.raises(ValueError, match=message):
            load(host, **arguments)


@torch.no_grad()
def test_a_saved_model_comes_back(host: Host, base_state: State) -> None:
    """The difference, then a LoRA, saved by ComfyUI: with the adapter alone it restores to the same latent."""
    import folder_paths

    models = host.testpack.models
    setup = load(host, model=models.tiny_model(models.other_unet(1)), base_model=models.tiny_model(base_state))
    setup.model = host.call("TestLoRA", model=setup.model, seed=3, strength=0.5)[0]
    features = setup.features(images(64, 64))
    expected = setup.restore(features, steps=2)
    host.call("ModelSave", model=setup.model, filename_prefix="difference/saved")
    (path,) = (Path(folder_paths.get_output_directory()) / "difference").glob("saved*.safetensors")
    saved = load_file(path)
    prefix = "model.diffusion_model."
    assert all(key.startswith(prefix) for key in saved)
    with pytest.raises(ValueError, match="is an SDXL U-Net as ComfyUI saves it, not a FaithDiff file"):
        host.pack_module("faithdiff_core").read_faithdiff(path)
    again = models.tiny_model({key.removeprefix(prefix): value.float() for key, value in saved.items()})
    assert relative(load(host, model=again, unet_strength=0.0).restore(features, steps=2), expected) < 1e-4
