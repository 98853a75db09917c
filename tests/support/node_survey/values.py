"""Values for a node's inputs, made from what the node says about them.

Everything that lies in the image's plane (images, masks, latents, LQ features, sizes) is made for the whole image or
for one tile of it, so that a tile can be sampled by hand.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any

import torch
from comfy_host import GOLDEN, Host
from safetensors.torch import load_file, save_file
from torch import Tensor

from faithdiff_core.tiling.grid import Tile, TileGrid
from support.host_sampling import Setup, gaussian, images, load

from .schema import NodeSchema, Slot

HEIGHT, WIDTH, TILE, OVERLAP = 72, 96, 64, 0.5
"""The image in pixels and its tiles: two rows of two, which overlap."""

GRID = TileGrid(HEIGHT // 8, WIDTH // 8, TILE, OVERLAP)

REACH = {"FLOAT": 10.0, "INT": 256}
"""How far from its default a strong setting goes where the range is wider than that."""

FIXED: dict[str, Any] = {"steps": 2, "length": 1, "batch_size": 1, "sampler_name": "euler", "scheduler": "normal"}
"""Inputs whose defaults would cost minutes; they are the number of steps, frames and images of other samplers."""

LORA = "survey_lora.safetensors"
HYPERNETWORK = "survey_hypernetwork.pt"


ADAPTER = "survey_adapter.safetensors"


def survey_setup(host: Host) -> Setup:
    """The tiny FaithDiff, from a file without its U-Net on a MODEL with the golden one.

    Nothing is blended then, so a MODEL without weight patches of its own is loaded in no time. ComfyUI collects garbage
    whenever a MODEL was dropped; what is there by now need not be looked through each time.
    """
    gc.freeze()
    tensors = load_file(GOLDEN / "faithdiff_tiny.safetensors")
    parts = ("denoise_encoder.", "condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    file = host.base / "models" / "faithdiff" / ADAPTER
    save_file({key: value for key, value in tensors.items() if key.startswith(parts)}, file)
    return load(host, ADAPTER)


class CannotMakeError(Exception):
    """A type of which the survey has no value."""


class Values:
    """Makes inputs.

    Args:
        setup: of the tiny model.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.host = setup.host
        self._kept: dict[Any, Any] = {}
        _write_files(self)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value that is made at its first use."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def pixels(self, tile: Tile | None, seed: int = 1, batch: int = 1) -> Tensor:
        """An image, (batch, height, width, 3)."""
        whole: Tensor = self.once(("pixels", seed, batch), lambda: images(HEIGHT, WIDTH, batch, seed))
        return whole if tile is None else tile.crop(whole.movedim(-1, 1), 8).movedim(1, -1)

    def mask(self, tile: Tile | None) -> Tensor:
        """A soft mask at the image's size with no symmetry, (1, height, width)."""
        rows, columns = torch.linspace(0.1, 1, HEIGHT)[:, None], torch.linspace(1, 0, WIDTH)[None] ** 2
        whole = (rows * columns)[None]
        return whole if tile is None else tile.crop(whole, 8)

    def latent(self, tile: Tile | None, seed: int = 11) -> dict[str, Any]:
        """A latent of the image's size."""
        whole = gaussian(1, 4, HEIGHT // 8, WIDTH // 8, seed=seed)
        return {"samples": whole if tile is None else tile.crop(whole)}

    def features(self, tile: Tile | None, which: str = "A") -> Any:
        """LQ features of the images named in `which`: A, B or both."""
        seeds = {"A": 1, "B": 2}

        def encode() -> Any:
            return self.setup.features(torch.cat([self.pixels(None, seeds[name]) for name in which]))

        whole = self.once(("features", which), encode)
        return whole if tile is None else type(whole)(tile.crop(whole.tensor))

    def conds(self, tile: Tile | None, which: str = "A") -> tuple[Any, Any]:
        """The golden conditionings with LQ features."""
        positive, negative = self.setup.conditioned(self.features(tile, which))
        return positive, negative

    def plain_conditioning(self) -> Any:
        """A conditioning without LQ features."""
        return self.host.call("TestConditioning", which="random", seed=8)[0]

    def plain_model(self) -> Any:
        """An SDXL MODEL without FaithDiff, with other weights."""
        return self.once("plain model", lambda: self.host.call("TestModel", weights="other", seed=4)[0])

    def arguments(self, schema: NodeSchema, strong: bool, tile: Tile | None, given: dict[str, Any]) -> dict[str, Any]:
        """All inputs of a node.

        Args:
            schema: of the node.
            strong: far ends of ranges, last choices and optional inputs, instead of the defaults.
            tile: for one tile; None for the whole image.
            given: values for some inputs.

        Raises:
            CannotMakeError: a required input has a type that cannot be made.
        """
        out: dict[str, Any] = {}
        for slot in schema.slots:
            if slot.name in given:
                out[slot.name] = given[slot.name]
                continue
            try:
                value = self._value(slot, strong, tile, schema)
            except CannotMakeError:
                if slot.required:
                    raise
                continue
            simple = slot.type in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
            if slot.required or simple or strong:
                out[slot.name] = value
        return {name: [value] for name, value in out.items()} if schema.lists else out

    def _value(self, slot: Slot, strong: bool, tile: Tile | None, schema: NodeSchema | None = None) -> Any:
        if slot.type in ("INT", "FLOAT"):
            placed = schema is not None and {"x", "y", "width", "height"} <= {s.name for s in schema.slots}
            return _placed(slot, strong, tile) if placed and slot.type == "INT" else _number(slot, strong, tile)
        if slot.type == "BOOLEAN":
            return bool(slot.options.get("default", False)) != strong
        if slot.type == "STRING":
            return slot.options.get("default", "") or ""
        if slot.type == "COMBO":
            return _choice(slot, strong)
        if slot.type == "COMFY_AUTOGROW_V3":
            return self._grown(slot, strong, tile)
        if slot.type == "COMFY_DYNAMICCOMBO_V3":
            return self._dynamic(slot, strong, tile)
        makers: dict[str, Callable[[], Any]] = {
            "MODEL": self.plain_model,
            "CONDITIONING": self.plain_conditioning,
            "CLIP": lambda: self.once("clip", lambda: self.host.call("TestCLIP")[0]),
            "VAE": lambda: self.once("vae", lambda: self.host.call("TestVAE")[0]),
            "CONTROL_NET": lambda: self.once("control", lambda: self.host.call("TestControlNet")[0]),
            "IMAGE": lambda: self.pixels(tile, 20),
            "MASK": lambda: self.mask(tile),
            "LATENT": lambda: self.latent(tile),
            "NOISE": lambda: self.host.call("TestNoise")[0],
            "SIGMAS": lambda: torch.tensor([2.0, 1.0, 0.0]),
            "GUIDER": lambda: self.setup.cfg_guider(self.setup.model, *self.conds(None), 4.0),
            "SAMPLER": lambda: self.host.call("KSamplerSelect", sampler_name="euler")[0],
            "LORA_MODEL": lambda: self.host.testpack.models.lora_state(9),
            "GLIGEN": lambda: self.once("gligen", _tiny_gligen),
            "CLIP_VISION_OUTPUT": _vision_output,
            "LATENT_OPERATION": lambda: self.host.call("LatentOperationTonemapReinhard", multiplier=0.7)[0],
            "TIMESTEPS_RANGE": lambda: (0.0, 0.7),
            "HOOKS": self._hooks,
        }
        if slot.type not in makers:
            raise CannotMakeError(slot.type)
        return makers[slot.type]()

    def _grown(self, slot: Slot, strong: bool, tile: Tile | None) -> dict[str, Any]:
        """An input that the page repeats as often as the user wants: as often as needed, and once."""
        template = slot.options["template"]
        ((_, entry),) = template["input"]["required"].items()
        inner = Slot(slot.name, entry[0], True, dict(entry[1]))
        count = max(1, template.get("min", 1))
        names = template.get("names") or [f"{template.get('prefix', slot.name)}{i}" for i in range(count)]
        return {name: self._value(inner, strong, tile) for name in names[:count]}

    def _dynamic(self, slot: Slot, strong: bool, tile: Tile | None) -> dict[str, Any]:
        """A choice that brings inputs of its own."""
        option = slot.options["options"][-1 if strong else 0]
        out: dict[str, Any] = {slot.name: option["key"]}
        for name, entry in option["inputs"].get("required", {}).items():
            out[name] = self._value(Slot(name, entry[0], True, dict(entry[1]) if len(entry) > 1 else {}), strong, tile)
        return out

    def _hooks(self) -> Any:
        hooks = importlib.import_module("comfy.hooks")
        lora = self.host.testpack.models.lora_state(9)
        return hooks.create_hook_lora(lora=lora, strength_model=0.8, strength_clip=0.0)


def _number(slot: Slot, strong: bool, tile: Tile | None) -> float:
    name, options = slot.name.lower(), slot.options
    sizes = {
        "width": (WIDTH, None if tile is None else tile.width),
        "height": (HEIGHT, None if tile is None else tile.height),
    }
    if name in sizes:
        whole, part = sizes[name]
        size = whole if part is None else part * 8
        return size + 64 if strong else size
    if name in FIXED:
        return int(FIXED[name])
    low, high = options.get("min"), options.get("max")
    default = options.get("default")
    if default is None:
        default = low if low is not None else 0
    if not strong or "seed" in name:
        return default
    reach = REACH[slot.type]
    low = default - reach if low is None else max(low, default - reach)
    high = default + reach if high is None else min(high, default + reach)
    if "start" in name:
        return low
    if "end" in name:
        return high if high > default else (low + high) / 2
    if slot.type == "INT":
        # Sizes are meant for images of a megapixel: as small as can be is where they act on one of this size.
        least = options.get("min")
        low = least if least is not None and least >= 0 else low
        return low if low < default else high
    return high if abs(high - default) >= abs(default - low) else low


def _placed(slot: Slot, strong: bool, tile: Tile | None) -> float:
    """A number of a box in the image: its size is the same for a tile, its place is counted from the tile's corner."""
    value = _number(slot, False, None) // (2 if strong else 1) + (16 if strong and slot.name in ("x", "y") else 0)
    corner = {} if tile is None else {"x": tile.left * 8, "y": tile.top * 8}
    return value - corner.get(slot.name, 0)


def _choice(slot: Slot, strong: bool) -> Any:
    if slot.name in FIXED:
        return FIXED[slot.name]
    if not slot.choices:
        raise CannotMakeError(f"a file for {slot.name}")
    for file in (LORA, HYPERNETWORK):
        if file in slot.choices:
            return file
    return slot.choices[-1] if strong else slot.options.get("default", slot.choices[0])


def _vision_output() -> Any:
    """What a CLIP vision model says of an image, at the golden U-Net's width."""
    out = importlib.import_module("comfy.clip_vision").Output()
    out["image_embeds"] = gaussian(1, 64, seed=31)
    out["last_hidden_state"] = gaussian(1, 5, 64, seed=32)
    out["penultimate_hidden_states"] = gaussian(1, 5, 64, seed=33)
    return out


def _tiny_gligen() -> Any:
    """GLIGEN's box attention for the golden U-Net's eleven transformers."""
    gligen = importlib.import_module("comfy.gligen")
    model_patcher = importlib.import_module("comfy.model_patcher")
    management = importlib.import_module("comfy.model_management")
    torch.manual_seed(6)
    fusers = [gligen.GatedSelfAttentionDense(64, 64, 1, 64) for _ in range(11)]
    model = gligen.Gligen(fusers, gligen.PositionNet(64, 64), 64).requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            value.fill_(1.0)
        else:
            value.copy_(torch.randn_like(value) / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else value)
    return model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def _write_files(values: Values) -> None:
    """A LoRA and a hypernetwork in the host's model folders, for nodes that choose a file."""
    models = values.host.base / "models"
    save_file(values.host.testpack.models.lora_state(9), models / "loras" / LORA)
    (models / "hypernetworks").mkdir(exist_ok=True)
    width = 64
    layers = [
        {"linear.0.weight": gaussian(width, width, seed=40 + i) / 8, "linear.0.bias": torch.zeros(width)}
        for i in range(2)
    ]
    torch.save({width: layers, "activation_func": "relu"}, models / "hypernetworks" / HYPERNETWORK)
