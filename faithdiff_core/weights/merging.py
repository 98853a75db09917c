"""FaithDiff onto another checkpoint, as a difference: merged = mine + strength * (FaithDiff - base).

FaithDiff's U-Net is a fine-tuned one. What it learned is its difference to the model it was trained from; added to
another checkpoint's U-Net, that one keeps its style. Everything goes tensor by tensor, so that memory does not grow
with the models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backbone import NOISE, V
from ..dtypes import DTYPES
from ..errors import SettingsError, WeightsError
from ..models.shapes import Shape
from .block_strengths import BlockStrengths
from .marks import marked_prediction
from .messages import listing
from .recognition import CHECKPOINT, MERGE_KEY, UNET, recognize, stated_prediction
from .safetensors_writer import Layout, check_finite, check_free, copy_tensor, new_files, plan_file, write_tensor
from .tensor_reader import TensorReader
from .unet_names import diffusers_names
from .unet_shapes import family_of

LEAST_SIMILARITY = 0.5
"""Cosine of FaithDiff's weights and the base's below which the base is another model. Fine-tuning keeps it near 1;
models that were trained apart have none.
"""

UNET_FOLDER = "unet"
"""Where a model in diffusers' format keeps the U-Net."""

Progress = Callable[[int, int], None]
"""Called as progress(done, total) with bytes; it may raise to cancel."""


class UNetSource:
    """The U-Net of a weights file or of a folder in diffusers' format, under diffusers' names.

    Attributes:
        path: the file or folder.
        readers: the files.
        names: diffusers' name of each tensor to its file and its name there.
        backbone: the family that the layers belong to.
    """

    def __init__(self, path: str | Path) -> None:
        """Look through the files.

        Raises:
            WeightsError: there is no U-Net of a known backbone; the text says what there is.
        """
        self.path = Path(path)
        self.readers = [TensorReader(file) for file in _unet_files(self.path)]
        for reader in self.readers:
            reader.check_not_quantized()
        self.names: dict[str, tuple[TensorReader, str]] = {}
        keys = {key: reader for reader in self.readers for key in reader.kinds}
        for name, key in diffusers_names(set(keys)).items():
            self.names[name] = (keys[key], key)
            keys[key].check_weight(key)
        backbone = family_of({name: reader.kinds[key][1] for name, (reader, key) in self.names.items()})
        if backbone is None:
            found = recognize({key: reader.kinds[key][1] for key, reader in keys.items()}, self.readers[0].metadata)
            known = found is not None and found.kind not in (CHECKPOINT, UNET)
            what = f"is {found.words}" if found and known else "holds no SDXL, SD 2.1 or SD 1.5 U-Net"
            raise WeightsError(
                f"{self.path.name} {what}. Give an SDXL checkpoint (or one of SD 2.1 or SD 1.5) in one file, a folder "
                f"in diffusers' format, or a U-Net."
            )
        self.backbone = backbone

    def kind(self, name: str) -> tuple[torch.dtype, Shape]:
        """Dtype and shape of a tensor by diffusers' name."""
        reader, key = self.names[name]
        return reader.kinds[key]

    @property
    def prediction(self) -> str | None:
        """What the U-Net predicts, in diffusers' words, or `EDM`; None if nothing says it and both kinds are common."""
        said = [_folder_prediction(self.path)]
        for reader in self.readers:
            said += [marked_prediction(reader.path, reader.metadata), stated_prediction(reader.kinds)]
        return next((prediction for prediction in said if prediction is not None), self.backbone.prediction)

    def read(self, name: str) -> Tensor:
        """A tensor's values in float32.

        Raises:
            WeightsError: they are not finite.
        """
        reader, key = self.names[name]
        value = reader.read(key)
        check_finite(reader.path.name, key, value)
        return value.float()


def _unet_files(path: Path) -> list[Path]:
    """The files that hold a U-Net: the path itself, or those in the folder of a model in diffusers' format."""
    if not path.is_dir():
        return [path]
    folder = path / UNET_FOLDER if (path / UNET_FOLDER).is_dir() else path
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    variants = [file for file in found if ".fp16." in file.name]
    files = [file for file in found if file not in variants] or variants
    if not files:
        raise WeightsError(f"{path} is not a model in diffusers' format: there are no weights in {folder.name}.")
    return files


