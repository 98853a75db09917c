"""Sources of training images: a folder with captions, given pairs, or a data set of the `datasets` library."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..captions.files import caption_text
from ..errors import ImageError, MissingPackageError, SettingsError, install_extra
from ..images.formats import named_files, read_suffixes
from ..images.listing import list_folder
from ..images.reading import decode_image, load_image
from .config import DataConfig, EnlargeMode
from .degradation import to_image

MAX_REPORTED = 5
"""How many bad entries a message names."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An image with what belongs to it; `lq` is None where it has yet to be made."""

    hq: Image.Image
    lq: Image.Image | None
    caption: str


class Source(Protocol):
    """A numbered set of images.

    Attributes:
        kind: what the set is, apart from its entries; two sets of other kinds have nothing in common.
    """

    kind: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an entry in a message."""

    def read(self, index: int) -> Sample:
        """Read an entry.

        Raises:
            ImageError: it is bad; the text says why.
        """

    def check_caption(self, index: int) -> None:
        """Raise a ImageError if the entry has no caption; reads no image."""

    def key(self, index: int) -> str:
        """An entry's name within the set, wherever the set is."""

    def stamp(self, index: int) -> list[Any]:
        """Sizes and times of an entry's files: as long as these stay, so does the entry."""

    def pin(self, keys: Sequence[str]) -> tuple[list[int], int]:
        """Indices of entries by key, of missing ones too (reading these raises), and how many others there are."""


def list_images(folder: Path) -> list[Path]:
    """All images in a folder and its sub-folders, sorted.

    Raises:
        ImageError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ImageError(f"There is no folder {folder}. Check the name.")
    found = list_folder(folder)
    if not found.files:
        raise ImageError(
            f"The folder {folder} has no images ({', '.join(read_suffixes())}).{' ' * bool(found.note)}{found.note}"
        )
    if found.note:
        logger.warning("%s: %s", folder, found.note)
    return found.files


def open_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB.

    Raises:
        ImageError: it cannot be read.
    """
    return to_image(load_image(path).colors)


def named_problems(problems: Sequence[str]) -> str:
    """The first few of some problems, and how many more there are."""
    more = f"; and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
    return "; ".join(text.rstrip(".") for text in problems[:MAX_REPORTED]) + more


