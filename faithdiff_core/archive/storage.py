"""Files by address: paths of this machine, and URLs that fsspec opens (`s3://`, `gs://`, `memory://`, ...).

fsspec is imported when the first URL is opened. `file://` URLs are paths.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..atomic import TEMPORARY, temporary_name, write_atomically
from ..errors import ImageError, MissingPackageError, SettingsError, install_extra
from ..images import listing
from ..images.formats import MAX_BYTES, read_content
from ..images.listing import Entry

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
"""A scheme has two letters or more: C:\\ is a drive."""

_WHOLE_OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"))
"""Object stores: an object is there when all of it has arrived, and to rename it is to copy it."""

_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Under these names file systems list what changes with a file's content, the most reliable first."""

_TRIES = 4
"""How often a URL is read or written before an error counts: stores drop requests now and then."""


def is_url(word: str) -> bool:
    """Whether a word of the command line is a URL, of a file system that fsspec opens or of this machine."""
    return _URL.match(word) is not None


def as_address(word: str) -> str:
    """A word of the command line as an address: `file://` URLs become paths."""
    if word.lower().startswith("file://"):
        return url2pathname(urlsplit(word).path)
    return word


def join(folder: str, name: str) -> str:
    """The address of a file in a folder.

    Args:
        folder: path or URL.
        name: relative, with slashes.
    """
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, *name.split("/"))


def read(address: str) -> bytes:
    """An image file's bytes.

    Raises:
        ImageError: there is no such file, it is empty or too large, or may not be read.
    """
    if not is_url(address):
        return read_content(Path(address))
    files, path = _opened(address)
    name = path.rsplit("/", 1)[-1]
    try:
        size = _again(lambda: files.size(path))
        if size is not None and size > MAX_BYTES:
            raise ImageError(f"{name} has {size} bytes; at most {MAX_BYTES} are read. Save it as PNG.")
        content: bytes = _again(lambda: files.cat_file(path))
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    if not content:
        raise ImageError(f"{name} is empty (0 bytes).")
    return content


def read_optional(address: str) -> bytes | None:
    """A file's bytes, or None where there is none."""
    try:
        if is_url(address):
            files, path = _opened(address)
            content: bytes = _again(lambda: files.cat_file(path))
            return content
        return Path(address).read_bytes()
    except FileNotFoundError:
        return None


def write(address: str, content: bytes) -> None:
    """Write a whole file: under its name there is never half of it.

    On file systems this takes a temporary name and a rename. Object stores show an object when all of it has arrived.

    Raises:
        OSError: it cannot be written.
    """
    if not is_url(address):
        write_atomically(Path(address), content)
        return
    files, path = _opened(address)
    if _WHOLE_OBJECTS & set(_protocols(files)):
        _again(lambda: files.pipe_file(path, content))
        return
    folder = path.rpartition("/")[0]
    temporary = f"{folder}/{temporary_name()}"

    def put() -> None:
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(temporary, content)
        files.mv(temporary, path)

    try:
        _again(put)
    except BaseException:
        if files.exists(temporary):
            files.rm_file(temporary)
        raise


