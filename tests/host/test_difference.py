"""`base_model`: what FaithDiff learned, added to a MODEL of the user's, against weights computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_host import Host
from support.host_sampling import images, load, relative
from support.lora import factor_of
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


BLOCKS: dict[str, Any] = {"input_blocks": 1.0, "middle_block": 0.25, "output_blocks": 0.5}


@torch.no_grad()
def test_blocks_apart(host: Host, base_state: State) -> None:
    """The difference by hand, and the interpolation as the host's ModelMergeBlocks does it, with a LoRA before each."""
    models = host.testpack.models
    faithdiff, mine = models.golden_unet(), models.other_unet(1)
    features = load(host).features(images(64, 64))
    own = host.call("TestLoRA", model=models.tiny_model(mine), seed=3, strength=0.5)[0]

    by_hand = {key: mine[key] + 0.8 * factor_of(key, BLOCKS) * (faithdiff[key] - base_state[key]) for key in mine}
    expected = load(
        host, model=host.call("TestLoRA", model=models.tiny_model(by_hand), seed=3, strength=0.5)[0], unet_strength=0.0
    ).restore(features, steps=2)
    settings = {"unet_strength": 0.8, "base_model": models.tiny_model(base_state)}
    assert relative(load(host, model=own, **settings, **BLOCKS).restore(features, steps=2), expected) < 1e-4
    assert relative(load(host, model=own, **settings).restore(features, steps=2), expected) > 1e-2

    kept = {name: 1.0 - 0.8 * factor for name, factor in zip(("input", "middle", "out"), BLOCKS.values(), strict=True)}
    merged = host.call("ModelMergeBlocks", model1=models.tiny_model(mine), model2=models.tiny_model(faithdiff), **kept)[
        0
    ]
    expected = load(
        host, model=host.call("TestLoRA", model=merged, seed=3, strength=0.5)[0], unet_strength=0.0
    ).restore(features, steps=2)
    assert relative(load(host, model=own, unet_strength=0.8, **BLOCKS).restore(features, steps=2), expected) < 1e-4
    assert relative(load(host, model=own, unet_strength=0.8).restore(features, steps=2), expected) > 1e-2


def test_blocks_that_stay(host: Host) -> None:
    """Weights at a factor of 0 get no patch; a model that predicts v may not be mixed by blocks either."""
    models = host.testpack.models
    setup = load(host, model=models.tiny_model(models.other_unet(1)), input_blocks=0.0, output_blocks=0.0)
    assert setup.model.patches
    assert all(key.startswith("diffusion_model.middle_block.") for key in setup.model.patches)
    off: dict[str, Any] = dict.fromkeys(BLOCKS, 0.0)
    assert not load(host, model=models.tiny_model(models.other_unet(1)), **off).model.patches
    with pytest.raises(ValueError, match=r"`model` is a v-prediction model, .* for all blocks, or to 0"):
        load(host, model=models.tiny_model(models.other_unet(1), ("v_pred",)), middle_block=0.5)