@dataclass(frozen=True)
class Difference:
    """What FaithDiff learned: its U-Net minus the one it was trained from.

    Attributes:
        faithdiff: FaithDiff's U-Net.
        base: what it was trained from.
    """

    faithdiff: UNetSource
    base: UNetSource

    def __post_init__(self) -> None:
        check_same_shapes(self.faithdiff, self.base)
        names = sample_of({name: self.base.kind(name)[1] for name in self.base.names})
        similarity = cosine((self.faithdiff.read(name), self.base.read(name)) for name in names)
        if similarity < LEAST_SIMILARITY:
            raise WeightsError(
                f"{self.base.path.name} is not what {self.faithdiff.path.name} was trained from: their weights have "
                f"hardly anything in common (cosine {similarity:.2f}). The published FaithDiff was trained from "
                f"RealVisXL_V4.0."
            )

    def read(self, name: str) -> Tensor:
        """The difference of one tensor, in float32."""
        return self.faithdiff.read(name) - self.base.read(name)


def sample_of(shapes: Mapping[str, Shape]) -> list[str]:
    """A few of a U-Net's matrices: enough to tell models that were trained apart from fine-tuned ones."""
    matrices = sorted(name for name, shape in shapes.items() if len(shape) > 1)
    return matrices[:: max(1, len(matrices) // 8)]


def cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Cosine of the angle between two models' weights, over pairs of their tensors."""
    products = [0.0, 0.0, 0.0]
    for one, other in pairs:
        a, b = one.flatten().float(), other.flatten().float()
        for number, (left, right) in enumerate(((a, b), (a, a), (b, b))):
            products[number] += float(torch.dot(left, right))
    return products[0] / max(products[1] * products[2], 1e-30) ** 0.5


def check_same_shapes(one: UNetSource, other: UNetSource) -> None:
    """Check that two U-Nets are of the same backbone and have the same tensors.

    Raises:
        WeightsError: they do not; the text names the backbones, or some of the tensors.
    """
    if one.backbone is not other.backbone:
        raise WeightsError(
            f"{one.path.name} is a model of {one.backbone.name}, and {other.path.name} one of {other.backbone.name}: "
            f"weights of the two cannot be mixed. Give models of the same kind."
        )
    different = sorted(one.names.keys() ^ other.names.keys())
    if different:
        raise WeightsError(
            f"{one.path.name} and {other.path.name} do not have the same layers; only one has "
            f"{listing(different[:3])}. Give models of the same build."
        )
    for name in one.names:
        shapes = one.kind(name)[1], other.kind(name)[1]
        if shapes[0] != shapes[1]:
            raise WeightsError(
                f"{name} has the shape {shapes[0]} in {one.path.name}, but {shapes[1]} in {other.path.name}. Give "
                f"models of the same build."
            )


def check_same_prediction(one: UNetSource, faithdiff: UNetSource) -> None:
    """Check that a U-Net predicts what FaithDiff's does.

    Raises:
        WeightsError: it does not, or that cannot be told.
    """
    kinds = [source.prediction for source in (one, faithdiff)]
    for source, kind in zip((one, faithdiff), kinds, strict=True):
        if kind is None:
            raise WeightsError(
                f"{source.path.name} does not say what its U-Net predicts, and models of {source.backbone.name} "
                f"predict noise or v. Give a folder in diffusers' format, whose scheduler says it."
            )
    if kinds[0] != kinds[1]:
        expected = {NOISE: "noise (v-prediction or EDM)", V: "v (noise or EDM)"}.get(str(kinds[1]), str(kinds[1]))
        raise WeightsError(
            f"{one.path.name} predicts something else than {expected}, which is what FaithDiff's U-Net predicts: "
            f"weights of the two cannot be mixed."
        )


def merge(
    checkpoint: str | Path,
    faithdiff: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    strength: float = 1.0,
    factors: BlockStrengths | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Add what FaithDiff learned to a checkpoint's U-Net: mine + strength * (FaithDiff - base).

    Everything else of the checkpoint is copied as it is. With FaithDiff's adapter, the result is used as a checkpoint
    with a U-Net of its own (`unet_strength` 0).

    Args:
        checkpoint: of the same backbone, in one file or as a folder in diffusers' format.
        faithdiff: a file with FaithDiff's U-Net.
        base: what FaithDiff was trained from, in any of these forms.
        output: a .safetensors file, or a folder for a folder.
        strength: factor on the difference, 0 to 2.
        factors: on the strength, for parts of the U-Net, 0 to 1. Defaults to 1 everywhere.
        dtype: of the merged U-Net, a name of `DTYPES`. Defaults to the checkpoint's.
        force: overwrite what is there.
        progress: called as progress(done, total) in bytes of the U-Net.

    Returns:
        The path written.

    Raises:
        WeightsError: a file is not what it should be, or they do not belong together.
        SettingsError: a setting is out of range, something is in the way, or the disk is full.
    """
    if not 0.0 <= strength <= 2.0:
        raise SettingsError(f"strength must lie between 0 and 2, got {strength}.")
    factors = factors or BlockStrengths()
    factors.check_factors()
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
    mine, output = UNetSource(checkpoint), Path(output)
    _check_output(mine, output, force)
    theirs, trained_from = UNetSource(faithdiff), UNetSource(base)
    check_same_shapes(mine, theirs)
    for other in (mine, trained_from):
        check_same_prediction(other, theirs)
    difference = Difference(theirs, trained_from)
    metadata = {
        MERGE_KEY: json.dumps(
            {
                "checkpoint": mine.path.name,
                "faithdiff": difference.faithdiff.path.name,
                "base": difference.base.path.name,
                "strength": strength,
                **({} if factors == BlockStrengths() else vars(factors)),
            }
        )
    }
    if not mine.path.is_dir():
        _write(mine, difference, output, factors.times(strength), dtype, metadata, progress)
        return output
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        shutil.copytree(mine.path, temporary, ignore=_unet_weights)
        folder = temporary / UNET_FOLDER if (mine.path / UNET_FOLDER).is_dir() else temporary
        suffix = ".fp16" if all(".fp16." in reader.path.name for reader in mine.readers) else ""
        target = folder / f"diffusion_pytorch_model{suffix}.safetensors"
        _write(mine, difference, target, factors.times(strength), dtype, metadata, progress)
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    except OSError as error:
        raise SettingsError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _check_output(mine: UNetSource, output: Path, force: bool) -> None:
    if output.exists() and output.resolve() in {mine.path.resolve(), *(r.path.resolve() for r in mine.readers)}:
        raise SettingsError(f"{output} is the checkpoint itself. Choose another name.")
    if not mine.path.is_dir():
        if output.suffix != ".safetensors":
            raise SettingsError(f"The output of a single file must be named .safetensors, got {output.name}.")
        check_free([output], force)
    elif output.is_file() or (output.exists() and not force):
        raise SettingsError(f"{output} exists already. Remove it, choose another folder, or overwrite it (--force).")


def _folder_prediction(path: Path) -> str | None:
    """What a folder in diffusers' format says that its U-Net predicts; None where nothing does."""
    config = path / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return None
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("prediction_type", NOISE))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{config} cannot be read as JSON ({error}).") from error


def _unet_weights(folder: str, names: list[str]) -> list[str]:
    """What of a diffusers folder is not copied: the U-Net's weights, which are written again."""
    if Path(folder).name != UNET_FOLDER:
        return []
    return [name for name in names if name.endswith((".safetensors", ".bin", ".index.json"))]


def _write(
    mine: UNetSource,
    difference: Difference,
    output: Path,
    strengths: BlockStrengths,
    dtype: str | None,
    metadata: dict[str, str],
    progress: Progress | None,
) -> None:
    """Write the merged file: the U-Net's tensors computed, all others copied."""
    merged = {key: (name, reader) for name, (reader, key) in mine.names.items()}
    kinds: dict[str, tuple[torch.dtype, Shape]] = {}
    for reader in mine.readers:
        for key, (own, shape) in reader.kinds.items():
            kinds[key] = (DTYPES[dtype] if dtype is not None and key in merged else own, shape)
    layout: Layout = plan_file(kinds, mine.readers[0].metadata | metadata)
    total = sum(layout.places[key][1].itemsize * torch.Size(kinds[key][1]).numel() for key in merged)
    done = 0
    with new_files({output: layout}) as files:
        for reader in mine.readers:
            for key in reader.kinds:
                if key not in merged:
                    copy_tensor(files[output], layout, key, reader.read(key))
                    continue
                name = merged[key][0]
                value = mine.read(name).add_(difference.read(name), alpha=strengths.at(name))
                write_tensor(files[output], layout, key, value, mine.path.name)
                done += value.numel() * layout.places[key][1].itemsize
                if progress is not None:
                    progress(done, total)
