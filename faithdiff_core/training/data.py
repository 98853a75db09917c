"""Training samples: images with captions, or given pairs, each sample a function of its number alone.

Samples are numbered through the whole run. A sample's number fixes its image, crop, degradation, caption dropout,
time step and noise, so neither the number of workers nor that of processes changes what is learned, and resuming is
counting on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import ImageError, MissingPackageError, SettingsError, install_extra
from ..images.formats import list_folder, read_suffixes
from ..images.reading import decode_image, load_image
from ..sdxl import TRAIN_STEPS
from .config import DataConfig
from .degradation import degrade, to_image, to_tensor

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
    """A numbered set of images."""

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


class FolderSource:
    """Images in a folder, with captions and perhaps low-quality partners beside them.

    Raises:
        ImageError: an empty folder, or images without a partner.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.folder is not None
        self.config = config
        self.folder = config.folder
        self.files = list_images(config.folder)
        self.partners: dict[str, Path] | None = None
        if config.lq_folder is not None:
            self.partners = {self._stem(f, config.lq_folder): f for f in list_images(config.lq_folder)}
            stems = {self._stem(f, config.folder) for f in self.files}
            extra = sorted(self.partners.keys() - stems)
            if extra:
                _report([f"{self.partners[s]} has no partner in {config.folder}" for s in extra], len(stems), config)

    @staticmethod
    def _stem(file: Path, folder: Path) -> str:
        return str(file.relative_to(folder).with_suffix(""))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def check_caption(self, index: int) -> None:
        self._caption(self.files[index])

    def read(self, index: int) -> Sample:
        file = self.files[index]
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
            return text.read_text(encoding="utf-8-sig").strip()
        if kind in ("auto", "json") and data.is_file():
            try:
                caption = json.loads(data.read_text(encoding="utf-8-sig"))["caption"]
            except (ValueError, KeyError, TypeError) as error:
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

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.config.huggingface}"

    def check_caption(self, index: int) -> None:
        if self.config.captions != "none":
            self._caption(self.rows.select_columns([self.config.caption_column])[index])

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


def _report(problems: Sequence[str], total: int, config: DataConfig) -> None:
    named = "; ".join(problems[:MAX_REPORTED]) + (
        f"; and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
    )
    if config.on_bad == "raise":
        raise ImageError(
            f"{len(problems)} of {total} training entries are bad: {named}. Mend or remove them, or set `on_bad: skip`."
        )
    logger.warning("skipped %d of %d training entries: %s", len(problems), total, named)


def usable_entries(source: Source, config: DataConfig) -> list[int]:
    """Look at every entry before training starts.

    Args:
        source: the images.
        config: says whether images are decoded, and what happens to bad ones.

    Returns:
        Indices of the good entries.

    Raises:
        ImageError: there are bad entries and the configuration says `raise`, or no good one is left.
    """

    def problem(index: int) -> str | None:
        try:
            if not config.check:
                source.check_caption(index)
                return None
            sample = source.read(index)
        except ImageError as error:
            return str(error)
        if min(sample.hq.size) < config.size:
            return (
                f"{source.name(index)} of {sample.hq.width} x {sample.hq.height} pixels is smaller than the crop of "
                f"{config.size}"
            )
        return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = list(pool.map(problem, range(len(source))))
    bad = [text for text in problems if text is not None]
    if bad:
        _report(bad, len(source), config)
    good = [i for i, text in enumerate(problems) if text is None]
    if not good:
        raise ImageError("No usable training image is left.")
    return good


@dataclass(frozen=True)
class SampleSettings:
    """What a sample's tensors depend on besides the image.

    Attributes:
        seed: of the run.
        text_dropout: how often the caption is empty.
        noise_offset: standard deviation of the constant on each channel's noise.
        latent_channels: of the VAE.
        latent_scale: pixels per latent along a side.
        draws: time steps and noises for each image.
    """

    seed: int
    text_dropout: float
    noise_offset: float
    latent_channels: int
    latent_scale: int
    draws: int = 1


