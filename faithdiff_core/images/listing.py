"""Which files the words of a command line stand for, in one way for every command, folders of any size included."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingsError
from .formats import is_readable, left_out_note
from .names import real_path


@dataclass(frozen=True)
class Entry:
    """A file of a listing.

    Attributes:
        address: path or URL.
        name: relative to the folder that was listed, with slashes.
        stamp: size and version; another one means another content.
    """

    address: str
    name: str
    stamp: str


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder.

    Attributes:
        files: that can be read, sorted.
        left_out: number of images of formats that are not read, by ending.
    """

    files: list[Path]
    left_out: Counter[str]

    @property
    def note(self) -> str:
        """What a user should know about `left_out`; empty if nothing was."""
        return left_out_note(self.left_out)


def list_folder(folder: Path) -> ImageFolder:
    """Find the images in a folder and its subfolders; hidden files, and the `._` files of macOS, are none."""
    left_out: Counter[str] = Counter()
    files = sorted(Path(entry.address) for entry in only_images(walk(str(folder)), left_out))
    return ImageFolder(files, left_out)


def expand(word: str, out: str, left_out: Counter[str]) -> Iterator[Entry]:
    """The images that a path or a pattern stands for, one subfolder's names in memory at a time; a folder's unsorted.

    Results of an earlier run, in an output folder below the input folder, are no inputs.

    Args:
        word: an image, a folder or a pattern.
        out: path of the output, or empty where it is none.
        left_out: counts, by ending, the images in a folder whose formats are not read.

    Raises:
        SettingsError: the folder is the output folder, too.
    """
    if os.path.isdir(word):
        check_other_folder(bool(out) and real_path(Path(word)) == real_path(Path(out)), out)
        yield from only_images(walk(word, out), left_out)
    elif os.path.lexists(word) or not glob.has_magic(word):
        # One that does not exist is a failure like any other: it must not keep the others from being done.
        yield Entry(word, Path(word).name, file_stamp(word))
    else:
        for file in sorted(glob.iglob(word, recursive=True)):
            if os.path.isfile(file):
                yield Entry(file, Path(file).name, file_stamp(file))


def walk(folder: str, without: str = "") -> Iterator[Entry]:
    """The files in a folder and its subfolders, unsorted; links to folders are not followed.

    Args:
        folder: a path.
        without: path of a folder that is passed over.
    """
    left_out = real_path(Path(without)) if without else None
    waiting = [(folder, "")]
    while waiting:
        here, prefix = waiting.pop()
        if left_out is not None and real_path(Path(here)) == left_out:
            continue
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                elif os.path.isfile(entry.path):  # entry.is_file() raises an error for links in a circle
                    yield Entry(entry.path, prefix + entry.name, file_stamp(entry.path))


def only_images(entries: Iterable[Entry], left_out: Counter[str]) -> Iterator[Entry]:
    """Those of a listing that are images which are read; the other images are counted in `left_out`, by ending."""
    for entry in entries:
        name = entry.name.rsplit("/", 1)[-1]
        readable = is_readable(name)
        if readable:
            yield entry
        elif readable is not None:
            left_out[Path(name).suffix.lower()] += 1


def check_other_folder(same: bool, out: str) -> None:
    """Refuse a folder of inputs that is the folder of the results, too.

    Raises:
        SettingsError: it is.
    """
    if same:
        raise SettingsError(f"{out} is the folder of the inputs. Choose another one for the results.")


def file_stamp(path: str) -> str:
    """Size and version of a file, as in an `Entry`; empty where there is none."""
    try:
        found = os.stat(path)
        return f"{found.st_size}-{found.st_mtime_ns}"
    except (OSError, ValueError):
        return ""
