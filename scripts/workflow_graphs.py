"""The example workflows, each described once.

`build_workflows.py` makes two files of every graph: the one that people drop into the page, and its twin in API format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from workflow_layout import Group
from workflow_notes import FILES, NOTES, Note

DEMO_SETTINGS = Path(__file__).resolve().parent.parent / "demo" / "restore.yaml"
"""Read, so that the demo workflow restores as the engine's demo does."""

CHECKPOINT = "RealVisXL_V4.0.safetensors"
FAITHDIFF = "FaithDiff.bin"
OWN_CHECKPOINT = "your_sdxl_checkpoint.safetensors"
OWN_LORA = "your_sdxl_lora.safetensors"
FEW_STEPS_LORA = "sdxl_lightning_8step_lora.safetensors"
CONTROLNET = "controlnet-canny-sdxl-1.0.safetensors"
CAPTIONER = "llava-1.5-7b-hf"
LANGUAGE_MODEL = "qwen3vl_4b_fp8_scaled.safetensors"
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
    LANGUAGE_MODEL: {
        "name": LANGUAGE_MODEL,
        "url": f"https://huggingface.co/Comfy-Org/Qwen3-VL/resolve/main/text_encoders/{LANGUAGE_MODEL}",
        "directory": "text_encoders",
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
        title: shown instead of the class's display name.
        height: in pixels, where the node is to be higher than its content.
        page_title: shown in the page instead of the title, where that would be cut.
    """

    type: str
    inputs: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    height: int = 0
    page_title: str | None = None


@dataclass
class Graph:
    """A workflow.

    Attributes:
        name: the file's name without its ending.
        nodes: by key.
        groups: where nodes and notes stand; without any, the usual four.
        notes: by key; each stands in a group.
        page_only: keys of nodes that only show something in the page, and are left out of the API format.
    """

    name: str
    nodes: dict[str, Node]
    groups: tuple[Group, ...] = ()
    notes: dict[str, Note] = field(default_factory=dict)
    page_only: frozenset[str] = frozenset({"compare"})


MOVING: dict[str, Any] = {"tile_grid": "moving", "overlap": 0.125}
"""A grid that moves needs no more overlap."""

LOAD, PREPARE, RESTORE, FINISH, RESULT = "#4a9fd0", "#c9973f", "#4fae80", "#9a7fd1", "#c96f8b"
"""Colours of the groups."""

THREE_COLUMNS = 840
"""Width of a group with three columns of nodes, in pixels."""

Rows = tuple[tuple[tuple[str, ...], ...], ...]


def usual_groups(
    *,
    load: Rows = ((("about",),), (("image",), ("checkpoint", "loader")), (("files",),)),
    prepare: Rows = ((("positive",),), (("negative",),), (("prepare",), ("latent", "features"))),
    restore: Rows = ((("sampler",),),),
    finish: Rows = ((("decode",),), (("finish",),), (("tips",),)),
    load_width: int = 600,
    prepare_width: int = 600,
    prepare_shares: tuple[int, ...] = (),
    shown: Rows = ((("compare",), ("save",)),),
) -> tuple[Group, ...]:
    """Load, prepare, restore, finish, and the result below them."""
    return (
        Group("1  Load", LOAD, load_width, load),
        Group("2  Prepare", PREPARE, prepare_width, prepare, shares=prepare_shares),
        Group("3  Restore", RESTORE, 300, restore),
        Group("4  Finish", FINISH, 300, finish),
        result("5  Result", (1, 2), shown),
    )


def result(title: str, below: tuple[int, int], rows: Rows = ((("compare",), ("save",)),)) -> Group:
    """The group that shows before and after, and saves: where there is room for images."""
    return Group(title, RESULT, 0, rows, below)


def graph(name: str, nodes: dict[str, Node], groups: tuple[Group, ...] = (), *, files: bool = True) -> Graph:
    """A graph with the notes of its name, in the usual groups if no others are given."""
    # What the page alone has comes last, so that the numbers of the others are those of the API format.
    nodes = dict(sorted(nodes.items(), key=lambda item: item[0] == "compare"))
    notes = {"about": NOTES[name]["about"], "files": FILES, **NOTES[name]}
    if not files:
        del notes["files"]
    return Graph(name, nodes, groups or usual_groups(), notes)


def faithdiff_2x() -> Graph:
    """The published settings: scale 2, 20 steps, cfg 5, start `lr`, adain."""
    return graph("faithdiff_2x", restoration())


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
        "image": Node("LoadImage", {"image": IMAGE}),
        "checkpoint": Node(
            "CheckpointLoaderSimple",
            {"ckpt_name": CHECKPOINT},
            "SDXL checkpoint (CLIP and VAE)",
            page_title="SDXL: CLIP and VAE",
        ),
        "loader": Node("FaithDiffModelLoader", {"faithdiff_name": FAITHDIFF, "weight_dtype": "default"}),
        "prepare": Node("FaithDiffPrepareImage", {"image": Link("image"), "mask": Link("image", 1), "scale_by": 2.0}),
        "positive": Node(
            "CLIPTextEncode", {"clip": Link("checkpoint", 1), "text": CAPTION}, "Positive: what is in the image"
        ),
        "negative": Node("CLIPTextEncode", {"clip": Link("checkpoint", 1), "text": ""}, "Negative: empty"),
        "latent": Node("VAEEncode", {"pixels": Link("prepare"), "vae": Link("checkpoint", 2)}),
        "features": Node("FaithDiffLQEncode", {"faithdiff": Link("loader", 1), "pixels": Link("prepare")}),
        "sampler": Node("FaithDiffSampler", sampler_inputs()),
        "decode": Node("FaithDiffTiledVAEDecode", {"samples": Link("sampler"), "vae": Link("checkpoint", 2)}),
        "finish": Node(
            "FaithDiffFinishImage", {"image": Link("decode"), "frame": Link("prepare", 1), "color_fix": "adain"}
        ),
        "save": Node("SaveImage", {"images": Link("finish"), "filename_prefix": "FaithDiff"}, height=330),
        "compare": Node(
            "FaithDiffCompare",
            {"before": Link("image"), "after": Link("finish"), "mode": "slider"},
            "FaithDiff Compare: before and after",
            height=330,
        ),
    }


def faithdiff_4x_progressive() -> Graph:
    """Two passes of 2x: more faithful than one of 4x, faces above all (the authors' advice)."""
    return two_passes("faithdiff_4x_progressive", restoration())


def two_passes(name: str, nodes: dict[str, Node]) -> Graph:
    """A restoration, and what it gives enlarged and restored again."""
    save, compare = nodes.pop("save"), nodes.pop("compare")
    second = {
        "prepare_2": Node("FaithDiffPrepareImage", {"image": Link("finish"), "mask": Link("finish", 1)}),
        "latent_2": Node("VAEEncode", {"pixels": Link("prepare_2"), "vae": Link("checkpoint", 2)}),
        "features_2": Node("FaithDiffLQEncode", {"faithdiff": Link("loader", 1), "pixels": Link("prepare_2")}),
        "sampler_2": Node("FaithDiffSampler", sampler_inputs("_2"), "FaithDiff Sampler: second pass"),
        "decode_2": Node("FaithDiffTiledVAEDecode", {"samples": Link("sampler_2"), "vae": Link("checkpoint", 2)}),
        "finish_2": Node("FaithDiffFinishImage", {"image": Link("decode_2"), "frame": Link("prepare_2", 1)}),
    }
    save.inputs["images"] = compare.inputs["after"] = Link("finish_2")
    first = usual_groups(finish=((("decode",),), (("finish",),)))
    return graph(
        name,
        {**nodes, **second, "save": save, "compare": compare},
        (
            *first[:3],
            replace(first[3], title="4  Finish the first pass"),
            Group("5  Prepare the second pass", PREPARE, 600, ((("prepare_2",), ("latent_2", "features_2")),)),
            Group("6  Restore again", RESTORE, 300, ((("sampler_2",),),)),
            Group("7  Finish", FINISH, 300, ((("decode_2",),), (("finish_2",),), (("tips",),))),
            result("8  Result", (4, 5)),
        ),
    )


def faithdiff_8k() -> Graph:
    """Two passes of 2x in tiles that move from step to step: half the work of the published ones."""
    workflow = two_passes("faithdiff_8k", restoration())
    for suffix in ("", "_2"):
        latent, sampler = workflow.nodes[f"latent{suffix}"], workflow.nodes[f"sampler{suffix}"]
        latent.type = "VAEEncodeTiled"
        latent.inputs |= {"tile_size": 1024, "overlap": 128}
        sampler.inputs |= MOVING
    return workflow


def faithdiff_own_checkpoint_lora() -> Graph:
    """A MODEL of the user's, with a LoRA, moved towards FaithDiff's U-Net."""
    nodes = restoration()
    nodes["checkpoint"].inputs["ckpt_name"] = OWN_CHECKPOINT
    nodes["checkpoint"].title = nodes["checkpoint"].page_title = "Your SDXL checkpoint"
    nodes["lora"] = Node(
        "LoraLoaderModelOnly",
        {"model": Link("checkpoint"), "lora_name": OWN_LORA, "strength_model": 0.8},
        "Your LoRA",
    )
    nodes["loader"].inputs |= {"model": Link("lora"), "unet_strength": 0.8}
    load = ((("about",),), (("image", "checkpoint"), ("lora", "loader")), (("files",),))
    return graph("faithdiff_own_checkpoint_lora", nodes, usual_groups(load=load))


def faithdiff_few_steps() -> Graph:
    """Eight steps without guidance, by a Lightning LoRA."""
    nodes = restoration()
    nodes["lora"] = Node(
        "LoraLoaderModelOnly",
        {"model": Link("loader"), "lora_name": FEW_STEPS_LORA, "strength_model": 1.0},
        "Few-step LoRA",
    )
    nodes["sampler"].inputs |= {"model": Link("lora"), "steps": 8, "cfg": 1.0, "scheduler": "sgm_uniform"}
    load = ((("about",),), (("image",), ("checkpoint", "loader", "lora")), (("files",),))
    return graph("faithdiff_few_steps", nodes, usual_groups(load=load))


def faithdiff_low_vram() -> Graph:
    """Eight-bit weights and small tiles."""
    nodes = restoration()
    nodes["loader"].inputs["weight_dtype"] = "fp8_e4m3fn"
    nodes["latent"] = Node(
        "VAEEncodeTiled",
        {"pixels": Link("prepare"), "vae": Link("checkpoint", 2), "tile_size": 512, "overlap": 64},
    )
    nodes["features"].inputs["tile_size"] = 512
    nodes["sampler"].inputs |= {"tile_size": 768, "tile_batch": 1, **MOVING}
    nodes["decode"].inputs["tile_size"] = 512
    return graph("faithdiff_low_vram", nodes)


def faithdiff_batch_folder() -> Graph:
    """Every image of a folder, each saved under its name when it is done."""
    single = restoration()
    nodes = {key: single[key] for key in ("checkpoint", "loader", "positive", "negative")}
    nodes["folder"] = Node(
        "FaithDiffRestoreFolder",
        {
            "model": Link("loader"),
            "faithdiff": Link("loader", 1),
            "vae": Link("checkpoint", 2),
            "positive": Link("positive"),
            "negative": Link("negative"),
            "clip": Link("checkpoint", 1),
            "folder": "restore",
        },
    )
    nodes["report"] = Node("PreviewAny", {"source": Link("folder")}, "Report: what was done, what failed")
    return graph(
        "faithdiff_batch_folder",
        nodes,
        (
            Group("1  Load", LOAD, 600, ((("about",),), (("checkpoint", "loader"),), (("files",),))),
            Group("2  Prompts", PREPARE, 400, ((("positive",),), (("negative",),), (("tips",),))),
            Group("3  Restore each image, and save it", RESTORE, 420, ((("folder",),),)),
            Group("4  Report", FINISH, 380, ((("report",),),)),
        ),
    )


def faithdiff_photograph() -> Graph:
    """A photograph that keeps its depth, transparency, profile and metadata."""
    nodes = restoration()
    nodes["image"].type = "FaithDiffLoadImage"
    nodes["save"] = Node(
        "FaithDiffSaveImage",
        {
            "images": Link("finish"),
            "mask": Link("finish", 1),
            "source": Link("image", 2),
            "filename_prefix": "%name%",
        },
        height=534,  # what the page makes of it after a run, with the image below its settings
    )
    groups = usual_groups(
        prepare=((("positive",), ("negative",)), (("prepare",), ("latent", "features"))),
        finish=((("decode",),), (("finish",),)),
        shown=((("compare", "tips"), ("save",)),),
    )
    return graph("faithdiff_photograph", nodes, groups)


def faithdiff_auto_caption() -> Graph:
    """A caption by a local vision-language model."""
    nodes = restoration()
    nodes["caption"] = Node("FaithDiffCaption", {"image": Link("prepare"), "model": CAPTIONER})
    nodes["positive"].inputs["text"] = Link("caption")
    prepare = ((("prepare",), ("latent", "features")), (("caption",), ("positive", "negative")))
    return graph("faithdiff_auto_caption", nodes, usual_groups(prepare=prepare))


def faithdiff_other_captioner() -> Graph:
    """A caption by ComfyUI's own text generation."""
    nodes = restoration()
    nodes["language_model"] = Node(
        "CLIPLoader", {"clip_name": LANGUAGE_MODEL, "type": "stable_diffusion"}, "A vision-language model"
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
    )
    nodes["trim"] = Node("FaithDiffTrimCaption", {"caption": Link("caption")})
    nodes["positive"].inputs["text"] = Link("trim")
    nodes["positive"].page_title = "Positive: the caption"
    load = ((("about",),), (("image", "language_model"), ("checkpoint", "loader")), (("files",),))
    prepare = ((("prepare", "caption"), ("latent", "features", "trim"), ("positive", "negative")),)
    return graph(
        "faithdiff_other_captioner", nodes, usual_groups(load=load, prepare=prepare, prepare_width=THREE_COLUMNS)
    )


def faithdiff_controlnet() -> Graph:
    """A ControlNet beside the alignment."""
    nodes = restoration()
    nodes["edges"] = Node("Canny", {"image": Link("prepare")})
    nodes["controlnet"] = Node("ControlNetLoader", {"control_net_name": CONTROLNET})
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
    )
    nodes["sampler"].inputs |= {"positive": Link("control"), "negative": Link("control", 1)}
    load = ((("about",),), (("image", "controlnet"), ("checkpoint", "loader")), (("files",),))
    prepare = ((("positive", "negative", "prepare"), ("control", "edges", "latent", "features")),)
    return graph("faithdiff_controlnet", nodes, usual_groups(load=load, prepare=prepare))


def faithdiff_tile_captions() -> Graph:
    """A caption for each part of a large image."""
    nodes = restoration()
    nodes["parts"] = Node("FaithDiffTileCaptions", {"image": Link("prepare")})
    nodes["caption"] = Node("FaithDiffCaption", {"image": Link("parts"), "model": CAPTIONER})
    nodes["part_texts"] = Node(
        "CLIPTextEncode", {"clip": Link("checkpoint", 1), "text": Link("caption")}, "What is in each part"
    )
    nodes["told"] = Node(
        "FaithDiffTileConditioning",
        {"layout": Link("parts", 1), "conditionings": Link("part_texts"), "whole": Link("positive")},
        page_title="Tile Conditioning",
    )
    nodes["positive"].page_title = "Positive: whole image"
    nodes["sampler"].inputs["positive"] = Link("told")
    prepare = (
        (
            ("prepare", "parts", "negative"),
            ("latent", "caption", "positive"),
            ("features", "part_texts", "told"),
        ),
    )
    groups = usual_groups(prepare=prepare, prepare_width=THREE_COLUMNS, prepare_shares=(5, 6, 5))
    return graph("faithdiff_tile_captions", nodes, groups)


def faithdiff_masked() -> Graph:
    """Scratches or faces only: what is painted white in the mask editor."""
    nodes = restoration()
    painted = Link("image", 1)
    nodes["image"].title = "Load Image: paint the mask here"
    nodes["image"].page_title = "Load Image: paint the mask"
    nodes["prepare"].inputs = {"image": Link("image"), "scale_by": 1.0}
    nodes["noise_mask"] = Node("SetLatentNoiseMask", {"samples": Link("latent"), "mask": painted})
    nodes["features"].inputs["restore_mask"] = painted
    nodes["sampler"].inputs["latent_image"] = Link("noise_mask")
    nodes["decode"].inputs |= {"restore_mask": painted, "original": Link("prepare")}
    nodes["finish"].inputs["restore_mask"] = painted
    prepare = ((("positive",),), (("negative",),), (("prepare",), ("latent", "noise_mask", "features")))
    return graph("faithdiff_masked", nodes, usual_groups(prepare=prepare))


def faithdiff_demo(sample: bool = True) -> Graph:
    """The small model that comes with the pack, with the settings it is demonstrated with (demo/restore.yaml).

    Args:
        sample: whether it restores the image that comes with the model, or one of Load Image.
    """
    settings = yaml.safe_load(DEMO_SETTINGS.read_text(encoding="utf-8"))
    nodes = restoration()
    del nodes["checkpoint"], nodes["loader"]
    nodes["models"] = Node("FaithDiffDemoModels", {})
    outputs = {Link("loader"): 0, Link("checkpoint", 1): 1, Link("checkpoint", 2): 2, Link("loader", 1): 3}
    if sample:
        del nodes["image"], nodes["prepare"].inputs["mask"]
        outputs[Link("image")] = 4
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
    load = ((("about",),), (("models",),), (("own",),))
    return graph("faithdiff_demo", nodes, usual_groups(load=load, load_width=320), files=False)


API_GRAPHS: dict[str, Callable[[], Graph]] = {"faithdiff_demo": partial(faithdiff_demo, sample=False)}
"""What the API format has instead of the page's graph: scripts put an image of theirs into Load Image."""


GRAPHS: tuple[Callable[[], Graph], ...] = (
    faithdiff_2x,
    faithdiff_4x_progressive,
    faithdiff_8k,
    faithdiff_own_checkpoint_lora,
    faithdiff_few_steps,
    faithdiff_low_vram,
    faithdiff_batch_folder,
    faithdiff_photograph,
    faithdiff_auto_caption,
    faithdiff_other_captioner,
    faithdiff_controlnet,
    faithdiff_tile_captions,
    faithdiff_masked,
    faithdiff_demo,
)
"""All workflows. (The template browser lists them in the order in which the file system does.)"""


@dataclass(frozen=True)
class Blueprint:
    """A graph that becomes one node.

    Attributes:
        graph: what is inside.
        description: shown where the page lists it.
        name: the node's name.
        category: where the page lists it.
        inputs: (name, node's key, input) of everything that can be set or connected from outside, in order.
        outputs: (name, link) of the outputs.
    """

    graph: Graph
    description: str
    name: str
    category: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, Link], ...]


def restore_blueprint() -> Blueprint:
    """The whole restoration in one node."""
    nodes = restoration()
    for key in ("image", "save", "compare"):
        del nodes[key]
    nodes["prepare"].inputs = {"scale_by": 2.0}
    groups = usual_groups(
        load=((("checkpoint",),), (("loader",),)),
        finish=((("decode",),), (("finish",),)),
        load_width=320,
    )[:-1]
    return Blueprint(
        Graph("faithdiff_restore", nodes, groups),
        "Restores and enlarges an image with FaithDiff: the published settings in one node.",
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