def _size_and_time(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _content(file: Path) -> str:
    try:
        return caption_text(file.read_bytes(), str(file))
    except SettingsError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        raise ImageError(f"{file} cannot be read: {error.strerror or error}.") from error


class FolderSource:
    """Images in a folder, with captions and perhaps low-quality partners beside them.

    Raises:
        ImageError: an empty folder, or images without a partner.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.folder is not None
        self.config = config
        self.folder = config.folder
        self.kind = "pairs" if config.lq_folder is not None else "folder"
        self.files = list_images(config.folder)
        self.partners: dict[str, Path] | None = None
        if config.lq_folder is not None:
            self.partners = named_files(config.lq_folder, list_images(config.lq_folder))
            stems = {self._stem(f, config.folder) for f in self.files}
            extra = sorted(self.partners.keys() - stems)
            if extra:
                lonely = named_problems([f"{self.partners[s]} has no partner in {config.folder}" for s in extra])
                if config.on_bad == "raise":
                    raise ImageError(f"{lonely}. Give them partners or remove them, or set `on_bad: skip`.")
                logger.warning("left out: %s", lonely)

    @staticmethod
    def _stem(file: Path, folder: Path) -> str:
        return str(file.relative_to(folder).with_suffix(""))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def check_caption(self, index: int) -> None:
        self._caption(self.files[index])

    def key(self, index: int) -> str:
        return self.files[index].relative_to(self.folder).as_posix()

    def stamp(self, index: int) -> list[Any]:
        file = self.files[index]
        files = [file, file.with_suffix(".txt"), file.with_suffix(".json")]
        if self.partners is not None:
            files += [p for p in (self.partners.get(self._stem(file, self.folder)),) if p is not None]
        return [_size_and_time(f) for f in files]

    def pin(self, keys: Sequence[str]) -> tuple[list[int], int]:
        known = {self.key(index): index for index in range(len(self.files))}
        added = len(known.keys() - set(keys))
        for key in keys:
            if key not in known:
                known[key] = len(self.files)
                self.files.append(self.folder / key)
        return [known[key] for key in keys], added

    def read(self, index: int) -> Sample:
        try:
            return self._read(self.files[index])
        except OSError as error:
            raise ImageError(f"{self.files[index]} or what belongs to it cannot be read: {error}") from error

    def _read(self, file: Path) -> Sample:
        hq, lq = open_image(file), None
        if self.partners is not None:
            assert self.config.lq_folder is not None
            partner = self.partners.get(self._stem(file, self.folder))
            if partner is None:
                raise ImageError(f"{file} has no partner in {self.config.lq_folder}")
            lq = open_image(partner)
            if hq.width % lq.width or hq.height % lq.height or hq.width * lq.height != hq.height * lq.width:
                raise ImageError(
                    f"{file} of {hq.width} x {hq.height} pixels and its partner of {lq.width} x {lq.height} do not "
                    "match: expected the larger to be a whole multiple of the smaller"
                )
        return Sample(hq, lq, self._caption(file))

    def _caption(self, file: Path) -> str:
        kind = self.config.captions
        if kind == "none":
            return ""
        text, data = file.with_suffix(".txt"), file.with_suffix(".json")
        if kind in ("auto", "text") and text.is_file():
            return _content(text)
        if kind in ("auto", "json") and data.is_file():
            content = _content(data)
            try:
                caption = json.loads(content)["caption"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ImageError(f'{data} has no caption: expected {{"caption": "..."}} ({error!r})') from error
            if not isinstance(caption, str):
                raise ImageError(f"{data}: the caption is a {type(caption).__name__}, expected text")
            return caption.strip()
        wanted = {"text": text.name, "json": data.name, "auto": f"{text.name} or {data.name}"}[kind]
        raise ImageError(f"{file} has no caption: expected {wanted} beside it")


class DatasetsSource:
    """A data set of Hugging Face's `datasets`.

    Raises:
        MissingPackageError: the library is not installed.
        SettingsError: there is no such data set, split or column.
    """

    def __init__(self, config: DataConfig) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingPackageError(
                f"`huggingface` data sets need the `datasets` library; {install_extra('train')}."
            ) from error
        assert config.huggingface is not None
        self.config = config
        try:
            if Path(config.huggingface).is_dir():
                loaded: Any = datasets.load_from_disk(config.huggingface)
                if isinstance(loaded, datasets.DatasetDict):
                    loaded = loaded[config.split]
            else:
                loaded = datasets.load_dataset(config.huggingface, split=config.split)
        except (FileNotFoundError, KeyError, ValueError, ConnectionError) as error:
            raise SettingsError(f"The data set {config.huggingface} cannot be opened: {error}") from error
        columns = [config.image_column] + ([config.caption_column] if config.captions != "none" else [])
        missing = [c for c in columns if c not in loaded.column_names]
        if missing:
            raise SettingsError(
                f"The data set {config.huggingface} has no column {', '.join(missing)}; it has "
                f"{', '.join(loaded.column_names)}. Set image_column and caption_column."
            )
        if not len(loaded):
            raise ImageError(f"The data set {config.huggingface} is empty.")
        # Undecoded: the library would let Pillow take a file for any format, and some run other programs.
        self.rows = loaded.cast_column(config.image_column, datasets.Image(decode=False))
        self.kind = f"datasets {getattr(loaded, '_fingerprint', '')}"

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.config.huggingface}"

    def check_caption(self, index: int) -> None:
        if self.config.captions != "none":
            self._caption(self.rows.select_columns([self.config.caption_column])[index])

    def key(self, index: int) -> str:
        return f"row {index}"

    def stamp(self, index: int) -> list[Any]:
        return []  # a data set's fingerprint changes with its content

    def pin(self, keys: Sequence[str]) -> tuple[list[int], int]:
        indices = [int(key.removeprefix("row ")) for key in keys]
        if max(indices) >= len(self.rows):
            raise ImageError(
                f"The data set {self.config.huggingface} has {len(self.rows)} rows, and the run began with row "
                f"{max(indices)}. Give the data set that it began with, or another output folder."
            )
        return indices, 0

    def _caption(self, row: dict[str, Any]) -> str:
        caption = row[self.config.caption_column]
        if not isinstance(caption, str):
            raise ImageError(f"a caption is {caption!r}, expected text")
        return caption.strip()

    def read(self, index: int) -> Sample:
        row = self.rows[index]
        stored = row[self.config.image_column]
        try:
            content = stored["bytes"]
            loaded = load_image(stored["path"]) if content is None else decode_image(content, self.name(index))
        except (ImageError, TypeError, KeyError) as error:
            raise ImageError(f"{self.name(index)} cannot be decoded: {error}") from error
        image = to_image(loaded.colors)
        return Sample(image, None, "" if self.config.captions == "none" else self._caption(row))


def open_source(config: DataConfig) -> Source:
    """Open the source that a configuration names."""
    return FolderSource(config) if config.folder is not None else DatasetsSource(config)


def enlarge(image: Image.Image, size: tuple[int, int], mode: EnlargeMode = "lanczos") -> Image.Image:
    """Bring a low-quality image to a (width, height). Defaults to Lanczos, as in inference."""
    return image if image.size == size else image.resize(size, Image.Resampling[mode.upper()])
