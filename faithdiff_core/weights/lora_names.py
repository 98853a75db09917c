"""The spelling of a LoRA's tensors that most programs read: kohya's, with the layers' names of single-file checkpoints.

A layer of the U-Net is `lora_unet_` and its name in a checkpoint with underscores, such as
`lora_unet_input_blocks_4_1_proj_in`. It has a matrix up (rows, rank), a matrix down (rank, columns) and a number alpha:
it adds alpha / rank * up @ down to the layer's weight. For a convolution, down is a kernel and up is one of 1x1. What
is added as it is, not as a product, is `diff` for a weight and `diff_b` for a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightsError
from ..models.shapes import Shape
from .unet_names import checkpoint_names
from .unet_shapes import UNetConfig

LORA_PREFIX = "lora_unet_"
"""How all names of a U-Net's LoRA begin."""

UP, DOWN, ALPHA = "lora_up.weight", "lora_down.weight", "alpha"
"""A layer's two matrices, and what their product is multiplied by, times the rank."""

WEIGHT_DIFFERENCE, BIAS_DIFFERENCE = "diff", "diff_b"
"""What is added to a layer's weight and to its bias."""


@dataclass(frozen=True)
class LoRASizes:
    """Sizes of a LoRA.

    Attributes:
        layers: how many layers it changes by matrices.
        smallest_rank, largest_rank: of them.
        differences: how many weights and biases it changes by adding to them as they are.
    """

    layers: int
    smallest_rank: int
    largest_rank: int
    differences: int

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], source: str) -> LoRASizes:
        """Read the sizes off a LoRA's tensors, and check that those of each layer go together.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape than it should be; the text names the layer.
        """
        layers: dict[str, dict[str, Shape]] = {}
        for key, value in state.items():
            layer, _, kind = key.partition(".")
            layers.setdefault(layer, {})[kind] = tuple(value.shape)
        ranks: list[int] = []
        for layer, shapes in layers.items():
            up, down = shapes.get(UP), shapes.get(DOWN)
            whole = {UP, DOWN} <= shapes.keys() or not {UP, DOWN, ALPHA} & shapes.keys()
            if not whole or not shapes.keys() <= {UP, DOWN, ALPHA, WEIGHT_DIFFERENCE, BIAS_DIFFERENCE}:
                raise WeightsError(
                    f"{source}: the LoRA's layer {layer} has {', '.join(sorted(shapes))}; expected {UP} and {DOWN}, "
                    f"{WEIGHT_DIFFERENCE} or {BIAS_DIFFERENCE}. The file is incomplete, or of another kind of LoRA."
                )
            if up is not None and down is not None:
                if min(len(up), len(down)) < 2 or up[1] != down[0]:
                    raise WeightsError(f"{source}: {UP} {up} and {DOWN} {down} of {layer} do not go together.")
                ranks.append(down[0])
        differences = sum(kind in (WEIGHT_DIFFERENCE, BIAS_DIFFERENCE) for shapes in layers.values() for kind in shapes)
        return cls(len(ranks), min(ranks, default=0), max(ranks, default=0), differences)


def lora_layers(config: UNetConfig) -> dict[str, str]:
    """All layers of a U-Net: diffusers' name, such as `conv_in`, to the LoRA's."""
    return {
        name.rpartition(".")[0]: LORA_PREFIX + key.rpartition(".")[0].replace(".", "_")
        for name, key in checkpoint_names(config).items()
    }


def product(up: Tensor, down: Tensor, alpha: float | None) -> Tensor:
    """What a layer's two matrices add to its weight, in float32: (rows, columns), a kernel's columns flattened."""
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * (up.float().flatten(1) @ down.float().flatten(1))


def lora_differences(state: Mapping[str, Tensor], shapes: Mapping[str, Shape], source: str) -> dict[str, list[str]]:
    """Which of a LoRA's tensors change which of a U-Net's, by diffusers' names; all of both are checked.

    Args:
        state: the LoRA's tensors.
        shapes: of the U-Net's tensors.
        source: name of the LoRA's file, for errors.

    Returns:
        Name of each of the U-Net's tensors that changes, to the LoRA's tensors that `difference_of` takes.

    Raises:
        WeightsError: a tensor has no place in the U-Net, or another shape than its place.
    """
    config = UNetConfig.from_shapes(shapes)
    layers = {lora: name for name, lora in lora_layers(config).items()}
    found: dict[str, list[str]] = {}
    for key in state:
        layer, _, kind = key.partition(".")
        target = f"{layers.get(layer)}.{'bias' if kind == BIAS_DIFFERENCE else 'weight'}"
        if target not in shapes:
            raise WeightsError(
                f"{source}: {key} has no place in this U-Net. The LoRA belongs to a model of another build."
            )
        found.setdefault(target, []).append(key)
    for name, keys in found.items():
        given = changed_shape({key.partition(".")[2]: tuple(state[key].shape) for key in keys})
        if given != shapes[name]:
            raise WeightsError(
                f"{source}: {keys[0]} and what belongs to it change a weight of the shape {given}, but {name} of this "
                f"U-Net has {shapes[name]}. The LoRA belongs to a model of another build."
            )
    return found


def changed_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight that a layer's tensors, by their kind, change; None if they do not go together."""
    for kind in (WEIGHT_DIFFERENCE, BIAS_DIFFERENCE):
        if kind in shapes:
            return shapes[kind] if len(shapes) == 1 else None
    up, down = shapes.get(UP), shapes.get(DOWN)
    if up is None or down is None or not shapes.keys() <= {UP, DOWN, ALPHA} or up[1] != down[0]:
        return None
    return (up[0], *down[1:])


def difference_of(state: Mapping[str, Tensor], keys: list[str], shape: Shape) -> Tensor:
    """What some of a LoRA's tensors, as `lora_differences` lists them, add to a weight, in float32."""
    kinds = {key.partition(".")[2]: state[key] for key in keys}
    for kind in (WEIGHT_DIFFERENCE, BIAS_DIFFERENCE):
        if kind in kinds:
            return kinds[kind].float()
    alpha = float(kinds[ALPHA]) if ALPHA in kinds else None
    return product(kinds[UP], kinds[DOWN], alpha).reshape(shape)


def add_lora(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Add a LoRA to a U-Net's weights, in place.

    Args:
        weights: the U-Net's tensors under diffusers' names.
        state: the LoRA's tensors.
        source: name of the LoRA's file, for errors.

    Raises:
        WeightsError: they do not go together; nothing has been changed.
    """
    shapes: dict[str, Shape] = {name: tuple(value.shape) for name, value in weights.items()}
    for name, keys in lora_differences(state, shapes, source).items():
        weight = weights[name]
        with torch.no_grad():
            weight.copy_(weight.float() + difference_of(state, keys, shapes[name]).to(weight.device))
