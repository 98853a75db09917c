"""Nodes that give images, conditioning and noise, and one that keeps what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.sample
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from . import golden
from .models import CATEGORY, seed_input


def photograph(width: int, height: int) -> Tensor:
    """A real photograph, scaled to fill the frame and cropped: (1, height, width, 3) in 0..1."""
    import skimage
    from PIL import Image, ImageOps

    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0)[None]


def random_images(width: int, height: int, batch: int, seed: int) -> Tensor:
    """Smooth random images, each another: (batch, height, width, 3) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    fine = torch.rand(batch, 3, height, width, generator=generator)
    return (0.8 * smooth + 0.2 * fine).clamp(0, 1).movedim(1, -1).contiguous()


class GivenNoise:
    """A NOISE that always is the tensor it was made with."""

    def __init__(self, noise: Tensor) -> None:
        self.seed = 0
        self.noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """The tensor.

        Raises:
            ValueError: the latent has another shape.
        """
        if latent["samples"].shape != self.noise.shape:
            raise ValueError(f"the noise is {tuple(self.noise.shape)}, the latent {tuple(latent['samples'].shape)}")
        return self.noise.clone()


class SeededNoise:
    """A NOISE drawn as the host's RandomNoise does, from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise of the latent's shape."""
        noise: Tensor = comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))
        return noise


class TestConditioning(io.ComfyNode):
    """The golden embeddings, or random ones of any width."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestConditioning",
            category=CATEGORY,
            inputs=[
                io.Combo.Input("which", options=["positive", "negative", "random"], default="positive"),
                seed_input(),
                io.Int.Input("width", default=64, min=1, max=8192, tooltip="Of random embeddings; SDXL has 2048."),
                io.Int.Input("pooled_width", default=64, min=1, max=8192, tooltip="Likewise; SDXL has 1280."),
                io.Int.Input("tokens", default=77, min=1, max=4096),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, which: str = "positive", seed: int = 0, width: int = 64, pooled_width: int = 64, tokens: int = 77
    ) -> io.NodeOutput:
        if which == "random":
            generator = torch.Generator().manual_seed(seed)
            context = torch.randn(1, tokens, width, generator=generator)
            pooled = torch.randn(1, pooled_width, generator=generator)
        else:
            key = which[:3]
            context, pooled = golden.expected()[key].clone(), golden.expected()[f"{key}_pooled"].clone()
        return io.NodeOutput([[context, {"pooled_output": pooled}]])


class TestImage(io.ComfyNode):
    """A photograph or smooth random images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestImage",
            category=CATEGORY,
            inputs=[
                io.Combo.Input("kind", options=["photograph", "random"], default="random"),
                io.Int.Input("width", default=128, min=8, max=8192),
                io.Int.Input("height", default=128, min=8, max=8192),
                io.Int.Input("batch", default=1, min=1, max=64),
                seed_input(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, kind: str = "random", width: int = 128, height: int = 128, batch: int = 1, seed: int = 0
    ) -> io.NodeOutput:
        if kind == "photograph":
            return io.NodeOutput(photograph(width, height).repeat(batch, 1, 1, 1))
        return io.NodeOutput(random_images(width, height, batch, seed))


class TestGoldenCase(io.ComfyNode):
    """The inputs of a golden case: its image, VAE latent (zeros for a start from noise), noise and sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestGoldenCase",
            category=CATEGORY,
            inputs=[io.Combo.Input("case", options=golden.case_names())],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Latent.Output(display_name="latent_image"),
                io.Noise.Output(display_name="noise"),
                io.Sigmas.Output(display_name="sigmas"),
            ],
        )

    @classmethod
    def execute(cls, case: str) -> io.NodeOutput:
        data = golden.expected()
        image = (data[f"{case}.image"].movedim(1, -1) + 1) / 2
        noise = data[f"{case}.noise"]
        latent = data.get(f"{case}.lr_latent", torch.zeros_like(noise)) / golden.VAE_SCALING_FACTOR
        sigmas = torch.tensor(golden.case(case)["sigmas"])
        return io.NodeOutput(image, {"samples": latent}, GivenNoise(noise), sigmas)


class TestNoise(io.ComfyNode):
    """The noise of a golden case, or noise from a seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestNoise",
            category=CATEGORY,
            inputs=[io.Combo.Input("which", options=["seeded", *golden.case_names()], default="seeded"), seed_input()],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, which: str = "seeded", seed: int = 0) -> io.NodeOutput:
        if which == "seeded":
            return io.NodeOutput(SeededNoise(seed))
        return io.NodeOutput(GivenNoise(golden.expected()[f"{which}.noise"]))


class TestCapture(io.ComfyNode):
    """Keeps whatever it is given under a name, for a test in the same process to look at."""

    kept: ClassVar[dict[str, Any]] = {}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestCapture",
            category=CATEGORY,
            is_output_node=True,
            inputs=[io.AnyType.Input("value"), io.String.Input("name")],
            outputs=[],
        )

    @classmethod
    def fingerprint_inputs(cls, value: Any = None, name: str = "") -> float:
        return float("nan")  # never answered from the cache: the value must be kept again for each run

    @classmethod
    def execute(cls, value: Any, name: str) -> io.NodeOutput:
        TestCapture.kept[name] = value
        return io.NodeOutput()
