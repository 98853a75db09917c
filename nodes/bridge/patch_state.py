"""What other patches and controls hold beside the tensors of a call, found without knowing them.

A patch may keep something from one U-Net call to a later one, or from a U-Net call to the guidance after it, and it may
hold masks of the image. Both take for granted that one call sees the whole latent. All that can hold such things in
Python is looked through here: closures, the attributes of objects, and containers.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...faithdiff_core.tiling.grid import Tile

DEPTH = 6
"""How far references are followed."""

_PACK = __name__.rsplit(".nodes.", 1)[0]
_LIBRARIES = {"torch", "numpy", "comfy", "comfy_api", "comfy_execution", "PIL", "logging", "threading"}
"""Packages whose objects are tools of a patch, and hold nothing of it."""

MISSING = object()


class _Items(tuple[Any, ...]):
    """The content of a list or a set at a moment."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Something that holds values under names: a closure's cell, an object, a dict, a list or a set.

    Attributes:
        owner: it.
        name: under which it was found; "" at the top.
        root: the callable or object that led here.
    """

    owner: Any
    name: str
    root: Any

    def read(self) -> dict[Any, Any]:
        """The values by name, as they are now; a cell, a list or a set has one under the name None."""
        owner = self.owner
        if isinstance(owner, CellType):
            return {None: _content(owner)}
        if isinstance(owner, dict):
            return dict(owner)
        if isinstance(owner, (list, set)):
            return {None: _Items(owner)}
        return dict(vars(owner))

    def write(self, name: Any, value: Any) -> None:
        """Set or remove (`MISSING`) one value."""
        owner = self.owner
        if isinstance(owner, CellType):
            if value is MISSING:
                del owner.cell_contents
            else:
                owner.cell_contents = value
        elif isinstance(owner, list):
            owner[:] = value
        elif isinstance(owner, set):
            owner.clear()
            owner.update(value)
        else:
            values = owner if isinstance(owner, dict) else vars(owner)
            if value is MISSING:
                values.pop(name, None)
            else:
                values[name] = value

    def label(self, name: Any) -> str:
        """A value's name for people and for `mask_fields`: its own, or where that says nothing, the slot's."""
        return name if isinstance(name, str) else self.name


Values = dict[tuple[int, Any], Any]
"""Values by slot number and name."""


def slots_of(roots: Iterable[tuple[str, Any]], whole: bool = False) -> list[Slot]:
    """All slots that can be reached from some callables and objects.

    Args:
        roots: with the names they go by.
        whole: look into the roots themselves even if they are of ComfyUI's own classes.
    """
    found: list[Slot] = []
    seen: set[int] = set()
    for name, root in roots:
        _follow(root, name, root, 0, whole, found, seen)
    return found


def _follow(value: Any, name: str, root: Any, depth: int, force: bool, found: list[Slot], seen: set[int]) -> None:
    if depth > DEPTH or id(value) in seen:
        return
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, FunctionType):
        seen.add(id(value))
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if id(cell) not in seen:
                seen.add(id(cell))
                found.append(Slot(cell, variable, root))
                _follow(_content(cell), variable, root, depth + 1, False, found, seen)
        return
    if isinstance(value, MethodType):
        inner = ((name, value.__func__), (name, value.__self__))
    elif isinstance(value, partial):
        inner = ((name, value.func), *((name, arg) for arg in value.args), *value.keywords.items())
    elif isinstance(value, tuple):
        inner = ((name, item) for item in value)
    elif isinstance(value, dict):
        found.append(Slot(value, name, root))
        inner = [(key if isinstance(key, str) else name, item) for key, item in value.items()]
    elif isinstance(value, (list, set)):
        found.append(Slot(value, name, root))
        inner = [(name, item) for item in value]
    elif force or _is_plain_object(value):
        found.append(Slot(value, name, root))
        inner = list(vars(value).items())
    else:
        return
    seen.add(id(value))
    for inner_name, item in inner:
        _follow(item, inner_name, root, depth + 1, False, found, seen)


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, (Tensor, torch.nn.Module, ModuleType, type, comfy.model_patcher.ModelPatcher)):
        return False
    module = type(value).__module__
    library = module.split(".")[0] in _LIBRARIES
    return hasattr(value, "__dict__") and not library and not module.startswith(_PACK)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def read_all(slots: list[Slot]) -> Values:
    """The values of all slots."""
    return {(number, name): value for number, slot in enumerate(slots) for name, value in slot.read().items()}


def write_changes(slots: list[Slot], now: Values, wanted: Values) -> None:
    """Bring slots that hold `now` to `wanted`."""
    for number, name in changed(now, wanted):
        slots[number].write(name, wanted.get((number, name), MISSING))


def changed(before: Values, after: Values) -> list[tuple[int, Any]]:
    """Which values are other objects than before, or came or went."""
    keys = before if before.keys() == after.keys() else {**before, **after}
    return [key for key in keys if not same(before.get(key, MISSING), after.get(key, MISSING))]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or lists of the same objects."""
    if isinstance(one, _Items) and isinstance(other, _Items):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def assigned_cells(roots: Iterable[Any]) -> set[int]:
    """Ids of the closure cells that functions among the roots assign to (`nonlocal`)."""
    cells: set[int] = set()
    for root in roots:
        function = root.__func__ if isinstance(root, MethodType) else root
        if isinstance(function, FunctionType) and function.__closure__:
            assigned = set(_assigned(function.__code__))
            named = zip(function.__code__.co_freevars, function.__closure__, strict=True)
            cells.update(id(cell) for name, cell in named if name in assigned)
    return cells


