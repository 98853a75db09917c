"""Row of the attribution maps: a U-Net call whose cross-attention is recorded beside one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from faithdiff_core.attribution.recorder import CrossAttentionRecorder, RecordedRow
from faithdiff_core.tiling.grid import Tile

from . import models
from .measure import interleaved, peak_bytes
from .results import Result, Target, memory, timed
from .rows_core import shared_unet
from .settings import SCALE, Settings

TARGET = Target("<=", 1.1)

SMALL_SIZE = 512
"""Pixels of the images of the small U-Net, whose attention then has up to 1024 positions."""


def rows(settings: Settings) -> Iterator[Result]:
    """A guided call of a small U-Net in fp32, and of SDXL's unless the run is a quick one on a CPU."""
    about = f"a U-Net of {models.SMALL_UNET['block_out_channels']} channels"
    yield from _recorded(settings, models.small_unet(settings.device), torch.float32, SMALL_SIZE, about)
    if settings.quick and settings.on_cpu:
        return
    unet = shared_unet(settings.device, settings.dtype)
    for size in settings.sizes:
        yield from _recorded(settings, unet, settings.dtype, size, "SDXL's U-Net")


def _recorded(settings: Settings, unet: Any, dtype: torch.dtype, size: int, about: str) -> Iterator[Result]:
    side = size // SCALE
    call = partial(unet, **models.unet_inputs(2, side, settings.device, dtype))
    recorder = CrossAttentionRecorder()
    positive = [RecordedRow(row=1, image=0, tile=Tile(0, 0, side, side), tokens=models.TOKENS)]

    def recorded() -> None:
        recorder.begin(models.TOKENS)
        with recorder.watching(unet), recorder.call(positive, 2, 1, (side, side), settings.device):
            call()

    case = f"guided pair with {models.TOKENS} tokens recorded, {size} px"
    with torch.inference_mode():
        times = interleaved(settings, {"ours": recorded, "plain": call}, settings.close_rounds)
        peaks = peak_bytes(settings.device, recorded), peak_bytes(settings.device, call)
    yield timed("attribution", case, times["ours"], times["plain"], "not recorded", target=TARGET, note=about)
    yield memory("attribution", f"peak of activations, {case}", *peaks, "not recorded", note=about)
