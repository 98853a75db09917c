"""Sizes of a model, read off the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import SettingsError

Shape = tuple[int, ...]

MAX_CHANNELS = 2**15
"""Largest number of channels that is believed; SDXL's widest layer has 10,240."""


def block_count(names: Iterable[str], prefix: str, limit: int) -> int:
    """Count the blocks that are numbered 0, 1, ... right after a prefix.

    Args:
        names: of all tensors.
        prefix: such as `down_blocks.`.
        limit: the most blocks that a model of this kind has; files can claim any number.

    Raises:
        SettingsError: a number is left out, is not a number, or there are too many.
    """
    numbers = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    wanted = {str(i) for i in range(len(numbers))}
    if numbers != wanted:
        raise SettingsError(f"has a block {prefix}{min(numbers - wanted)}, but no {prefix}{min(wanted - numbers)}")
    if len(numbers) > limit:
        raise SettingsError(f"has {len(numbers)} blocks {prefix}0, 1, ...; at most {limit} are possible")
    return len(numbers)


def check_channels(groups: int = 1, **sizes: int | tuple[int, ...]) -> None:
    """Check numbers of channels by name.

    Raises:
        SettingsError: one is below 1, not a multiple of `groups`, or larger than any model's.
    """
    for name, value in sizes.items():
        for channels in value if isinstance(value, tuple) else (value,):
            if not 1 <= channels <= MAX_CHANNELS or channels % groups:
                multiple = f"a multiple of {groups} " if groups > 1 else ""
                raise SettingsError(
                    f"has {name} = {channels}; it must be {multiple}between {groups} and {MAX_CHANNELS}"
                )


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module's tensors. Made on the meta device, it takes no memory."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