def _assigned(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_DEREF":
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _assigned(constant)


def node_name(root: Any) -> str:
    """The node that a callable or an object comes from, as well as it can be told."""
    what: Any = root.__func__ if isinstance(root, MethodType) else root
    what = what.func if isinstance(what, partial) else what
    if not isinstance(what, FunctionType):
        what = type(what)
    name = what.__qualname__.split(".")[0]
    owner: Any = getattr(sys.modules.get(what.__module__), name, None)
    if hasattr(owner, "define_schema"):
        return f"{owner.define_schema().display_name or name} ({name})"
    return f"{name} (of {what.__module__})"


class ImageMasks:
    """Masks of the whole image that patches and controls hold, cut to tiles."""

    def __init__(self) -> None:
        self._crops: dict[tuple[int, int, int, Tile], tuple[Tensor, Tensor]] = {}
        self._originals: dict[int, Tensor] = {}

    def find(self, slots: list[Slot]) -> list[tuple[Slot, Any]]:
        """Where masks are: values whose name has `mask` in it, and which have rows and columns."""
        return [
            (slot, name)
            for slot in slots
            for name, value in slot.read().items()
            if "mask" in slot.label(name).lower() and any(map(_spatial, _items(value)))
        ]

    def cut(self, value: Any, height: int, width: int, tile: Tile) -> Any:
        """A mask, or masks in a list, as a tile of a latent of this size has it."""
        if isinstance(value, _Items):
            return _Items(self.cut(item, height, width, tile) for item in value)
        if not _spatial(value):
            return value
        original = self._originals.get(id(value), value)
        key = (id(original), height, width, tile)
        if key not in self._crops:
            rows, columns = original.shape[-2:]
            if rows % height or columns % width or rows // height != columns // width:
                # Of another shape than the image: patches fit it to the whole of what they see.
                full = original.reshape(-1, 1, rows, columns).float()
                full = torch.nn.functional.interpolate(full, (height * 8, width * 8), mode="bilinear")
                full = full.to(original.dtype).reshape(*original.shape[:-2], height * 8, width * 8)
            else:
                full = original
            crop = tile.crop(full, full.shape[-2] // height).clone()
            self._crops[key] = (original, crop)  # the original too: an id is only unique while its object lives
            self._originals[id(crop)] = original
        return self._crops[key][1]


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, _Items) else (value,)


def _spatial(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and min(value.shape[-2:]) > 1
