"""One node in a graph with FaithDiff, sampled in the ways that are compared.

`Trial` knows how a node's result comes into the sampling: it changes the MODEL, the conditionings or the latent, or it
makes the GUIDER. The functions below it sample the trial in tiles, without tiles, and tile by tile by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfy_host import Host
from torch import Tensor

from faithdiff_core.tiling.grid import Tile
from support.host_sampling import gaussian, sized

from .schema import NodeSchema
from .values import GRID, HEIGHT, OVERLAP, TILE, WIDTH, Values

Result = tuple[Tensor, Tensor]
"""The sampled latent, and what the first step predicted."""

Sizing = Callable[[Any], Any]
"""Puts a size conditioning on a CONDITIONING."""


def call(host: Host, schema: NodeSchema, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Call a node's function; of outputs that are lists, the first value."""
    node = host.node_class(schema.id)
    with torch.inference_mode():
        out = (
            node.execute(**arguments) if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)(**arguments)
        )
    if hasattr(out, "args"):
        out = out.args
    elif isinstance(out, dict):
        out = out["result"]
    lists = getattr(node, "OUTPUT_IS_LIST", None) or [False] * len(out)
    return tuple(value[0] if many else value for value, many in zip(out, lists, strict=False))


@dataclass
class Trial:
    """A node with settings, in a graph.

    Attributes:
        values: makes the inputs.
        schema: of the node.
        strong: its settings; see `Values.arguments`.
        cfg: guidance of the sampler (not of a GUIDER that has its own input).
        faithdiff: False samples plain SDXL with plain prompts: whether the node works at all.
        covered: what the node itself is given as CONDITIONING has the size conditioning of one large tile.
    """

    values: Values
    schema: NodeSchema
    strong: bool
    cfg: float = 4.0
    faithdiff: bool = True
    covered: bool = False

    def __post_init__(self) -> None:
        self._weights_only: Any = None

    def base(self) -> Any:
        """The MODEL before the node."""
        return self.values.setup.model if self.faithdiff else self.values.plain_model()

    def apply(self, tile: Tile | None, given: dict[str, Any]) -> tuple[Any, ...]:
        """The node's outputs."""
        schema = self.schema
        if schema.kind != "MODEL" and "model" not in given:
            given = {**given, **dict.fromkeys(schema.names("MODEL")[:1], self.base())}
        if self.covered:
            own = covering(self.values.plain_conditioning())
            given = {**dict.fromkeys(schema.names("CONDITIONING"), own), **given}
        return call(self.values.host, schema, self.values.arguments(schema, self.strong, tile, given))

    def model(self, tile: Tile | None) -> Any:
        """The MODEL to sample with, without tiles; made for each use, since patches may remember what they saw."""
        if self.schema.kind != "MODEL":
            return self.base()
        if self._weights_only is not None:
            return self._weights_only
        base = self.base()
        made = self.apply(tile, {self.schema.names("MODEL")[0]: base})[self.schema.returns.index("MODEL")]
        if _same(made.model_options, base.model_options) and _same(made.wrappers, base.wrappers):
            self._weights_only = made  # Nothing but weights: loading them again would only take time.
        return made

    def conds(self, tile: Tile | None, which: str) -> tuple[Any, Any]:
        """Positive and negative conditioning, the node's if it makes them."""
        setup = self.values.setup
        positive, negative = self.values.conds(tile, which) if self.faithdiff else (setup.positive, setup.negative)
        if self.schema.kind == "CONDITIONING":
            outs = self.apply(tile, self._given(positive, negative))
            made = [out for out, kind in zip(outs, self.schema.returns, strict=False) if kind == "CONDITIONING"]
            positive, negative = made[0], made[1] if len(made) > 1 else negative
        return positive, negative

    def _given(self, positive: Any, negative: Any) -> dict[str, Any]:
        """The node's first positive and its first negative conditioning carry LQ features; others do not."""
        names = self.schema.names("CONDITIONING")
        negatives = [name for name in names if name.startswith("neg")]
        given = {name: positive for name in names if name not in negatives}
        given = dict(list(given.items())[:1])
        return {**given, **dict.fromkeys(negatives[:1], negative)}

    def guider(self, model: Any, conds: tuple[Any, Any], size: Sizing | None = None) -> Any:
        """The GUIDER, the node's if it makes one; `size` is put on all conditionings."""
        if size is not None:
            conds = (size(conds[0]), size(conds[1]))
        if self.schema.kind != "GUIDER":
            return self.values.setup.cfg_guider(model, *conds, self.cfg)
        given = self._given(*conds) | {self.schema.names("MODEL")[0]: model}
        others = [name for name in self.schema.names("CONDITIONING") if name not in given]
        plain = self.values.plain_conditioning()
        given |= dict.fromkeys(others, plain if size is None else size(plain))
        if not self.strong:
            given |= {slot.name: self.cfg for slot in self.schema.slots if slot.name == "cfg"}
        return self.apply(None, given)[0]

    def latent(self, tile: Tile | None, which: str) -> dict[str, Any]:
        """The latent to start from: the node's, made from the whole image's and cut, or an empty one."""
        if self.schema.kind == "LATENT":
            first = self.schema.names("LATENT")[0]
            start = self.values.latent(None, seed=50)
            start = {"samples": start["samples"].repeat(len(which), 1, 1, 1)}
            made = self.values.once(
                (self.schema.id, self.strong, which, self.faithdiff), lambda: self._latent(first, start)
            )
            return (
                made
                if tile is None
                else {
                    key: tile.crop(_at_latent_size(value)) if key in ("samples", "noise_mask") else value
                    for key, value in made.items()
                }
            )
        shape = (len(which), 4, HEIGHT // 8, WIDTH // 8)
        zeros = torch.zeros(shape)
        return {"samples": zeros if tile is None else tile.crop(zeros)}

    def _latent(self, first: str, start: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = self.apply(None, {first: start})[self.schema.returns.index("LATENT")]
        return out

    def stateful(self) -> bool:
        """Whether the node put wrappers on the MODEL: what keeps something from step to step is done so."""
        if self.schema.kind != "MODEL":
            return False
        made, base = self.model(None), self.base()
        return bool(made.wrappers != base.wrappers or made.callbacks != base.callbacks)

    def guides(self) -> bool:
        """Whether the node put functions on the MODEL that see predictions of the whole latent."""
        if self.schema.kind != "MODEL":
            return False
        made, base = self.model(None).model_options, self.base().model_options
        return any(made.get(name) != base.get(name) for name in made if name.startswith("sampler_"))

    def unchanged(self) -> bool:
        """Whether the node gave a MODEL that holds nothing that the given one does not hold."""
        if self.schema.kind != "MODEL":
            return False
        made, base = self.model(None), self.base()
        if made.model is not base.model:
            return False
        held = ("patches", "object_patches", "wrappers", "callbacks", "attachments", "additional_models", "injections",
                "hook_patches", "model_options", "weight_wrapper_patches")  # fmt: skip
        return all(_same(getattr(made, name, None), getattr(base, name, None)) for name in held)


def covering(conditioning: Any) -> Any:
    """The size conditioning of one tile that covers the image, for a tile size of 1024 pixels."""
    return sized(conditioning, Tile(0, 0, HEIGHT // 8, WIDTH // 8), (HEIGHT, WIDTH), 1024)


def noise(latent: dict[str, Any], which: str, scale: float = 1.0) -> Tensor:
    """Noise for a latent: image A's, image B's, and so on; more images get noise of their own."""
    shape = latent["samples"].shape
    seeds = [3 if name == "A" else 9 for name in which] + list(range(60, 60 + 64))
    return torch.cat([gaussian(1, *shape[1:], seed=seeds[i]) for i in range(shape[0])]) * scale


def sample(guider: Any, latent: dict[str, Any], given_noise: Tensor, sigmas: Tensor) -> Result:
    """Euler steps with a GUIDER."""
    samplers = importlib.import_module("comfy.samplers")
    predicted: list[Tensor] = []

    def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        if not predicted:
            predicted.append(x0.clone())

    torch.manual_seed(0)
    with torch.inference_mode():
        out = guider.sample(
            given_noise,
            latent["samples"],
            samplers.sampler_object("euler"),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=keep,
            disable_pbar=True,
            seed=0,
        )
    return out, predicted[0]


def schedule(model: Any, steps: int, kind: str) -> Tensor:
    """Noise levels of a MODEL; a second sampler begins at half of them."""
    samplers = importlib.import_module("comfy.samplers")
    sampling = model.get_model_object("model_sampling")
    if kind == "LATENT":
        return samplers.calculate_sigmas(sampling, "simple", 2 * steps)[-(steps + 1) :]
    return samplers.calculate_sigmas(sampling, "simple", steps)


def tiled(trial: Trial, batch: int, steps: int, which: str = "A", tile: int = TILE, scale: float = 1.0) -> Result:
    """The trial in tiles, `batch` of them in a U-Net call; FaithDiff Tiled Diffusion is the last node on the MODEL."""
    model = trial.model(None)
    guider = trial.guider(trial.values.setup.tiled(model, tile, OVERLAP, batch), trial.conds(None, which))
    latent = trial.latent(None, which)
    return sample(guider, latent, noise(latent, which, scale), schedule(model, steps, trial.schema.kind))


def untiled(trial: Trial, steps: int, which: str = "A", covered: bool = False) -> Result:
    """The trial without tiles; `covered` gives it the size conditioning of one large tile."""
    model = (replace(trial, covered=True) if covered and trial.schema.kind == "MODEL" else trial).model(None)
    latent = trial.latent(None, which)
    guider = trial.guider(model, trial.conds(None, which), covering if covered else None)
    return sample(guider, latent, noise(latent, which), schedule(model, steps, trial.schema.kind))


def by_hand(trial: Trial, steps: int, which: str = "A") -> Tensor:
    """The first prediction, each tile sampled on its own from its part of everything, and merged."""
    whole = trial.latent(None, which)
    given_noise = noise(whole, which)
    sigma = schedule(trial.model(None), steps, trial.schema.kind)[:1]
    out = torch.zeros_like(given_noise)
    for tile in GRID.tiles:
        guider = trial.guider(
            trial.model(tile), trial.conds(tile, which), partial(sized, tile=tile, size=(HEIGHT, WIDTH), target=TILE)
        )
        latent = trial.latent(tile, which)
        _, predicted = sample(guider, latent, tile.crop(given_noise), torch.cat([sigma, torch.zeros(1)]))
        tile.crop(out).add_(predicted * GRID.weights(tile))
    return out


def merged_by_hand(trial: Trial, steps: int, which: str = "A") -> Tensor:
    """The first prediction, where the node looks at predictions of the whole latent.

    Every conditioning is predicted tile by tile, each tile sampled on its own without guidance, and merged. The node's
    guidance is then that of plain SDXL, whose own predictions are replaced by these.
    """
    kind = importlib.import_module("comfy.patcher_extension").WrappersMP.CALC_COND_BATCH
    predicted = _predictions(trial, steps, which)
    plain = Trial(trial.values, trial.schema, trial.strong, trial.cfg, faithdiff=False)
    model = plain.model(None).clone()
    guider: Any = None

    def wrapper(
        executor: Callable[..., Any], inner: Any, conds: list[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> list[Tensor]:
        places = {cond["uuid"]: (key, i) for key, group in guider.conds.items() for i, cond in enumerate(group)}
        outs = []
        for group in conds:
            found = [predicted[places.get(cond["uuid"], ("own", 0))] for cond in group or ()]
            if len(found) > 1:
                raise ValueError(f"{len(found)} conditionings for one prompt: their areas cannot be merged by hand")
            outs.append(found[0] if found else torch.zeros_like(x))
        return outs

    model.add_wrapper_with_key(kind, "by_hand", wrapper)
    guider = plain.guider(model, plain.conds(None, which))
    latent = trial.latent(None, which)
    sigma = schedule(model, steps, trial.schema.kind)[:1]
    return sample(guider, latent, noise(latent, which), torch.cat([sigma, torch.zeros(1)]))[1]


GUIDANCE = ("sampler_cfg_function", "sampler_post_cfg_function", "sampler_pre_cfg_function")
"""Model options that see predictions of the whole latent."""


def _predictions(trial: Trial, steps: int, which: str) -> dict[tuple[str, int], Tensor]:
    """Predictions merged by hand, by prompt and number; `own` is of a conditioning that the node itself brings."""
    latent = trial.latent(None, which)
    given_noise = noise(latent, which)
    sigma = schedule(trial.model(None), steps, trial.schema.kind)[:1]
    out: dict[tuple[str, int], Tensor] = {}
    for tile in GRID.tiles:
        model = trial.model(tile).clone()
        for name in GUIDANCE:
            model.model_options.pop(name, None)
        guider = trial.guider(
            model, trial.conds(tile, which), partial(sized, tile=tile, size=(HEIGHT, WIDTH), target=TILE)
        )
        carrying = guider.original_conds["positive"][0]
        prompts = {(key, i): cond for key, group in guider.original_conds.items() for i, cond in enumerate(group)}
        alone = trial.values.setup.cfg_guider(model, *trial.conds(tile, which), 1.0)
        alone.set_conds(sized(trial.values.plain_conditioning(), tile, (HEIGHT, WIDTH), TILE), [])
        prompts["own", 0] = alone.original_conds["positive"][0]
        for place, cond in prompts.items():
            alone.original_conds = {"positive": [_about_the_image(cond, carrying)], "negative": []}
            _, part = sample(
                alone, trial.latent(tile, which), tile.crop(given_noise), torch.cat([sigma, torch.zeros(1)])
            )
            tile.crop(out.setdefault(place, torch.zeros_like(given_noise))).add_(part * GRID.weights(tile))
    return out


def _about_the_image(cond: dict[str, Any], carrying: dict[str, Any]) -> dict[str, Any]:
    """A conditioning with the LQ features of another one, unless it has its own."""
    lq = {key: value for key, value in carrying.items() if key.startswith("faithdiff")}
    lq_conds = {key: value for key, value in carrying["model_conds"].items() if key.startswith("faithdiff")}
    return {**lq, **cond, "model_conds": {**lq_conds, **cond["model_conds"]}}


def _at_latent_size(x: Tensor) -> Tensor:
    """A latent, or a noise mask brought to the latent's size as the host does it."""
    if x.ndim == 4 and x.shape[-2:] == (HEIGHT // 8, WIDTH // 8):
        return x
    mask = x.reshape(-1, 1, *x.shape[-2:])
    return torch.nn.functional.interpolate(mask, (HEIGHT // 8, WIDTH // 8), mode="bilinear")


def _same(a: Any, b: Any) -> bool:
    """Equal containers of the very same things."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Tensor, torch.nn.Module)):
        return a is b
    return a is b or bool(a == b)
