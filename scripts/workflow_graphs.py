"""The example workflows, each described once.

`build_workflows.py` makes two files of every graph: the one that people drop into the page, and its twin in API format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DEMO_SETTINGS = Path(__file__).resolve().parent.parent / "demo" / "restore.yaml"
"""Read, so that the demo workflow restores as the engine's demo does."""

CHECKPOINT = "RealVisXL_V4.0.safetensors"
FAITHDIFF = "FaithDiff.bin"
OWN_CHECKPOINT = "your_sdxl_checkpoint.safetensors"
OWN_LORA = "your_sdxl_lora.safetensors"
FEW_STEPS_LORA = "sdxl_lightning_8step_lora.safetensors"
CONTROLNET = "controlnet-canny-sdxl-1.0.safetensors"
CAPTIONER = "llava-1.5-7b-hf"
LANGUAGE_MODEL = "qwen_3_4b.safetensors"
IMAGE = "example.png"

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
    FEW_STEPS_LORA: {
        "name": FEW_STEPS_LORA,
        "url": "https://huggingface.co/ByteDance/SDXL-Lightning/resolve/main/sdxl_lightning_8step_lora.safetensors",
        "directory": "loras",
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
        "The published settings. Choose your image in **Load Image**, say in the positive prompt what is in it (the "
        "more exactly, the better), and run.\n\n"
        f"- `{FAITHDIFF}` goes into `models/faithdiff`, an SDXL checkpoint into `models/checkpoints`; the checkpoint "
        "gives text encoders and VAE, FaithDiff's file gives the U-Net.\n"
        "- For four times the size, two passes of two are more faithful: feed the result in again.\n"
        "- Little video memory: `weight_dtype` fp8_e4m3fn, and tiles of 512 in *LQ Encode* and *Tiled VAE Decode*.",
        restoration(),
    )


def sampler_inputs(suffix: str = "") -> dict[str, Any]:
    """What is connected to the sampler; the suffix names the pass."""
    return {
        "model": Link("loader"),
        "positive": Link("positive"),
        "negative": Link("negative"),
        "lq_features": Link(f"features{suffix}"),
        "latent_image": Link(f"latent{suffix}"),
    }


def restoration() -> dict[str, Node]:
    """The graph that the others are variations of."""
    return {
        "image": Node("LoadImage", {"image": IMAGE}, (0, 0)),
        "checkpoint": Node(
            "CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}, (0, 420), "SDXL checkpoint (CLIP and VAE)"
        ),
        "loader": Node("FaithDiffModelLoader", {"faithdiff_name": FAITHDIFF, "weight_dtype": "default"}, (0, 600)),
        "prepare": Node(
            "FaithDiffPrepareImage", {"image": Link("image"), "mask": Link("image", 1), "scale_by": 2.0}, (420, 0)
        ),
        "positive": Node(
            "CLIPTextEncode",
            {"clip": Link("checkpoint", 1), "text": CAPTION},
            (420, 260),
            "Positive: what is in the image",
            (400, 140),
        ),
        "negative": Node(
            "CLIPTextEncode", {"clip": Link("checkpoint", 1), "text": ""}, (420, 460), "Negative: empty", (400, 100)
        ),
        "latent": Node("VAEEncode", {"pixels": Link("prepare"), "vae": Link("checkpoint", 2)}, (420, 620)),
        "features": Node("FaithDiffLQEncode", {"faithdiff": Link("loader", 1), "pixels": Link("prepare")}, (420, 740)),
        "sampler": Node("FaithDiffSampler", sampler_inputs(), (880, 0), size=(340, 560)),
        "decode": Node(
            "FaithDiffTiledVAEDecode", {"samples": Link("sampler"), "vae": Link("checkpoint", 2)}, (1280, 0)
        ),
        "finish": Node(
            "FaithDiffFinishImage",
            {"image": Link("decode"), "frame": Link("prepare", 1), "color_fix": "adain"},
            (1280, 180),
        ),
        "save": Node(
            "SaveImage", {"images": Link("finish"), "filename_prefix": "FaithDiff"}, (1640, 0), size=(480, 480)
        ),
    }


