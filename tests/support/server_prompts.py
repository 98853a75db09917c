"""Prompts for the server: an uploaded image to a saved one."""

from __future__ import annotations

from typing import Any

from comfy_host import Graph, Node

SAMPLER: dict[str, Any] = {
    "seed": 1,
    "steps": 2,
    "cfg": 5.0,
    "sampler_name": "euler",
    "scheduler": "faithdiff",
    "start_point": "lr",
    "denoise": 1.0,
    "tile_size": 64,
    "overlap": 0.5,
    "tile_batch": 0,
}


def restoration(
    photo: str,
    source: tuple[list[Any], Node],
    texts: tuple[list[Any], list[Any]],
    vae: list[Any],
    graph: Graph,
    **kw: Any,
) -> Graph:
    """A restoration of an uploaded image to a saved one."""
    _, loader = source
    loaded = graph.add("LoadImage", image=photo)
    prepare = graph.add(
        "FaithDiffPrepareImage", image=loaded[0], mask=loaded[1], scale_by=2.0, longest_side=0, multiple=8
    )
    features = graph.add("FaithDiffLQEncode", faithdiff=loader[1], pixels=prepare[0], tile_size=1024, overlap=0.25)
    sampled = graph.add(
        "FaithDiffSampler",
        model=loader[0],
        positive=texts[0],
        negative=texts[1],
        lq_features=features[0],
        latent_image=graph.add("VAEEncode", pixels=prepare[0], vae=vae)[0],
        **(SAMPLER | kw),
    )
    decoded = graph.add("FaithDiffTiledVAEDecode", samples=sampled[0], vae=vae, tile_size=64, overlap=0.25)
    finish = graph.add("FaithDiffFinishImage", image=decoded[0], frame=prepare[1], color_fix="adain")
    graph.add("SaveImage", images=finish[0], filename_prefix="faithdiff")
    return graph


def tiny(photo: str, **kw: Any) -> Graph:
    """A restoration with the tiny model."""
    graph = Graph()
    base = graph.add("TestModel", weights="golden", seed=0)
    loader = graph.add(
        "FaithDiffModelLoader", faithdiff_name="faithdiff_tiny.safetensors", weight_dtype="default", model=base[0]
    )
    text = {"seed": 0, "width": 64, "pooled_width": 64, "tokens": 77}
    texts = tuple(graph.add("TestConditioning", which=which, **text)[0] for which in ("positive", "negative"))
    vae = graph.add("TestVAE")
    return restoration(photo, (base[0], loader), (texts[0], texts[1]), vae[0], graph, **kw)
