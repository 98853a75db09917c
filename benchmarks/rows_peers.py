"""Rows of the paper's Tables 7 and 8: FaithDiff beside a ControlNet and a ControlNet-XS on the same SDXL, and beside
UltimateSDUpscale's tiles.

The peers are diffusers' `ControlNetModel` and `UNetControlNetXSModel` in their SDXL sizes. The paper's baseline "FT
EN & Fix DM" (2.31 times FaithDiff's time in Table 7) is its own LQ encoder in front of a ControlNet with SFT layers,
which no library has; the ControlNet row of Table 8 (1.81 times) and its ControlNet-XS row (1.02 times) are what the two
stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faithdiff_core.models.alignment import Alignment
from faithdiff_core.tiling.grid import TILE_OVERLAP
from faithdiff_core.tiling.moving import MOVING_OVERLAP, TileGridKind, TileGrids

from . import counts, models
from .measure import Spread, Work, free_memory, interleaved, peak_bytes
from .results import Result, memory, timed
from .rows_core import STEPS, alignment_inputs, shared_unet
from .settings import PUBLISHED_SIZE, SCALE, Settings

PAPER = {"ControlNet": 1.81, "ControlNet-XS": 1.02}
"""Their times over FaithDiff's at 1024 px, 20 steps, fp16 on an A800 (paper, Table 8: 4.62, 2.61 and 2.55 s)."""

PAPER_TRAINING = 80628 / 50990
"""Memory of training with a ControlNet over FaithDiff's, batch 10 and ZeRO-2 (paper, Table 7)."""

UPSCALER_PADDING = 32
"""Pixels that UltimateSDUpscale adds to a tile's side by default (its input `tile_padding`)."""

_SMALL = "a U-Net with a tenth of the weights"

TRAINING_SIZE = 256
"""Pixels of the images of the training row."""