def faithdiff_4x_progressive() -> Graph:
    """Two passes of 2x: more faithful than one of 4x, faces above all (the authors' advice)."""
    nodes = restoration()
    save = nodes.pop("save")
    second = {
        "prepare_2": Node("FaithDiffPrepareImage", {"image": Link("finish"), "mask": Link("finish", 1)}, (0, 900)),
        "latent_2": Node("VAEEncode", {"pixels": Link("prepare_2"), "vae": Link("checkpoint", 2)}, (420, 900)),
        "features_2": Node(
            "FaithDiffLQEncode", {"faithdiff": Link("loader", 1), "pixels": Link("prepare_2")}, (420, 1020)
        ),
        "sampler_2": Node(
            "FaithDiffSampler",
            sampler_inputs("_2"),
            (880, 900),
            "FaithDiff Sampler: second pass",
            (340, 560),
        ),
        "decode_2": Node(
            "FaithDiffTiledVAEDecode", {"samples": Link("sampler_2"), "vae": Link("checkpoint", 2)}, (1280, 900)
        ),
        "finish_2": Node(
            "FaithDiffFinishImage", {"image": Link("decode_2"), "frame": Link("prepare_2", 1)}, (1280, 1080)
        ),
    }
    save.inputs["images"] = Link("finish_2")
    save.at = (1640, 900)
    return Graph(
        "faithdiff_4x_progressive",
        "## FaithDiff, four times the size in two passes\n\n"
        "Twice the size, and twice again. The second pass sees the restored image of the first, so it has to invent "
        "less than one pass of four would; faces profit most.\n\n"
        "The second pass works on four times the pixels and takes about four times as long, in tiles.",
        {**nodes, **second, "save": save},
    )


def faithdiff_own_checkpoint_lora() -> Graph:
    """A MODEL of the user's, with a LoRA, moved towards FaithDiff's U-Net."""
    nodes = restoration()
    nodes["checkpoint"].inputs["ckpt_name"] = OWN_CHECKPOINT
    nodes["checkpoint"].title = "Your SDXL checkpoint"
    nodes["lora"] = Node(
        "LoraLoaderModelOnly",
        {"model": Link("checkpoint"), "lora_name": OWN_LORA, "strength_model": 0.8},
        (0, 780),
        "Your LoRA",
    )
    nodes["loader"].inputs |= {"model": Link("lora"), "unet_strength": 0.8}
    nodes["loader"].at = (0, 940)
    return Graph(
        "faithdiff_own_checkpoint_lora",
        "## FaithDiff on your own checkpoint and LoRA\n\n"
        "`unet_strength` moves your checkpoint's U-Net towards FaithDiff's: 1 follows the image most closely, 0 "
        "keeps your style and follows it least. 0.6 to 0.9 is a good range. The LoRA keeps its full strength, before "
        "the loader (as here) or behind it.\n\n"
        "Choose your files in **Load Checkpoint** and **Load LoRA**.",
        nodes,
    )


def faithdiff_few_steps() -> Graph:
    """Eight steps without guidance, by a Lightning LoRA."""
    nodes = restoration()
    nodes["lora"] = Node(
        "LoraLoaderModelOnly",
        {"model": Link("loader"), "lora_name": FEW_STEPS_LORA, "strength_model": 1.0},
        (420, 940),
        "Few-step LoRA",
    )
    nodes["sampler"].inputs |= {"model": Link("lora"), "steps": 8, "cfg": 1.0, "scheduler": "sgm_uniform"}
    return Graph(
        "faithdiff_few_steps",
        "## FaithDiff in 8 steps\n\n"
        "A few-step LoRA for **SDXL base** (Lightning here; DMD2 works with 4 steps and the sampler `lcm`) on "
        "FaithDiff's U-Net, with cfg 1: a fifth of the usual work. Expect smoother textures than with 20 steps.\n\n"
        "The LoRA's steps must match its file: an 8-step LoRA with 8 steps. At cfg 1 the negative prompt has no "
        "effect.",
        nodes,
    )


