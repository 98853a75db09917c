"""Training samples, each a function of its number alone.

Samples are numbered through the whole run. A sample's number fixes its image, crop, degradation, caption dropout,
timestep and noise, so neither the number of workers nor that of processes changes what is learned, and resuming is
counting on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..backbone import TRAIN_STEPS
from ..captions.trim import trim_caption
from ..errors import ImageError
from .config import DataConfig
from .data import Sample, Source, enlarge, list_images, open_image
from .degradation import degrade, to_tensor

MAX_REPLACEMENTS = 16
"""How many other images a sample tries after a bad one."""


@dataclass(frozen=True)
class SampleSettings:
    """What a sample's tensors depend on besides the image.

    Attributes:
        seed: of the run.
        text_dropout: how often the caption is empty.
        noise_offset: standard deviation of the constant on each channel's noise.
        latent_channels: of the VAE.
        latent_scale: pixels per latent along a side.
        draws: timesteps and noises for each image.
    """

    seed: int
    text_dropout: float
    noise_offset: float
    latent_channels: int
    latent_scale: int
    draws: int = 1


class TrainingSet(Dataset[dict[str, Any]]):
    """Samples by their number in the run.

    An item has `hq` and `lq` ((3, size, size) in [-1, 1]), `time_ids` (SDXL's six numbers), `caption`, `timestep`,
    `noise` and `posterior` (standard normal, for the VAE's sample; both of the latent's shape).

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

    def entry(self, number: int, attempt: int = 0) -> int:
        """Index of a sample's image in the source: attempt 0, or one of those that replace it where it is bad."""
        if attempt:
            rng = np.random.default_rng([self.settings.seed, 4, number, attempt])
            return self.entries[int(rng.integers(len(self.entries)))]
        epoch, place = divmod(number, len(self.entries))
        return self.entries[self._order(epoch)[place]]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.make(number)

    def make(self, number: int, attempt: int = 0) -> dict[str, Any]:
        """Make a sample, of another image than its own from attempt 1 on.

        Raises:
            ImageError: the image is bad.
        """
        sample = self.source.read(self.entry(number, attempt))
        rng = np.random.default_rng([self.settings.seed, 2, number])
        crop = crop_pair(sample, self.config, rng)
        caption = trim_caption(sample.caption) if self.config.trim_captions else sample.caption
        side = self.config.size // self.settings.latent_scale
        shape = (self.settings.latent_channels, side, side)
        draws = self.settings.draws
        noise = rng.standard_normal((draws, *shape), dtype=np.float32)
        noise += self.settings.noise_offset * rng.standard_normal((draws, shape[0], 1, 1), dtype=np.float32)
        # One draw from each of equal parts of the schedule: each is uniform over the whole, in random order.
        parts = rng.permutation(draws) + rng.random(draws)
        return {
            "hq": to_tensor(crop.hq) * 2 - 1,
            "lq": to_tensor(crop.lq) * 2 - 1,
            "time_ids": torch.tensor(crop.time_ids, dtype=torch.float32),
            "caption": "" if rng.random() < self.settings.text_dropout else caption,
            "timestep": torch.from_numpy((parts * TRAIN_STEPS / draws).astype(np.int64)),
            "noise": torch.from_numpy(noise),
            "posterior": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        }


class GuardedSamples(Dataset[dict[str, Any]]):
    """Samples for a loader: a bad image is reported in the item, and not by an exception in a worker process.

    An item is a sample with `skipped`, a list of (key, problem) of the bad images that came before it; or it has
    `failed` alone, the problem that no other image could replace.

    Args:
        samples: where the items come from.
    """

    def __init__(self, samples: TrainingSet) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        attempts = MAX_REPLACEMENTS if self.samples.config.on_bad == "skip" else 0
        skipped: list[tuple[str, str]] = []
        for attempt in range(attempts + 1):
            try:
                return self.samples.make(number, attempt) | {"skipped": skipped}
            except ImageError as error:
                skipped.append((self.samples.source.key(self.samples.entry(number, attempt)), str(error)))
        return {"failed": skipped[-1][1]}


@dataclass(frozen=True)
class Crop:
    """A square of an image in both qualities.

    Attributes:
        hq, lq: images of the crop's size.
        time_ids: SDXL's six numbers: the image's height and width, the crop's top and left, height and width.
    """

    hq: Image.Image
    lq: Image.Image
    time_ids: tuple[int, int, int, int, int, int]


def crop_pair(sample: Sample, config: DataConfig, rng: np.random.Generator) -> Crop:
    """Cut the same square out of both images; the low-quality one is made if need be, and enlarged.

    Raises:
        ImageError: the image is smaller than the crop.
    """
    size, hq, lq = config.size, sample.hq, sample.lq
    # A given partner is cut at whole pixels of its own, and so is one that is degraded with a margin.
    step = hq.width // lq.width if lq is not None else (1 if config.margin == 0 else config.degradation.scale)
    if size % step or (min(hq.size) < size and config.small == "refuse"):
        raise ImageError(
            f"An image of {hq.width} x {hq.height} pixels (scale {step}) cannot be cropped to {size}: expected at "
            "least the crop's size, and a crop that the scale divides."
        )
    width, height = (min(size, side // step * step) for side in hq.size)
    left, top = (
        int(rng.integers(0, (side - cut) // step + 1)) * step
        for side, cut in zip(hq.size, (width, height), strict=True)
    )
    flip = config.flip and bool(rng.random() < 0.5)
    box = (left, top, left + width, top + height)
    if lq is None:
        small = degraded_crop(hq, box, config, rng, flip)
    else:
        small = lq.crop((box[0] // step, box[1] // step, box[2] // step, box[3] // step))
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small
    cut = hq.crop(box)
    cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cut
    if cut.size != (size, size):
        side = -(-size // step) if step > 1 else round(size * small.width / width)
        cut, small = _reflected(cut, size), _reflected(small, side)
    mode = config.enlarge[int(rng.integers(len(config.enlarge)))] if len(config.enlarge) > 1 else config.enlarge[0]
    place = (hq.height, hq.width, top, hq.width - left - width if flip else left)
    if config.size_conditioning == "crop":
        place = (size, size, 0, 0)
    return Crop(cut, enlarge(small, (size, size), mode), (*place, size, size))


def degraded_crop(
    image: Image.Image, box: tuple[int, int, int, int], config: DataConfig, rng: np.random.Generator, flip: bool
) -> Image.Image:
    """The low-quality version of a part of an image, degraded together with what is around it.

    Args:
        image: high quality.
        box: left, top, right, bottom; with a margin, all multiples of the degradation's scale.
        config: the margin and the degradation.
        rng: source of all draws.
        flip: mirror the result.
    """
    scale = config.degradation.scale
    region = box
    if config.margin is None:
        region = (0, 0, image.width // scale * scale, image.height // scale * scale)
    elif config.margin:
        # The shift lets JPEG's blocks of 8 low-quality pixels begin anywhere in the crop.
        margin = -(-config.margin // scale) * scale
        shifts = [int(shift) * scale for shift in rng.integers(0, 8, 2)]
        region = (
            max(0, box[0] - margin - shifts[0]),
            max(0, box[1] - margin - shifts[1]),
            min(image.width // scale * scale, box[2] + margin),
            min(image.height // scale * scale, box[3] + margin),
        )
    part = image.crop(region)
    left, top = box[0] - region[0], box[1] - region[1]
    if flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = region[2] - box[2]
    low = degrade(part, config.degradation, rng)
    if region == box:
        return low
    width, height = (box[2] - box[0]) // scale, (box[3] - box[1]) // scale
    return low.crop((left // scale, top // scale, left // scale + width, top // scale + height))


def _reflected(image: Image.Image, size: int) -> Image.Image:
    """An image continued by reflection on the right and at the bottom to a square."""
    pixels = np.asarray(image)
    missing = [(0, size - pixels.shape[0]), (0, size - pixels.shape[1]), (0, 0)]
    return Image.fromarray(np.pad(pixels, missing, mode="reflect"))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples; captions stay a list. A failed item makes the whole batch one."""
    for sample in samples:
        if "failed" in sample:
            return {"failed": sample["failed"]}
    batch: dict[str, Any] = {
        key: torch.stack([s[key] for s in samples])
        for key in ("hq", "lq", "time_ids", "noise", "posterior", "timestep")
    }
    batch["caption"] = [s["caption"] for s in samples]
    batch["skipped"] = [entry for s in samples for entry in s.get("skipped", [])]
    return batch


class StepBatches(Sampler[list[int]]):
    """The sample numbers of this process's batches, step by step.

    Args:
        first_step, last_step: half-open range of optimizer steps, counted through the whole run.
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
    """Fixed pairs for sample images: centre crops, each degraded with its own seed.

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
        step = 1 if config.margin == 0 else config.degradation.scale
        left, top = ((side - config.size) // 2 // step * step for side in image.size)
        box = (left, top, left + config.size, top + config.size)
        hq = image.crop(box)
        lq = degraded_crop(image, box, config, np.random.default_rng([seed, 3, index]), flip=False)
        pairs.append((to_tensor(hq) * 2 - 1, to_tensor(enlarge(lq, hq.size)) * 2 - 1))
    return pairs