class TrainingSet(Dataset[dict[str, Any]]):
    """Samples by their number in the run.

    An item has `hq` and `lq` ((3, size, size) in [-1, 1]), `caption`, `timestep`, `noise` and `posterior` (standard
    normal, for the VAE's sample; both of the latent's shape).

    Args:
        source: the images.
        entries: indices of the usable ones.
        config: crops and degradation.
        settings: everything else that is drawn.
    """

    def __init__(self, source: Source, entries: Sequence[int], config: DataConfig, settings: SampleSettings) -> None:
        self.source, self.entries, self.config, self.settings = source, list(entries), config, settings
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are spawned get a copy, and caches do not travel.
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.settings.seed, 1, epoch]).permutation(len(self.entries))

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.entries))
        sample = self.source.read(self.entries[self._order(epoch)[place]])
        rng = np.random.default_rng([self.settings.seed, 2, number])
        hq, lq = crop_pair(sample, self.config, rng)
        side = self.config.size // self.settings.latent_scale
        shape = (self.settings.latent_channels, side, side)
        draws = self.settings.draws
        noise = rng.standard_normal((draws, *shape), dtype=np.float32)
        noise += self.settings.noise_offset * rng.standard_normal((draws, shape[0], 1, 1), dtype=np.float32)
        # One draw from each of equal parts of the schedule: each is uniform over the whole, in random order.
        parts = rng.permutation(draws) + rng.random(draws)
        return {
            "hq": to_tensor(hq) * 2 - 1,
            "lq": to_tensor(lq) * 2 - 1,
            "caption": "" if rng.random() < self.settings.text_dropout else sample.caption,
            "timestep": torch.from_numpy((parts * TRAIN_STEPS / draws).astype(np.int64)),
            "noise": torch.from_numpy(noise),
            "posterior": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        }


def crop_pair(sample: Sample, config: DataConfig, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Cut the same square out of both images; the low-quality one is made if need be, and enlarged to the crop's
    size.

    Raises:
        ImageError: the image is smaller than the crop.
    """
    size, hq, lq = config.size, sample.hq, sample.lq
    # A given partner is cut at whole pixels of its own.
    step = 1 if lq is None else hq.width // lq.width
    if min(hq.size) < size or size % step:
        raise ImageError(
            f"An image of {hq.width} x {hq.height} pixels (scale {step}) cannot be cropped to {size}: expected at "
            "least the crop's size, and a crop that the scale divides."
        )
    left, top = (int(rng.integers(0, (side - size) // step + 1)) * step for side in hq.size)
    hq = hq.crop((left, top, left + size, top + size))
    if lq is not None:
        lq = lq.crop((left // step, top // step, (left + size) // step, (top + size) // step))
    if config.flip and rng.random() < 0.5:
        hq = hq.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        lq = lq.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if lq is not None else None
    if lq is None:
        lq = degrade(hq, config.degradation, rng)
    return hq, enlarge(lq, (size, size))


def enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bring a low-quality image to a (width, height), as inference does (Lanczos)."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples; captions stay a list."""
    batch: dict[str, Any] = {
        key: torch.stack([s[key] for s in samples]) for key in ("hq", "lq", "noise", "posterior", "timestep")
    }
    batch["caption"] = [s["caption"] for s in samples]
    return batch


class StepBatches(Sampler[list[int]]):
    """The sample numbers of this process's batches, step by step.

    Args:
        first_step, last_step: half-open range of optimiser steps, counted through the whole run.
        batch: samples in each batch.
        accumulate: batches in each step.
        process, processes: this process's number, and how many there are.
    """

    def __init__(
        self, first_step: int, last_step: int, batch: int, accumulate: int = 1, process: int = 0, processes: int = 1
    ) -> None:
        self.first_step, self.last_step = first_step, last_step
        self.batch, self.accumulate = batch, accumulate
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for call in range(self.first_step * self.accumulate, self.last_step * self.accumulate):
            start = (call * self.processes + self.process) * self.batch
            yield list(range(start, start + self.batch))


def validation_pairs(folder: Path, count: int, config: DataConfig, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Fixed pairs for sample images: centre crops, each degraded with a seed of its own.

    Returns:
        (hq, lq) of (3, size, size) each, in [-1, 1].

    Raises:
        ImageError: the folder has no images, or one cannot be used.
    """
    pairs = []
    for index, file in enumerate(list_images(folder)[:count]):
        image = open_image(file)
        if min(image.size) < config.size:
            raise ImageError(f"{file} of {image.width} x {image.height} pixels is smaller than {config.size}.")
        left, top = ((side - config.size) // 2 for side in image.size)
        hq = image.crop((left, top, left + config.size, top + config.size))
        lq = degrade(hq, config.degradation, np.random.default_rng([seed, 3, index]))
        pairs.append((to_tensor(hq) * 2 - 1, to_tensor(enlarge(lq, hq.size)) * 2 - 1))
    return pairs
