"""One run over many images: which models, which settings, and what is done to each file.

A `Restoration` is plain data, so it can be handed to another process or machine. An image's result depends on it and
on the image alone, never on where or when the image is restored.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..attribution.overlay import attribution_sheet, image_maps
from ..captions.files import CAPTION_SUFFIX, beside, caption_text
from ..captions.tile_captions import TILES_SUFFIX, ImageText, read_tile_captions
from ..captions.tile_texts import TILE_MIX
from ..captions.trim import trim_caption
from ..errors import ImageError, SettingsError
from ..images.geometry import resize_lanczos
from ..images.masks import load_mask
from ..images.reading import LoadedImage, load_image
from ..images.region import FEATHER
from ..images.sizes import target_size
from ..images.writing import check_output, encode_image
from .attribution import Attribution
from .settings import RestoreSettings

if TYPE_CHECKING:
    from torch import Tensor

    from .pipeline import FaithDiffPipeline

METADATA_KEY = "faithdiff"
"""Entry of a result's metadata with all settings as JSON."""

Progress = Callable[[str, int, int], None]
"""Told the stage of the work, and how many units of it are done, of how many."""


@dataclass(frozen=True)
class ModelFiles:
    """The models of a run; see `FaithDiffPipeline.from_files`.

    Attributes:
        model, faithdiff, unet, config, vae: files and folders.
        loras: LoRA files with their strengths.
        dtype: `fp32`, `bf16`, `fp16` or `auto`.
        device: a device's name or `auto`.
        offload, scheduler: by name.
    """

    model: Path
    faithdiff: Path
    unet: Path | None = None
    config: Path | None = None
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    offload: Any = "none"
    scheduler: str = "euler"

    def load(self) -> FaithDiffPipeline:
        """Load them.

        Raises:
            FaithDiffError: a file is missing or not what it should be, or a setting is unknown.
        """
        from .pipeline import FaithDiffPipeline

        pipeline = FaithDiffPipeline.from_files(
            self.model,
            self.faithdiff,
            unet=self.unet,
            config=self.config,
            vae=self.vae,
            dtype=None if self.dtype == "auto" else self.dtype,
            device=None if self.device == "auto" else self.device,
            offload=self.offload,
            scheduler=self.scheduler,
        )
        for path, weight in self.loras:
            pipeline.load_lora(path, weight=weight)
        return pipeline

    def identity(self) -> list[tuple[str, int, int]]:
        """Name, size and time of the last change of every file, so that a model that was trained further is another."""
        paths = [self.model, self.faithdiff, self.unet, self.vae, *(path for path, _ in self.loras)]
        files = [
            file
            for path in paths
            if path is not None
            for file in (sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path])
        ]
        return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]

    def recorded(self) -> dict[str, Any]:
        """What is written into results: names without folders, since results travel."""
        names = ("model", "faithdiff", "unet", "vae")
        return {
            "scheduler": self.scheduler,
            "dtype": self.dtype,
            **{name: path.name for name in names if (path := getattr(self, name)) is not None},
            "loras": [[path.name, weight] for path, weight in self.loras],
        }


@dataclass(frozen=True)
class Made:
    """A restored image that is not written yet.

    Attributes:
        image: the result.
        content: its file.
        notes: what a user should know about the image.
        attribution: the file of its attribution maps, where they were asked for.
    """

    image: LoadedImage
    content: bytes
    notes: tuple[str, ...]
    attribution: bytes | None = None


