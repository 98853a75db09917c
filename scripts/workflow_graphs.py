"""The example workflows, each described once.

`build_workflows.py` makes two files of every graph: the one that people drop into the page, and its twin in API format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CHECKPOINT = "RealVisXL_V4.0.safetensors"
FAITHDIFF = "FaithDiff.bin"
PICTURE = "example.png"

CAPTION = "a photograph"

DOWNLOADS: dict[str, dict[str, str]] = {
    CHECKPOINT: {
        "name": CHECKPOINT,
        "url": "https://huggingface.co/SG161222/RealVisXL_V4.0/resolve/main/RealVisXL_V4.0.safetensors",
        "directory": "checkpoints",
    },
    FAITHDIFF: {
        "name": FAITHDIFF,
        "url": "https://huggingface.co/jychen9811/FaithDiff/resolve/main/FaithDiff.bin",
        "directory": "faithdiff",
    },
}
"""Where the page offers to get a missing model from."""


@dataclass(frozen=True)
class Link:
    """One output of a node.

    Attributes:
        node: the node's key in its graph.
        slot: number of the output.
    """

    node: str
    slot: int = 0


@dataclass
class Node:
    """One node of a graph.

    Attributes:
        type: the class's id in the host.
        inputs: values of widgets and links, by input name; what is missing has its default.
        at: position on the canvas, in pixels.
        title: shown instead of the class's display name.
        size: width and height in pixels; the page's own unless told.
    """

    type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    at: tuple[int, int] = (0, 0)
    title: str | None = None
    size: tuple[int, int] | None = None


@dataclass
class Graph:
    """A workflow.

    Attributes:
        name: the file's name without its ending.
        description: first lines of the note on the canvas, in Markdown.
        nodes: by key.
    """

    name: str
    description: str
    nodes: dict[str, Node]


def faithdiff_2x() -> Graph:
    """The published settings: scale 2, 20 steps, cfg 5, start `lr`, adain."""
    return Graph(
        "faithdiff_2x",
        "## FaithDiff, twice the size\n\n"
        "The published settings. Choose your picture in **Load Image**, say in the positive prompt what is in it (the more "
        "exactly, the better), and run.\n\n"
        f"- `{FAITHDIFF}` goes into `models/faithdiff`, an SDXL checkpoint into `models/checkpoints`; the checkpoint gives "
        "text encoders and VAE, FaithDiff's file gives the U-Net.\n"
        "- For four times the size, two passes of two are more faithful: feed the result in again.\n"
        "- Little video memory: `weight_dtype` fp8_e4m3fn, and tiles of 512 in *LQ Encode* and *Tiled VAE Decode*.",
        restoration(),
    )


def restoration() -> dict[str, Node]:
    """The graph that the others are variations of."""
    return {
        "picture": Node("LoadImage", {"image": PICTURE}, (0, 0)),
        "checkpoint": Node("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}, (0, 420), "SDXL checkpoint (CLIP and VAE)"),
        "loader": Node("FaithDiffModelLoader", {"faithdiff_name": FAITHDIFF, "weight_dtype": "default"}, (0, 600)),
        "prepare": Node("FaithDiffPrepareImage", {"image": Link("picture"), "scale_by": 2.0}, (420, 0)),
        "positive": Node(
            "CLIPTextEncode",
            {"clip": Link("checkpoint", 1), "text": CAPTION},
            (420, 260),
            "Positive: what is in the picture",
            (400, 140),
        ),
        "negative": Node(
            "CLIPTextEncode", {"clip": Link("checkpoint", 1), "text": ""}, (420, 460), "Negative: empty", (400, 100)
        ),
        "latent": Node("VAEEncode", {"pixels": Link("prepare"), "vae": Link("checkpoint", 2)}, (420, 620)),
        "features": Node("FaithDiffLQEncode", {"faithdiff": Link("loader", 1), "pixels": Link("prepare")}, (420, 740)),
        "sampler": Node(
            "FaithDiffSampler",
            {
                "model": Link("loader"),
                "positive": Link("positive"),
                "negative": Link("negative"),
                "lq_features": Link("features"),
                "latent_image": Link("latent"),
            },
            (880, 0),
            size=(340, 560),
        ),
        "decode": Node(
            "FaithDiffTiledVAEDecode", {"samples": Link("sampler"), "vae": Link("checkpoint", 2)}, (1280, 0)
        ),
        "finish": Node(
            "FaithDiffFinishImage",
            {"image": Link("decode"), "frame": Link("prepare", 1), "color_fix": "adain"},
            (1280, 180),
        ),
        "save": Node("SaveImage", {"images": Link("finish"), "filename_prefix": "FaithDiff"}, (1640, 0), size=(480, 480)),
    }


GRAPHS: tuple[Callable[[], Graph], ...] = (faithdiff_2x,)
"""All workflows, in the order of the template browser."""
