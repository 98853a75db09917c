"""The HDR effect of FaithDiff Prepare Image: the published formula in its pixels, and the engine's image at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_host import Host
from support.golden import Golden
from support.host_sampling import GivenNoise, gaussian, images, load

from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.images.geometry import resize_lanczos
from faithdiff_core.images.hdr import hdr_effect


@torch.no_grad()
def test_the_effect_reaches_the_pixels_and_the_final_image(host: Host, tiny_sdxl: Path, golden: Golden) -> None:
    setup, engine = load(host), FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    text = engine.encode_text(["a stone wall"])
    assert text.negative_embeds is not None
    setup.positive = [[text.embeds, {"pooled_output": text.pooled}]]
    setup.negative = [[text.negative_embeds, {"pooled_output": text.negative_pooled}]]
    image, noise, vae = images(36, 44), gaussian(1, 4, 9, 11), host.call("TestVAE")[0]
    options: dict[str, Any] = {"steps": 2, "cfg": 3.0, "overlap": 0.25}

    def through_the_nodes(hdr: float) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"image": image, "scale_by": 2.0, "longest_side": 0, "multiple": 8, "hdr": hdr}
        pixels, frame = host.call("FaithDiffPrepareImage", **given)
        latent = host.call("VAEEncode", pixels=pixels, vae=vae)[0]
        samples = setup.restore(
            setup.features(pixels),
            start_point="lr",
            latent_image=latent,
            tile_size=64,
            noise=GivenNoise(noise),
            **options,
        )
        decoded = host.call(
            "FaithDiffTiledVAEDecode", samples={"samples": samples}, vae=vae, tile_size=512, overlap=0.25
        )[0]
        return pixels, host.call("FaithDiffFinishImage", image=decoded, frame=frame, color_fix="adain")[0]

    large = resize_lanczos(image.movedim(-1, 1), 72, 88)
    results = []
    for hdr in (0.0, 1.5):
        pixels, result = through_the_nodes(hdr)
        assert torch.allclose(pixels.movedim(-1, 1), hdr_effect(large, hdr), atol=1e-6)
        expected = engine(
            image.movedim(-1, 1), prompt="a stone wall", noise=noise, seed=1, scale=2.0, hdr=hdr, tile=64, **options
        )
        assert (result.movedim(-1, 1) - expected).abs().max() < 1e-3
        results.append(result)
    assert (results[0] - results[1]).abs().max() > 0.02