@dataclass(frozen=True)
class Restoration:
    """What is done to every image of a run.

    Attributes:
        files: the models.
        settings: how an image is restored, without its size.
        size: one of `scale`, `longest_side` and `megapixels` with its value, as `target_size` takes it.
        prompt, negative_prompt: texts for every image.
        captions: take the prompt from NAME.txt beside each image where there is one.
        tile_captions: moreover take captions of each image's parts from NAME.tiles.json, which has to be there, for the
            sampler's tiles.
        tile_mix: their share in a tile's text, 0 to 1; the rest is the prompt's.
        trim_captions: trim captions as the published code does.
        seed: the same for every image.
        metadata: keep EXIF, XMP and resolution of each image in its result.
        location: keep where the photograph was taken among them.
        feather: width in pixels of the soft edge around a mask.
        attribute: words of the prompt whose attribution maps are written to NAME.attribution.png beside each result.
    """

    files: ModelFiles
    settings: RestoreSettings = field(default_factory=RestoreSettings)
    size: dict[str, Any] = field(default_factory=lambda: {"scale": RestoreSettings().scale})
    prompt: str = ""
    negative_prompt: str = ""
    captions: bool = False
    tile_captions: bool = False
    tile_mix: float = TILE_MIX
    trim_captions: bool = False
    seed: int = 0
    metadata: bool = True
    location: bool = True
    feather: int = FEATHER
    attribute: tuple[str, ...] = ()

    def restore(
        self,
        pipeline: FaithDiffPipeline,
        source: Path,
        target: Path,
        progress: Progress | None = None,
        also_record: Mapping[str, Any] | None = None,
        mask: Path | None = None,
    ) -> Sequence[str]:
        """Restore one file.

        Args:
            pipeline: from `files.load()`.
            source: an image; its caption is looked for beside it.
            target: where the result goes; never there in part.
            progress: see `FaithDiffPipeline`.
            also_record: further entries of the metadata, as JSON has them.
            mask: an image that is white where the file is restored. Defaults to all of it.

        Returns:
            Notes for the user about the image.

        Raises:
            FaithDiffError: the image or its caption cannot be read, or the result cannot be written as the name says.
        """
        image = load_image(source)
        region = None if mask is None else load_mask(mask, source.name, *image.size)
        if mask is not None:
            also_record = {**self.mask_record(mask.name), **(also_record or {})}
        text = self.text_for(source)
        made = self.make(pipeline, image, source.name, target, text, progress, also_record, region)
        if made.attribution is not None:
            write_atomically(attribution_file(target), made.attribution)
        write_atomically(target, made.content)  # last: it stands for all being done
        return made.notes

    def make(
        self,
        pipeline: FaithDiffPipeline,
        image: LoadedImage,
        name: str,
        target: Path,
        text: ImageText,
        progress: Progress | None = None,
        also_record: Mapping[str, Any] | None = None,
        region: Tensor | None = None,
    ) -> Made:
        """Restore one image that has been read, without writing it.

        Args:
            pipeline: from `files.load()`.
            image: the input.
            name: of the input's file, for messages and metadata.
            target: its name says the format.
            text: from `text_for`.
            progress: see `FaithDiffPipeline`.
            also_record: further entries of the metadata, as JSON has them.
            region: mask of what is restored, (1, h, w). Defaults to all of the image.

        Raises:
            FaithDiffError: the result cannot be made, or not in the format.
        """
        height, width = target_size(*image.size, **self.size)
        check_output(target, height, width, transparent=image.alpha is not None)
        attribution = Attribution(self.attribute) if self.attribute else None
        try:
            result = pipeline(
                image.colors.unsqueeze(0),
                self.settings.changed(size=(height, width)),
                prompt=text.prompt,
                tile_captions=text.tiles,
                tile_mix=self.tile_mix,
                negative_prompt=self.negative_prompt,
                seed=self.seed,
                progress=progress,
                alpha=None if image.alpha is None else image.alpha.unsqueeze(0),
                mask=None if region is None else region.unsqueeze(0),
                feather=self.feather,
                attribution=attribution,
            )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # GroupNorm's, of small models
                raise
            raise ImageError(
                f"{name} would become {width} x {height} pixels, too few for this model. Choose a scale that "
                f"gives 16 pixels or more."
            ) from error
        alpha = None if image.alpha is None else resize_lanczos(image.alpha.unsqueeze(0), height, width)[0]
        kept = image.metadata.kept(self.metadata, self.location)
        restored = replace(image, colors=result[0], alpha=alpha, metadata=kept)
        recipe = {**self.recipe(name, image, text), **(also_record or {})}
        entries = {"Software": _software(), METADATA_KEY: json.dumps(recipe)}
        content, notes = encode_image(target, restored, entries)
        maps = None if attribution is None else _attribution_png(attribution, result[0])
        return Made(restored, content, (*image.notes, *notes), maps)

    def recipe(self, name: str, image: LoadedImage, text: ImageText) -> dict[str, Any]:
        """What the metadata of an image's result records: all that it was made with."""
        height, width = target_size(*image.size, **self.size)
        mix = {} if text.tiles is None else {"tile_mix": self.tile_mix}
        return {"source": name, "width": width, "height": height, **text.recorded(), **mix, **self._shared()}

    def mask_record(self, mask: str) -> dict[str, Any]:
        """What the metadata records besides where a mask by this name was used."""
        return {"mask": mask, "feather": self.feather}

    @property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Endings of the files beside an image that captions are taken from."""
        kinds = {CAPTION_SUFFIX: self.captions, TILES_SUFFIX: self.tile_captions}
        return tuple(suffix for suffix, wanted in kinds.items() if wanted)

    def text_for(self, source: Path) -> ImageText:
        """What is said of an image: its captions where they are asked for and it has some, or the prompt.

        Raises:
            SettingsError: a caption is not UTF-8, or captions of parts are missing or not of their form.
        """
        return self.text_from(source.stem, partial(beside, source))

    def text_from(self, stem: str, read: Callable[[str], bytes | None]) -> ImageText:
        """The same for an image that need not be a file of this machine.

        Args:
            stem: the image's name without its ending, for messages.
            read: gives the content of the file beside the image with an ending; None where there is none.
        """
        found = {suffix: read(suffix) for suffix in self.caption_suffixes}
        caption, tiles = found.get(CAPTION_SUFFIX), found.get(TILES_SUFFIX)
        prompt = self.prompt if caption is None else self._trimmed(caption_text(caption, stem + CAPTION_SUFFIX))
        if not self.tile_captions:
            return ImageText(prompt)
        if tiles is None:
            raise SettingsError(
                f"There is no {stem}{TILES_SUFFIX} beside the image. Write it with `caption FOLDER --tiles 2x2`, or "
                f"take `--captions` without `tiles`."
            )
        return ImageText(prompt, read_tile_captions(tiles, stem + TILES_SUFFIX).each(self._trimmed))

    def _trimmed(self, caption: str) -> str:
        return trim_caption(caption) if self.trim_captions else caption

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything that changes results."""
        facts = {**self._shared(), "prompt": self.prompt, "size": self.size, "captions": self.captions}
        facts["trim_captions"] = self.trim_captions
        facts |= {"metadata": self.metadata, "location": self.location}
        # Only where they are not the default: what is restored already stays done.
        if self.tile_captions:
            facts |= {"tile_captions": True, "tile_mix": self.tile_mix}
        facts |= {"feather": self.feather} if self.feather != FEATHER else {}
        facts |= {"attribute": self.attribute} if self.attribute else {}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _shared(self) -> dict[str, Any]:
        """What every result records."""
        return {
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            **self.settings.method(),
            **self.files.recorded(),
        }


def _attribution_png(attribution: Attribution, result: Tensor) -> bytes:
    maps = image_maps(attribution.maps[0], *result.shape[-2:])
    content = io.BytesIO()
    attribution_sheet(result, maps, attribution.words).save(content, "PNG")
    return content.getvalue()


def attribution_file(target: Path) -> Path:
    """Where the attribution maps of a result go."""
    return target.with_name(f"{target.stem}.attribution.png")


def _software() -> str:
    from .. import __version__

    return f"FaithDiff {__version__}"
