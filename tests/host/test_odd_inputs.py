"""Values that other nodes should not give: errors name the node, the input and what was expected."""

from __future__ import annotations

import re
from inspect import signature
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from comfy_host.in_process import Host

PREPARE = {"scale_by": 2.0, "longest_side": 0, "multiple": 8}


def _prepare(host: Host, image: Any, **changes: Any) -> Any:
    return host.call("FaithDiffPrepareImage", **{"image": image, **PREPARE, **changes})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("text", "FaithDiff Prepare Image: image: expected an IMAGE .* got a value of the type str. Check the link"),
        (None, "image: expected an IMAGE .* got nothing"),
        (torch.zeros(0, 32, 32, 3), r"image is empty: it has the shape \(0, 32, 32, 3\)"),
        (torch.zeros(1, 0, 32, 3), "image is empty"),
        (torch.zeros(32, 32, 3), r"must have the shape \(batch, height, width, channels\).* got \(32, 32, 3\)"),
        (torch.zeros(1, 32, 32, 9), "with 1 to 4 channels"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "floating-point values from 0 to 1, got torch.uint8"),
        (torch.full((1, 8, 8, 3), float("nan")), "image has values that are NaN or infinite"),
    ],
)
def test_prepare_refuses_by_name(host: Host, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _prepare(host, image)


def test_every_input_of_every_node_refuses_other_types(host: Host) -> None:
    """What links of other packs can bring: the error names the node, the input, and what was expected and came."""
    tried = 0
    for node in sorted(name for name in host.node_ids if name.startswith("FaithDiff")):
        schema, own = host.node_class(node).define_schema(), signature(host.node_class(node).validate_inputs).parameters
        for entry in schema.inputs or []:
            kind = str(entry.get_io_type())
            wrong: list[Any] = [object(), *([] if entry.optional else [None])]
            files = ("faithdiff_name", "base_name")  # the nodes look for them, and name the folders
            if kind == "COMBO" and entry.id not in (*own, *files):
                wrong.append("none of the choices")
            if kind == "IMAGECOMPARE":  # no input of values: where the page shows the images
                continue
            for value in wrong:
                message = rf"^{re.escape(schema.display_name)}: {entry.id}: expected .*, got .*Check the link"
                with pytest.raises(ValueError, match=message):
                    host.call(node, **{entry.id: [value] if schema.is_input_list else value})
                tried += 1
            if kind == "FLOAT":
                nan = float("nan")
                with pytest.raises(ValueError, match=f"^{schema.display_name}: {entry.id} must be a finite number"):
                    host.call(node, **{entry.id: [nan] if schema.is_input_list else nan})
    assert tried > 200


def test_numbers_must_be_finite(host: Host) -> None:
    with pytest.raises(ValueError, match="Prepare Image: scale_by must be a finite number, got nan"):
        _prepare(host, torch.rand(1, 8, 8, 3), scale_by=float("nan"))


def test_latents_must_be_finite(host: Host) -> None:
    bad = {"samples": torch.full((1, 4, 8, 8), float("inf"))}
    with pytest.raises(ValueError, match="Tiled VAE Decode: samples has values that are NaN or infinite"):
        host.call("FaithDiffTiledVAEDecode", samples=bad, vae=host.call("TestVAE")[0], tile_size=64, overlap=0.25)


def test_inputs_that_a_node_does_not_have(host: Host) -> None:
    with pytest.raises(ValueError, match="Prepare Image: There is no input x; there are image, scale_by"):
        _prepare(host, torch.rand(1, 8, 8, 3), x=1)


def test_grey_images_and_flat_masks_are_taken(host: Host) -> None:
    grey = torch.rand(1, 12, 20, 1)
    image, frame = _prepare(host, grey)
    colors, _ = _prepare(host, grey.expand(-1, -1, -1, 3))
    assert torch.equal(image, colors)
    assert frame.mask is None
    mask = (torch.rand(12, 20) > 0.5).float()
    flat, batched = (_prepare(host, colors[:, :12, :20], mask=m)[1].mask for m in (mask, mask[None]))
    assert torch.equal(flat, batched)


def test_compare_takes_grey_and_refuses_others(host: Host) -> None:
    grey, colors = torch.rand(1, 8, 8, 1), torch.rand(1, 8, 8, 3)
    out = host.call("FaithDiffCompare", before=grey, after=colors, mode="side_by_side")[0]
    assert torch.equal(out[:, :, :8], grey.expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match="FaithDiff Compare: before is empty"):
        host.call("FaithDiffCompare", before=torch.zeros(1, 0, 8, 3), after=colors, mode="slider")


@pytest.mark.parametrize("through", ["mask", "channel"])
def test_cut_outs_do_not_take_hidden_colours(host: Host, through: str) -> None:
    alpha = torch.zeros(1, 24, 32, 1)
    alpha[:, 6:18, 8:26] = 1
    alpha[:, 6] = alpha[:, 6] / 2
    shown = torch.rand(1, 24, 32, 3)
    results = []
    for hidden in (0.0, 1.0):
        colors = torch.where(alpha > 0, shown, torch.full_like(shown, hidden))
        image = torch.cat([colors, alpha], -1) if through == "channel" else colors
        mask = None if through == "channel" else 1 - alpha[..., 0]
        prepared, frame = _prepare(host, image, mask=mask)
        finished = host.call("FaithDiffFinishImage", image=prepared.sqrt(), frame=frame, color_fix="adain")
        results.append((prepared, *finished))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    prepared, fixed, mask = results[0]
    seen = mask[0] < 0.001
    low = prepared[:, : fixed.shape[1], : fixed.shape[2]]
    assert (fixed[0][seen].mean(0) - low[0][seen].mean(0)).abs().max() < 0.02