def write_lines(address: str, lines: Iterable[str]) -> None:
    """Write a text file of any length, line by line; as with `write`, all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    encoded = (line.encode("utf-8", "surrogateescape") + b"\n" for line in lines)
    if not is_url(address):
        temporary = Path(address).with_name(temporary_name())
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.writelines(encoded)
            os.replace(temporary, address)
        finally:
            temporary.unlink(missing_ok=True)
        return
    files, path = _opened(address)
    folder = path.rpartition("/")[0]
    whole = bool(_WHOLE_OBJECTS & set(_protocols(files)))
    target = path if whole else f"{folder}/{temporary_name()}"
    if not whole:
        files.makedirs(folder, exist_ok=True)
    with files.open(target, "wb") as file:
        for line in encoded:
            file.write(line)
    if not whole:
        files.mv(target, path)


def read_lines(address: str) -> Iterator[str]:
    """The lines of a text file, none where there is no file; a last line that was cut off is left out."""
    if is_url(address):
        files, path = _opened(address)
        if not files.exists(path):
            return
        opened = files.open(path, "rb")
    elif os.path.exists(address):
        opened = open(address, "rb")  # noqa: SIM115
    else:
        return
    with opened as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line.decode("utf-8", "surrogateescape").rstrip("\n")


def remove(address: str) -> None:
    """Remove a file, if it is there."""
    if is_url(address):
        files, path = _opened(address)
        if files.exists(path):
            files.rm_file(path)
    else:
        Path(address).unlink(missing_ok=True)


def remove_folder(address: str) -> None:
    """Remove a folder with all that is in it."""
    if not is_url(address):
        shutil.rmtree(address, ignore_errors=True)
        return
    files, path = _opened(address)
    if files.exists(path):
        files.rm(path, recursive=True)


def is_leftover(name: str) -> bool:
    """Whether a file has a name under which a killed process was writing."""
    name = name.rsplit("/", 1)[-1]
    return name.startswith(TEMPORARY) and name.endswith(".part")


def is_folder(address: str) -> bool:
    """Whether there is a folder under an address."""
    if is_url(address):
        files, path = _opened(address)
        return bool(_again(lambda: files.isdir(path)))
    return os.path.isdir(address)


def walk(folder: str, without: str = "") -> Iterator[Entry]:
    """The files in a folder and its subfolders, unsorted, one subfolder's listing in memory at a time.

    Args:
        folder: path or URL.
        without: a folder that is passed over.
    """
    if is_url(folder):
        return _walk_url(folder, without)
    return listing.walk(folder, "" if is_url(without) else without)


def _walk_url(folder: str, without: str) -> Iterator[Entry]:
    files, root = _opened(folder)
    root = root.rstrip("/")
    left_out = _opened(without)[1].rstrip("/") if without and is_url(without) else None
    waiting = [root]
    while waiting:
        here = waiting.pop()
        if here == left_out:
            continue
        found_here = _again(lambda here=here: files.ls(here, detail=True))
        files.invalidate_cache()  # listings are kept otherwise, all of them
        for found in found_here:
            path = str(found["name"]).rstrip("/")
            if found["type"] == "directory":
                if path != here:
                    waiting.append(path)
            elif path != here:  # some stores list a folder as an object of its own
                name = path[len(root) :].lstrip("/")
                yield Entry(join(folder, name), name, _stamp(found))


def find(word: str) -> Iterator[Entry]:
    """The files that a URL with a pattern, or of one file, stands for; each by its own name."""
    files, path = _opened(word)
    scheme = word[: word.index("://") + 3]
    paths = files.glob(path) if any(mark in path for mark in "*?[") else [path]
    for found in paths:
        try:
            info = files.info(found)
        except FileNotFoundError:  # a failure like any other: it must not keep the other images from being done
            info = {"type": "file", "size": 0}
        if info["type"] == "file":
            yield Entry(
                word if found == path else scheme + str(found).lstrip("/"), found.rsplit("/", 1)[-1], _stamp(info)
            )


def stamp_of(address: str) -> str:
    """A file's size and version, as in an `Entry`; empty where there is none."""
    if not is_url(address):
        return listing.file_stamp(address)
    try:
        files, path = _opened(address)
        return _stamp(files.info(path))
    except (OSError, ValueError):
        return ""


def _stamp(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name) is not None), "")
    return f"{info.get('size')}-{version}"


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; fsspec keeps one object for each file system.

    Raises:
        MissingPackageError: fsspec, or its package for this kind of URL, is not installed.
        SettingsError: there is no such kind of URL.
    """
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{url}: URLs need fsspec; {install_extra('cluster')}.") from error
    try:
        files, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise MissingPackageError(f"{url}: {error}") from error
    except ValueError as error:
        raise SettingsError(f"{url} cannot be opened: {error}.") from error
    return files, path


def _protocols(files: Any) -> tuple[str, ...]:
    names = files.protocol
    return (names,) if isinstance(names, str) else tuple(names)


def _again(call: Any) -> Any:
    """The result of a call to a remote store, tried a few times: a dropped connection is no failed image."""
    for wait in [0.2 * 4**number for number in range(_TRIES - 1)]:
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(wait)
    return call()
