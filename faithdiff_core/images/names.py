"""Names of results, and why a file cannot be read or written, asked before any work is done."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import SettingsError

NAME_LIMIT = 255
"""Bytes of a file name, where the file system does not say how many it takes."""


def result_names(names: Sequence[Path], suffix: str) -> list[Path]:
    """Names of results, one for each image, all different even where upper and lower case are the same.

    Args:
        names: of images, relative to their folder, in the order of the listing.
        suffix: ending of results, such as ".png".

    Raises:
        SettingsError: several images would get one name.
    """
    stems = Counter(folded_stem(name) for name in names)
    return apart([result_name(name, suffix, alone=stems[folded_stem(name)] == 1) for name in names])


def result_name(name: Path, suffix: str, *, alone: bool) -> Path:
    """The name of one image's result; `alone` says that no other image has the same name but for the ending.

    a.jpg and a.png would both become a.png; then both keep their endings.
    """
    return name.with_suffix(suffix) if alone else Path(f"{name}{suffix}")


def folded_stem(name: Path) -> str:
    """A name without its ending, as file systems see it that do not tell upper from lower case."""
    return str(name.with_suffix("")).casefold()


def apart(names: Sequence[Path], taken_elsewhere: Callable[[str], bool] = lambda folded: False) -> list[Path]:
    """The names with numbers behind those that differ from an earlier one in upper and lower case alone.

    Args:
        names: of results.
        taken_elsewhere: whether a casefolded name belongs to a result that is not among `names`.

    Raises:
        SettingsError: two are the same.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SettingsError(f"Several images would be written to {twice[0]}. Give their folders one at a time.")
    taken = {str(name).casefold() for name in names}
    seen: set[str] = set()
    results = []
    for name in names:
        unique, number = name, 1
        folded = str(unique).casefold()
        while folded in seen or (number > 1 and (folded in taken or taken_elsewhere(folded))):
            number += 1
            unique = name.with_stem(f"{name.stem}_{number}")
            folded = str(unique).casefold()
        results.append(unique)
        seen.add(folded)
    return results


def source_problem(source: Path) -> str:
    """Why there is nothing to read; empty if there is."""
    if os.path.exists(source):
        return ""
    return "it is a link that leads to no file" if os.path.islink(source) else "there is no such file"


def folder_problem(folder: Path) -> str:
    """Why no file can be made in a folder that may have to be made itself; empty if one can."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        if there == folder:
            with tempfile.TemporaryFile(dir=there):
                pass
        else:
            os.rmdir(tempfile.mkdtemp(dir=there))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"the folder {folder} cannot be {'written to' if there == folder else 'made'} ({there}: {reason})."
    return ""


def name_problem(target: Path) -> str:
    """Why the file system does not take a result's name; empty if it does."""
    try:
        limit = os.pathconf(target.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # no such folder yet, or Windows
        limit = NAME_LIMIT
    size = len(os.fsencode(target.name))
    return f"the result's name has {size} bytes, and the file system takes {limit}. Rename the image." * (size > limit)


def real_path(path: Path) -> Path:
    """A path without links; `Path.resolve` raises an error for links in a circle and for null bytes."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return Path(os.path.abspath(path))