def faithdiff_low_vram() -> Graph:
    """Eight-bit weights and small tiles."""
    nodes = restoration()
    nodes["loader"].inputs["weight_dtype"] = "fp8_e4m3fn"
    nodes["latent"] = Node(
        "VAEEncodeTiled",
        {"pixels": Link("prepare"), "vae": Link("checkpoint", 2), "tile_size": 512, "overlap": 64},
        nodes["latent"].at,
    )
    nodes["features"].inputs["tile_size"] = 512
    nodes["features"].at = (420, 860)
    nodes["sampler"].inputs |= {"tile_size": 768, "tile_batch": 1}
    nodes["decode"].inputs["tile_size"] = 512
    return Graph(
        "faithdiff_low_vram",
        "## FaithDiff with 6 to 8 GB of video memory\n\n"
        "- weights in fp8: half the memory of fp16\n"
        "- encoding and decoding in tiles of 512, sampling in tiles of 768, one at a time\n\n"
        "Still too much? Sample in tiles of 512. The image's size hardly matters: only a tile is on the card.",
        nodes,
    )


def faithdiff_batch_folder() -> Graph:
    """Every image of a folder, whatever its size."""
    nodes = restoration()
    nodes["image"] = Node("LoadImageDataSetFromFolder", {"folder": "restore"}, (0, 0), "All images of input/restore")
    nodes["prepare"].inputs = {"image": Link("image"), "scale_by": 2.0}
    nodes["sampler"].inputs["seed"] = 42
    return Graph(
        "faithdiff_batch_folder",
        "## FaithDiff for a folder\n\n"
        "Put images of any sizes into a folder below ComfyUI's `input` (here `input/restore`). They are restored one "
        "after the other with one caption; the models are loaded once.\n\n"
        "For a caption of its own for each image, put FaithDiff Caption between the images and the positive "
        "prompt, as in *faithdiff_auto_caption*.",
        nodes,
    )


def faithdiff_auto_caption() -> Graph:
    """A caption by a local vision-language model."""
    nodes = restoration()
    nodes["caption"] = Node(
        "FaithDiffCaption", {"image": Link("prepare"), "model": CAPTIONER}, (420, 960), size=(400, 420)
    )
    nodes["positive"].inputs["text"] = Link("caption")
    return Graph(
        "faithdiff_auto_caption",
        "## FaithDiff with a caption made for it\n\n"
        "FaithDiff was trained with captions of LLaVA-1.5. **FaithDiff Caption** asks a local model the same question "
        "and trims the answer as the published code does.\n\n"
        f"Put a model folder (`{CAPTIONER}`, or any image-to-text model that transformers loads) into `models/LLM`, or "
        "switch `allow_download` on and name a hub id.",
        nodes,
    )


def faithdiff_other_captioner() -> Graph:
    """A caption by ComfyUI's own text generation."""
    nodes = restoration()
    nodes["language_model"] = Node(
        "CLIPLoader", {"clip_name": LANGUAGE_MODEL, "type": "stable_diffusion"}, (0, 800), "A vision-language model"
    )
    nodes["caption"] = Node(
        "TextGenerate",
        {
            "clip": Link("language_model"),
            "image": Link("prepare"),
            "prompt": "Describe this image and its style in a very detailed manner.",
            "max_length": 256,
            "sampling_mode": "off",
        },
        (420, 960),
        size=(400, 260),
    )
    nodes["trim"] = Node("FaithDiffTrimCaption", {"caption": Link("caption")}, (420, 1260))
    nodes["positive"].inputs["text"] = Link("trim")
    return Graph(
        "faithdiff_other_captioner",
        "## FaithDiff with another captioner\n\n"
        "Any node that gives a text will do. Here ComfyUI's own **Generate Text** looks at the image through a "
        "vision-language model in `models/text_encoders`, and **FaithDiff Trim Caption** drops the lead-in and keeps "
        "two sentences.",
        nodes,
    )


def faithdiff_controlnet() -> Graph:
    """A ControlNet beside the alignment."""
    nodes = restoration()
    nodes["edges"] = Node("Canny", {"image": Link("prepare")}, (420, 940))
    nodes["controlnet"] = Node("ControlNetLoader", {"control_net_name": CONTROLNET}, (0, 800))
    nodes["control"] = Node(
        "ControlNetApplyAdvanced",
        {
            "positive": Link("positive"),
            "negative": Link("negative"),
            "control_net": Link("controlnet"),
            "image": Link("edges"),
            "strength": 0.4,
            "end_percent": 0.6,
        },
        (420, 1080),
    )
    nodes["sampler"].inputs |= {"positive": Link("control"), "negative": Link("control", 1)}
    return Graph(
        "faithdiff_controlnet",
        "## FaithDiff with a ControlNet\n\n"
        "FaithDiff needs none. Where outlines matter more than anything (drawings, plans), a light one can help; every "
        "tile gets its part of the hint.\n\n"
        f"`{CONTROLNET}` stands for any ControlNet for SDXL in `models/controlnet`.",
        nodes,
    )


