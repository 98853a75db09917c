"""A folder of images, restored one after the other: each is saved when it is done, and one that fails ends nothing.

ComfyUI runs a graph node by node, a list of images as a whole: nothing would be saved before all are sampled, all would
be in memory at once, and one error would end the run. So this goes through the images itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...faithdiff_core.captions.files import caption_beside
from ...faithdiff_core.engine.settings import RestoreSettings
from ...faithdiff_core.errors import ImageError, reason_of
from ...faithdiff_core.images.batch import Job, Report, find_jobs, left_out, possible
from ...faithdiff_core.images.cutout import resize_cutout
from ...faithdiff_core.images.formats import left_out_note
from ...faithdiff_core.images.geometry import pad_to_multiple, resize_lanczos
from ...faithdiff_core.images.reading import load_image
from ...faithdiff_core.images.sizes import target_size
from ...faithdiff_core.images.writing import check_output, save_image
from .frames import finish
from .graph_types import AdapterModels, LQFrame
from .image_files import below, input_folder
from .lq_conditioning import Conditioning
from .model_loading import encode_lq
from .restoration import restore
from .step_progress import show_text
from .vae_tiles import decode_in_tiles

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


class PassNoise:
    """A NOISE for one image: each pass goes on drawing where the last one stopped, as the engine does.

    Attributes:
        seed: where the first pass begins, with the noise that ComfyUI draws from this seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor:
        """Noise of the shape of a LATENT."""
        return torch.randn(latent["samples"].shape, generator=self._generator)


@dataclass(frozen=True)
class FolderRun:
    """What is done to every image of a folder.

    Attributes:
        model, faithdiff, vae: the models.
        positive, negative: for all images.
        clip: encodes the caption NAME.txt beside an image, which takes the place of `positive`; None ignores them.
        size: one of `scale` and `longest_side` with its value, as `target_size` takes it.
        passes: the enlargement is made in this many equal parts, each a whole restoration.
        seed: the same for every image.
        sampling: FaithDiff Sampler's other settings by name.
        color_fix: adain, wavelet or none.
        encoder_tile, vae_tile: tile sides in pixels.
        keep_metadata, keep_location: what the results take over.
        entries: texts for the results, by name.
    """

    model: ModelPatcher
    faithdiff: AdapterModels
    vae: VAE
    positive: Conditioning
    negative: Conditioning
    clip: CLIP | None
    size: Mapping[str, Any]
    passes: int
    seed: int
    sampling: Mapping[str, Any]
    color_fix: str
    encoder_tile: int
    vae_tile: int
    keep_metadata: bool = True
    keep_location: bool = True
    entries: Mapping[str, str] = field(default_factory=dict)

    def restore_file(self, job: Job) -> tuple[str, ...]:
        """Restore one file; gives notes.

        Raises:
            FaithDiffError: the image or its caption cannot be read, or the result cannot be written as its name says.
        """
        image = load_image(job.source)
        height, width = target_size(*image.size, **self.size)
        check_output(job.target, height, width, transparent=image.alpha is not None)
        positive = self._positive(job.source)
        colors = image.colors.unsqueeze(0)
        noise = PassNoise(self.seed)
        opacity = alpha = None if image.alpha is None else image.alpha.unsqueeze(0)
        for size in RestoreSettings(size=(height, width), passes=self.passes).sizes(*image.size):
            colors, opacity = resize_cutout(colors, opacity, *size)
            mask = None if opacity is None else 1.0 - opacity[:, 0]
            frame = LQFrame(colors.movedim(1, -1), mask)
            pixels = pad_to_multiple(colors).movedim(1, -1).contiguous()
            decoded = self._sampled(pixels, positive, noise)
            colors = finish(decoded, frame, self.color_fix)[0].movedim(-1, 1).cpu().float()
        result = replace(
            image,
            colors=colors[0],
            alpha=None if alpha is None else resize_lanczos(alpha, height, width)[0],
            metadata=image.metadata.kept(self.keep_metadata, self.keep_location),
        )
        return (*image.notes, *save_image(job.target, result, entries=self.entries))

    def _sampled(self, pixels: Tensor, positive: Conditioning, noise: PassNoise) -> Tensor:
        """A padded IMAGE through VAE, LQ encoder, sampler and VAE."""
        overlap = RestoreSettings().encoder_overlap
        latent = {"samples": self.vae.encode(pixels)}
        features = encode_lq(self.faithdiff, pixels, self.encoder_tile, overlap)
        sampled = restore(
            self.model,
            positive,
            self.negative,
            features,
            denoise=1.0,
            latent_image=latent,
            seed=self.seed,
            noise=noise,
            **self.sampling,
        )
        return decode_in_tiles(self.vae, sampled["samples"], self.vae_tile, overlap)

    def _positive(self, source: Path) -> Conditioning:
        caption = None if self.clip is None else caption_beside(source)
        if caption is None or self.clip is None:
            return self.positive
        encoded: Conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        return encoded


def restore_folder(
    run: FolderRun, folder: str, output_folder: str, suffix: str, existing: str
) -> tuple[str, list[dict[str, str]]]:
    """Restore all images in a folder and its subfolders.

    Args:
        run: what is done to each.
        folder: below ComfyUI's input folder.
        output_folder: below ComfyUI's output folder.
        suffix: ending of the results.
        existing: one of `image_files.EXISTING`.

    Returns:
        A report (counts, then a line for each image that failed and for each note), and the files that were written, as
        the page expects them.

    Raises:
        FaithDiffError: there is no image, the results cannot be written, or all images failed.
    """
    output = below(folder_paths.get_output_directory(), output_folder, "output_folder")
    source = input_folder(folder)
    jobs = find_jobs([str(source)], output, suffix)
    todo = [job for job in jobs if existing == "overwrite" or not os.path.exists(job.target)]
    report = Report(skipped=len(jobs) - len(todo))
    todo = possible(todo, report)
    notes = [note] if (note := left_out_note(left_out([str(source)], output))) else []
    written: list[dict[str, str]] = []
    for number, job in enumerate(todo, start=1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        name = job.source.relative_to(source).as_posix()
        show_text(f"Image {number} of {len(todo)}: {name}")
        try:
            found = run.restore_file(job)
        except comfy.model_management.InterruptProcessingException:
            raise
        # Decoders, models and other packs' patches raise whatever they like; the other images are still to be done.
        except Exception as error:
            logging.warning("FaithDiff: %s failed: %s", name, error)
            logging.debug("working on %s", job.source, exc_info=True)
            report.failures.append((job.source, reason_of(error).splitlines()[0]))
            _free_memory(error)
            continue
        report.done += 1
        notes += [f"{name}: {note}" for note in found]
        logging.info("FaithDiff: %d of %d: %s -> %s", number, len(todo), name, job.target)
        inner = job.target.parent.relative_to(os.path.abspath(folder_paths.get_output_directory())).as_posix()
        written.append({"filename": job.target.name, "subfolder": "" if inner == "." else inner, "type": "output"})
    report.failures = [(Path(path).relative_to(source), reason) for path, reason in report.failures]
    if report.failures and not report.done and not report.skipped:
        raise ImageError("no image could be restored. " + "\n".join(report.lines()[1:]))
    text = "\n".join([*report.lines(), *notes])
    show_text(text)
    return text, written


def _free_memory(error: Exception) -> None:
    """Give back what a failed image held; where memory ran out, models too, as ComfyUI does."""
    ran_out = getattr(comfy.model_management, "OOM_EXCEPTION", None)
    if isinstance(error, MemoryError) or (ran_out not in (None, Exception) and isinstance(error, ran_out)):
        comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
