"""Restorations with the tiny model in the in-process host, for several test files.

Everything is called through the node classes, as the executor would, with tensors at hand for comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_host import Host
from torch import Tensor

from faithdiff_core.tiling.grid import Tile

GOLDEN_FILE = "faithdiff_tiny.safetensors"


def relative(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max())


class GivenNoise:
    """A NOISE that is the tensor it was made with."""

    def __init__(self, noise: Tensor, seed: int = 0) -> None:
        self.noise, self.seed = noise, seed

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        return self.noise.clone()


@dataclass
class Setup:
    """A loaded tiny FaithDiff and the golden texts.

    Attributes:
        model: alignment-patched MODEL.
        faithdiff: FAITHDIFF.
        positive, negative: the golden CONDITIONINGs.
    """

    host: Host
    model: Any
    faithdiff: Any
    positive: list[Any]
    negative: list[Any]

    def features(self, images: Tensor, tile: int = 1024, overlap: float = 0.25) -> Any:
        """LQ_FEATURES of images (B, H, W, 3)."""
        return self.host.call(
            "FaithDiffLQEncode", faithdiff=self.faithdiff, pixels=images, tile_size=tile, overlap=overlap
        )[0]

    def conditioned(self, features: Any, **kw: Any) -> tuple[Any, Any]:
        """The golden CONDITIONINGs with LQ features."""
        settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0} | kw
        return self.host.call(
            "FaithDiffConditioning", positive=self.positive, negative=self.negative, lq_features=features, **settings
        )

    def tiled(self, model: Any, tile: int, overlap: float = 0.5, batch: int = 0, **more: Any) -> Any:
        """A MODEL that samples in tiles."""
        return self.host.call(
            "FaithDiffTiledDiffusion", model=model, tile_size=tile, overlap=overlap, tile_batch=batch, **more
        )[0]

    def restore(self, features: Any, **kw: Any) -> Tensor:
        """The latent (B, 4, h, w) of FaithDiffSampler."""
        settings: dict[str, Any] = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "lq_features": features,
            "seed": 42,
            "steps": 3,
            "cfg": 5.0,
            "sampler_name": "euler",
            "scheduler": "faithdiff",
            "start_point": "noise",
            "denoise": 1.0,
            "tile_size": 1024,
            "overlap": 0.5,
            "tile_batch": 0,
        }
        return self.host.call("FaithDiffSampler", **(settings | kw))[0]["samples"]

    def guided(
        self, guider: Any, noise: Tensor, latent: dict[str, Any], sigmas: Tensor, sampler: str = "euler"
    ) -> Tensor:
        """The stock SamplerCustomAdvanced with a GUIDER."""
        return self.host.call(
            "SamplerCustomAdvanced",
            noise=GivenNoise(noise),
            guider=guider,
            sampler=self.host.call("KSamplerSelect", sampler_name=sampler)[0],
            sigmas=sigmas,
            latent_image=latent,
        )[0]["samples"]

    def cfg_guider(self, model: Any, positive: Any, negative: Any, cfg: float) -> Any:
        return self.host.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]


def load(host: Host, name: str = GOLDEN_FILE, **kw: Any) -> Setup:
    """Load the tiny FaithDiff; `model` and `unet_strength` as in the loader. Defaults to the golden U-Net."""
    settings: dict[str, Any] = {"weight_dtype": "default", "unet_strength": 1.0} | kw
    if "model" not in settings:
        settings["model"] = host.call("TestModel")[0]
    model, faithdiff = host.call("FaithDiffModelLoader", faithdiff_name=name, **settings)
    positive = host.call("TestConditioning", which="positive")[0]
    negative = host.call("TestConditioning", which="negative")[0]
    return Setup(host, model, faithdiff, positive, negative)


def random_restoration(host: Host, model: Any, faithdiff: Any) -> Tensor:
    """The latent of one step with a model in SDXL's widths, from a random image and random texts."""
    generator = torch.Generator().manual_seed(0)
    texts: list[list[Any]] = [
        [[torch.randn(1, 77, 2048, generator=generator), {"pooled_output": torch.randn(1, 1280, generator=generator)}]]
        for _ in range(2)
    ]
    setup = Setup(host, model, faithdiff, *texts)
    return setup.restore(setup.features(images(64, 64)), steps=1)


def sized(conditioning: Any, tile: Tile, size: tuple[int, int], target: int) -> Any:
    """The published size conditioning of a tile, by the host's own keys (CLIPTextEncodeSDXL's).

    Args:
        conditioning: a CONDITIONING.
        tile: in latent units.
        size: of the whole image, (height, width), in pixels.
        target: the tile size in pixels.
    """
    sizes = {
        "height": size[0],
        "width": size[1],
        "crop_h": tile.top,
        "crop_w": tile.left,
        "target_height": target,
        "target_width": target,
    }
    return [[entry[0], {**entry[1], **sizes}] for entry in conditioning]


def images(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random images (B, H, W, 3)."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