def faithdiff_demo() -> Graph:
    """The small model that comes with the pack, with the settings it is demonstrated with (demo/restore.yaml)."""
    settings = yaml.safe_load(DEMO_SETTINGS.read_text(encoding="utf-8"))
    nodes = restoration()
    del nodes["checkpoint"], nodes["loader"]
    nodes["models"] = Node("FaithDiffDemoModels", {}, (0, 420))
    outputs = {Link("loader"): 0, Link("checkpoint", 1): 1, Link("checkpoint", 2): 2, Link("loader", 1): 3}
    for node in nodes.values():
        for name, value in node.inputs.items():
            if value in outputs:
                node.inputs[name] = Link("models", outputs[value])
    nodes["prepare"].inputs["scale_by"] = float(settings["scale"])
    nodes["positive"].inputs["text"] = settings.get("prompt", "")
    nodes["negative"].inputs["text"] = settings.get("negative_prompt", "")
    nodes["sampler"].inputs |= {
        "seed": settings["seed"],
        "steps": settings["steps"],
        "cfg": settings["cfg"],
        "start_point": settings["start"],
        "tile_size": settings["tile"],
        "overlap": settings["overlap"],
    }
    nodes["finish"].inputs["color_fix"] = settings["color_fix"]
    return Graph(
        "faithdiff_demo",
        "## FaithDiff without a download\n\n"
        "A small model comes with this pack, to try the nodes out: all parts of FaithDiff, about a thousand times "
        "smaller. It runs on any computer in seconds.\n\n"
        "It was trained briefly, on a few dozen photographs, for one kind of damage: **half the size, slight blur, "
        "strong noise, JPEG**. Such images come out cleaner, if softer; clean images come out worse. The captions "
        "of its training say no more than `A photograph.` or `A drawing.`\n\n"
        "For results like the paper's, take *faithdiff_2x*.",
        nodes,
    )


GRAPHS: tuple[Callable[[], Graph], ...] = (
    faithdiff_2x,
    faithdiff_4x_progressive,
    faithdiff_own_checkpoint_lora,
    faithdiff_few_steps,
    faithdiff_low_vram,
    faithdiff_batch_folder,
    faithdiff_auto_caption,
    faithdiff_other_captioner,
    faithdiff_controlnet,
    faithdiff_demo,
)
"""All workflows, in the order of the template browser."""


@dataclass(frozen=True)
class Blueprint:
    """A graph that becomes one node.

    Attributes:
        graph: what is inside.
        name: the node's name.
        category: where the page lists it.
        inputs: (name, node's key, input) of everything that can be set or connected from outside, in order.
        outputs: (name, link) of what comes out.
    """

    graph: Graph
    name: str
    category: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, Link], ...]


def restore_blueprint() -> Blueprint:
    """The whole restoration in one node."""
    nodes = restoration()
    for key in ("image", "save"):
        del nodes[key]
    nodes["prepare"].inputs = {"scale_by": 2.0}
    return Blueprint(
        Graph(
            "faithdiff_restore",
            "Restores and enlarges an image with FaithDiff: the published settings in one node.",
            nodes,
        ),
        "FaithDiff Restore",
        "FaithDiff",
        (
            ("image", "prepare", "image"),
            ("mask", "prepare", "mask"),
            ("prompt", "positive", "text"),
            ("scale_by", "prepare", "scale_by"),
            ("seed", "sampler", "seed"),
            ("steps", "sampler", "steps"),
            ("cfg", "sampler", "cfg"),
            ("ckpt_name", "checkpoint", "ckpt_name"),
            ("faithdiff_name", "loader", "faithdiff_name"),
        ),
        (("image", Link("finish")), ("mask", Link("finish", 1))),
    )


BLUEPRINTS: tuple[Callable[[], Blueprint], ...] = (restore_blueprint,)
"""All subgraph blueprints."""
