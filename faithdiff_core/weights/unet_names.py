"""The two spellings of a U-Net's tensors: diffusers' names, and those of single-file checkpoints."""

from __future__ import annotations

from .unet_shapes import UNetConfig

CHECKPOINT_PREFIX = "model.diffusion_model."
"""Where single-file checkpoints keep the U-Net."""

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Layers outside the blocks."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block; those of transformers have the same names in both."""


def checkpoint_name(name: str, config: UNetConfig) -> str:
    """The name in a single-file checkpoint, without its prefix, of a U-Net's tensor in diffusers' format."""
    layer, kind = name.rsplit(".", 1)
    if layer in _OUTSIDE:
        return f"{_OUTSIDE[layer]}.{kind}"
    words = layer.split(".")
    each = config.layers_per_block + 1  # what a level has on its way: its blocks, and its down- or upsampler's place
    if words[0] == "mid_block":
        part, number, rest = words[1], int(words[2]), words[3:]
        place = "middle_block.1" if part == "attentions" else f"middle_block.{number * (2 if config.mid_depth else 1)}"
    else:
        level, part, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * each}.0.op.{kind}"
        if part == "upsamplers":
            depth = config.transformer_depths[-1 - level]
            return f"output_blocks.{(level + 1) * each - 1}.{2 if depth else 1}.conv.{kind}"
        first = "input_blocks" if words[0] == "down_blocks" else "output_blocks"
        block = level * each + number + (words[0] == "down_blocks")
        place = f"{first}.{block}.{int(part == 'attentions')}"
    if part == "resnets":
        rest = [_RESNET[rest[0]]]
    return ".".join([place, *rest, kind])


def checkpoint_names(config: UNetConfig) -> dict[str, str]:
    """All of a U-Net's tensors: diffusers' name to the single file's, without its prefix."""
    return {name: checkpoint_name(name, config) for name in config.shapes()}


def diffusers_names(keys: set[str], limit: int = 8) -> dict[str, str]:
    """Find the spelling in which a file keeps a U-Net.

    Args:
        keys: names of all of the file's tensors.
        limit: most residual blocks of a level.

    Returns:
        Diffusers' name of each tensor of the U-Net to the file's name; empty if there is no U-Net that is known.
    """
    if "conv_in.weight" in keys and any(key.startswith("down_blocks.") for key in keys):
        return {key: key for key in keys if key.startswith(DIFFUSERS_PREFIXES)}
    for prefix in (CHECKPOINT_PREFIX, "diffusion_model.", ""):
        if f"{prefix}input_blocks.0.0.weight" in keys:
            own = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
            return {name: prefix + key for name, key in _from_checkpoint(own, limit).items()}
    return {}


DIFFUSERS_PREFIXES = (
    *("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.", "up_blocks."),
    *("conv_norm_out.", "conv_out."),
)
"""How the names of a U-Net in diffusers' format begin."""


def _from_checkpoint(keys: set[str], limit: int) -> dict[str, str]:
    """Diffusers' name to the single file's, by finding the sizes whose names are all there."""
    downs = {int(key.split(".")[1]) for key in keys if key.startswith("input_blocks.") and ".0.op." in key}
    if not downs:
        return {}
    each = min(downs)
    levels = len(downs) + 1
    if each - 1 > limit or levels > limit:
        return {}

    def depth(block: str) -> int:
        prefix = f"{block}.transformer_blocks."
        return len({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)})

    depths = tuple(depth(f"input_blocks.{1 + level * each}.1") for level in range(levels))
    sizes = UNetConfig((32,) * levels, each - 1, depths, depth("middle_block.1"), 64, 64)
    # Shortcuts depend on the channels, which stand-in sizes do not have: they are found by their own names.
    names = {name: key for name, key in checkpoint_names(sizes).items() if ".conv_shortcut." not in name}
    for name in list(names):
        if name.endswith(".conv1.weight"):
            for kind in ("weight", "bias"):
                shortcut = name.replace(".conv1.weight", f".conv_shortcut.{kind}")
                key = checkpoint_name(shortcut, sizes)
                if key in keys:
                    names[shortcut] = key
    return {name: key for name, key in names.items() if key in keys}