def counted(settings: Settings) -> Iterator[Result]:
    """Operations and parameters at 1024 px, whatever the device."""
    size, meta = PUBLISHED_SIZE, torch.device("meta")
    inputs = models.unet_inputs(2, size // SCALE, meta, torch.float32)
    hint = torch.empty(2, 3, size, size, device=meta)
    call = counts.unet_call(size)
    once = counts.lq_encode(size) + counts.embedding(size)
    ours = STEPS * (call + counts.alignment_call(size)) + once
    sizes = counts.parameter_counts()
    ours_parameters = sizes["U-Net"] + sizes["alignment"] + sizes["LQ encoder"]
    controlnet, joint = models.controlnet(meta, torch.float32), models.controlnet_xs(meta, torch.float32)
    peers = {
        "ControlNet": (
            call + counts.count(lambda: controlnet(**inputs, controlnet_cond=hint)),
            sizes["U-Net"] + counts.parameters(controlnet),
        ),
        "ControlNet-XS": (counts.count(lambda: joint(**inputs, controlnet_cond=hint)), counts.parameters(joint)),
    }
    for name, (step, parameters) in peers.items():
        mine, other = Spread((ours / 1e12,)), Spread((STEPS * step / 1e12,))
        yield Result(
            "peers",
            f"operations of sampling, {STEPS} steps, {size} px, LQ encode included",
            "TFLOP",
            mine,
            other,
            f"SDXL with {name}",
            other.over(mine),
            "their operations over ours",
            note=f"the paper's times: {PAPER[name]}",
            kind="counted",
        )
        mine, other = Spread((ours_parameters / 1e6,)), Spread((parameters / 1e6,))
        yield Result(
            "peers",
            "parameters for sampling",
            "M parameters",
            mine,
            other,
            f"SDXL with {name}",
            other.over(mine),
            "their parameters over ours",
            kind="counted",
        )


def measured(settings: Settings) -> Iterator[Result]:
    """Time of a guided U-Net call, and its peak with all weights; with a small U-Net on a CPU."""
    size, small = settings.loop_sizes[0], settings.on_cpu
    made: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    inputs = models.unet_inputs(2, size // SCALE, **made)
    hint = torch.rand(2, 3, size, size, **made)
    unet = models.small_unet(**made) if small else shared_unet(**made)
    alignment, encoder = models.alignment(**made), models.lq_encoder(torch.device("meta"), settings.dtype)
    _, _, condition = alignment_inputs(settings, size)
    ours = _Side(
        lambda: _faithdiff_call(unet, alignment, inputs, condition),
        sum(map(counts.parameters, (unet, alignment, encoder))),
    )
    with torch.inference_mode():
        for name, build in (("ControlNet", _controlnet_side), ("ControlNet-XS", _controlnet_xs_side)):
            theirs = build(unet, inputs, hint, small)
            yield from _against(settings, f"guided pair, {size} px, {settings.dtype_name}", ours, theirs, name)
            del theirs
            free_memory(settings.device)


@dataclass(frozen=True)
class _Side:
    """A U-Net call with what joins it, and the number of all parameters."""

    call: Work
    parameters: int


def _controlnet_side(unet: Any, inputs: dict[str, Any], hint: Tensor, small: bool) -> _Side:
    """A U-Net call with a ControlNet beside it."""
    controlnet = models.controlnet(hint.device, hint.dtype, small=small)

    def call() -> Any:
        down, middle = controlnet(**inputs, controlnet_cond=hint, return_dict=False)
        return unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    return _Side(call, counts.parameters(unet) + counts.parameters(controlnet))


def _controlnet_xs_side(unet: Any, inputs: dict[str, Any], hint: Tensor, small: bool) -> _Side:
    """A call of a U-Net with a ControlNet-XS in it."""
    joint = models.controlnet_xs(hint.device, hint.dtype, small=small)
    return _Side(lambda: joint(**inputs, controlnet_cond=hint), counts.parameters(joint))


def _faithdiff_call(unet: Any, alignment: Alignment, inputs: dict[str, Any], condition: Tensor) -> Any:
    """A U-Net call with the alignment on it; the condition is embedded, as it is in all steps but the first."""
    handle = unet.conv_in.register_forward_hook(
        lambda module, arguments, h: torch.add(h, alignment.residual(h[:1], condition))
    )
    try:
        return unet(**inputs)
    finally:
        handle.remove()


def _against(settings: Settings, case: str, ours: _Side, theirs: _Side, name: str) -> Iterator[Result]:
    times = interleaved(settings, {"ours": ours.call, "peer": theirs.call}, settings.close_rounds)
    note = f"their operations {counts.count(theirs.call) / counts.count(ours.call):.3f} of ours here"
    if settings.on_cpu:
        note += f"; {_SMALL}"
    yield timed(
        "peers",
        case,
        times["ours"],
        times["peer"],
        f"U-Net with {name}",
        ratio=times["peer"].over(times["ours"]),
        ratio_name="their time over ours",
        note=f"{note}; the paper: {PAPER[name]}",
    )
    mine, other = (
        side.parameters * settings.dtype.itemsize + peak_bytes(settings.device, side.call) for side in (ours, theirs)
    )
    yield memory(
        "peers",
        f"peak with weights, {case}",
        mine,
        other,
        f"U-Net with {name}",
        ratio=Spread((other / mine,)),
        ratio_name="their peak over ours",
        note="weights counted, activations measured" + (f"; {_SMALL}" if settings.on_cpu else ""),
    )


def training(settings: Settings) -> Iterator[Result]:
    """Memory of training steps at small shapes: all of FaithDiff's stage 2 against a ControlNet on a frozen U-Net."""
    size = TRAINING_SIZE
    ours = peak_bytes(settings.device, lambda: _train(settings, size, _faithdiff_training))
    theirs = peak_bytes(settings.device, lambda: _train(settings, size, _controlnet_training))
    yield memory(
        "peers",
        f"peak of a training step with weights and AdamW's state, one image of {size} px, fp32",
        ours,
        theirs,
        "ControlNet on a frozen U-Net",
        ratio=Spread((theirs / ours,)),
        ratio_name="their peak over ours",
        note=f"{_SMALL}; the paper, with its own baseline: {PAPER_TRAINING:.2f}",
    )


def _train(settings: Settings, size: int, build: Callable[[torch.device], tuple[list[nn.Parameter], Work]]) -> None:
    """Two steps: AdamW makes its state in the first one."""
    parameters, loss = build(settings.device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for _ in range(2):
        value = loss()
        assert isinstance(value, Tensor)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


def _learning(module: nn.Module) -> list[nn.Parameter]:
    module.requires_grad_(True)
    return list(module.parameters())


def _faithdiff_training(device: torch.device) -> tuple[list[nn.Parameter], Work]:
    unet = models.small_unet(device)
    encoder = models.lq_encoder(device, torch.float32)
    alignment = models.alignment(device, torch.float32)
    side = TRAINING_SIZE // SCALE
    inputs = models.unet_inputs(1, side, device, torch.float32)
    pixels = torch.rand(1, 3, TRAINING_SIZE, TRAINING_SIZE, device=device)

    def loss() -> Tensor:
        condition = alignment.embed(encoder(pixels))
        handle = unet.conv_in.register_forward_hook(
            lambda module, arguments, h: torch.add(h, alignment.residual(h, condition))
        )
        try:
            return unet(**inputs, return_dict=False)[0].abs().mean()
        finally:
            handle.remove()

    return [*_learning(unet), *_learning(encoder), *_learning(alignment)], loss


def _controlnet_training(device: torch.device) -> tuple[list[nn.Parameter], Work]:
    unet = models.small_unet(device)
    controlnet = models.controlnet(device, torch.float32, small=True)
    inputs = models.unet_inputs(1, TRAINING_SIZE // SCALE, device, torch.float32)
    hint = torch.rand(1, 3, TRAINING_SIZE, TRAINING_SIZE, device=device)

    def loss() -> Tensor:
        down, middle = controlnet(**inputs, controlnet_cond=hint, return_dict=False)
        prediction: Tensor = unet(
            **inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False
        )[0]
        return prediction.abs().mean()

    return _learning(controlnet), loss


def upscaler_tiles(side: int, tile: int) -> int:
    """UltimateSDUpscale's tiles of a square image: as many as cover it without overlap."""
    return math.ceil(side / tile) ** 2


def upscaler(settings: Settings) -> Iterator[Result]:
    """U-Net calls and operations a step in tiles of 1024 px, fixed and moving, against UltimateSDUpscale's tiles."""
    tile = PUBLISHED_SIZE
    padded = tile + UPSCALER_PADDING
    ours_a_tile = counts.unet_call(tile) + counts.alignment_call(tile)
    for side in (2048, 4096, 8192):
        theirs = upscaler_tiles(side, tile)
        peer = Spread((theirs * counts.unet_call(padded) / 1e12,))
        for kind, overlap in ((TileGridKind.FIXED, TILE_OVERLAP), (TileGridKind.MOVING, MOVING_OVERLAP)):
            mine = len(TileGrids(side // SCALE, side // SCALE, tile, overlap, kind))
            # A fixed tile is embedded once for all steps, a moving one in each.
            embedding = counts.embedding(tile) / (STEPS if kind is TileGridKind.FIXED else 1)
            ours = Spread((mine * (ours_a_tile + embedding) / 1e12,))
            yield Result(
                "upscaler",
                f"U-Net calls and operations a step, {side} px, {kind.value} {overlap:g}: {mine} tiles of {tile}",
                "TFLOP",
                ours,
                peer,
                f"UltimateSDUpscale, {theirs} tiles of {padded}",
                ours.over(peer),
                "operations",
                kind="counted",
            )


def rows(settings: Settings) -> Iterator[Result]:
    """All of the peers' rows."""
    yield from counted(settings)
    yield from upscaler(settings)
    yield from training(settings)
    yield from measured(settings)
