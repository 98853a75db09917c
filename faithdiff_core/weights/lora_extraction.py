"""A LoRA of FaithDiff: what its U-Net learned, as products of thin matrices.

FaithDiff's U-Net has gigabytes; its difference to the model that it was trained from, cut to a rank, has a tenth. Added
to another checkpoint by any program that loads LoRAs, it does there what `merge` does, but for what the rank cuts off.
Layers are worked on one after the other, so that memory does not grow with the model, and each is kept when it is
finished: an extraction that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..atomic import write_atomically
from ..backbone import NOISE, SDXL
from ..dtypes import COMPUTE_DTYPES
from ..errors import SettingsError, WeightsError
from ..models.shapes import Shape
from .conversion import FORMAT_VERSION
from .faithdiff_file import part_of, read_faithdiff
from .lora_names import ALPHA, BIAS_DIFFERENCE, DOWN, UP, WEIGHT_DIFFERENCE, lora_layers
from .lora_report import ExtractionReport, LayerReport
from .low_rank import decompose
from .marks import marks
from .merging import Difference, Progress, UNetSource, check_same_prediction
from .recognition import LORA, PART_KEY
from .safetensors_writer import Layout, check_free, copy_tensor, new_files, plan_file, write_tensor
from .tensor_reader import TensorReader
from .unet_shapes import UNetConfig

Differences = Literal["none", "comfyui"]
"""What becomes of biases and norms, which are no matrices: left out, or differences, which diffusers refuses."""

MAX_RANK = 4096

REPORT_RANKS = (8, 16, 32, 64, 128)
"""Ranks for which errors and sizes are reported."""

_SETTINGS_FILE = "settings.json"

_ADAPTER_PARTS = ("lq_encoder", "alignment")
"""What of a FaithDiff file goes into a combined one beside the LoRA."""

_LAYER = "faithdiff.layer"
"""Metadata of a finished layer's file: its report."""


@dataclass(frozen=True)
class ExtractionSettings:
    """What an extraction depends on beside its files.

    Attributes:
        rank: most singular values of a layer, 1 to 4096. Layers with smaller sides have fewer.
        energy: share of a layer's squared difference that is enough, over 0 to 1: its rank is then the smallest that
            keeps it, and `rank` at most. None takes `rank` everywhere.
        dtype: of the file: fp16, bf16 or fp32.
        differences: what becomes of biases and norms.
        ranks: for which errors are reported.

    Raises:
        SettingsError: a value is out of range.
    """

    rank: int = 64
    energy: float | None = None
    dtype: str = "fp16"
    differences: Differences = "none"
    ranks: tuple[int, ...] = REPORT_RANKS

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks):
            if not 1 <= rank <= MAX_RANK:
                raise SettingsError(f"rank must lie between 1 and {MAX_RANK}, got {rank}.")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise SettingsError(f"energy must be over 0 and at most 1, got {self.energy}.")
        if self.dtype not in COMPUTE_DTYPES:
            raise SettingsError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {self.dtype}.")
        if self.differences not in get_args(Differences):
            raise SettingsError(
                f"differences must be one of {', '.join(get_args(Differences))}, got {self.differences}."
            )


def extract_lora(
    faithdiff: str | Path,
    base: str | Path,
    output: str | Path,
    settings: ExtractionSettings | None = None,
    *,
    adapter: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Extract a LoRA from FaithDiff's U-Net.

    Finished layers are kept in a hidden folder beside the output until the file is whole; the same call goes on from
    there after an interruption.

    Args:
        faithdiff: a file with FaithDiff's U-Net.
        base: the model that FaithDiff was trained from: an SDXL checkpoint in one file, or a folder in diffusers'
            format.
        output: a .safetensors file.
        settings: see `ExtractionSettings`.
        adapter: a file with FaithDiff's LQ encoder and alignment. They are written into the same file, which
            FaithDiff's own loaders then take with any SDXL model; biases and norms are in such a file always.
        force: overwrite what is there, and drop finished layers of an extraction with other settings.
        progress: called as progress(done, total) with parameters of the U-Net; may raise to cancel.

    Returns:
        The errors, by layer and by rank.

    Raises:
        WeightsError: a file is not what it should be, or they do not belong together.
        SettingsError: a setting is out of range, something is in the way, or the disk is full.
    """
    settings, output = settings or ExtractionSettings(), Path(output)
    if output.suffix != ".safetensors":
        raise SettingsError(f"The output must be named .safetensors, got {output.name}.")
    check_free([output], force)
    difference = Difference(UNetSource(faithdiff), UNetSource(base))
    if difference.base.backbone is not SDXL:
        raise WeightsError(
            f"{difference.base.path.name} is a model of {difference.base.backbone.name}; LoRAs are extracted for SDXL. "
            f"`merge` works with every backbone."
        )
    check_same_prediction(difference.base, difference.faithdiff)
    if output.exists() and output.resolve() in {
        reader.path.resolve() for reader in (*difference.faithdiff.readers, *difference.base.readers)
    }:
        raise SettingsError(f"{output} is one of the files to be read. Choose another name.")
    parts = _adapter_reader(adapter) if adapter is not None else None
    work = _Extraction(difference, settings, output, parts is not None)
    work.open_folder(force)
    work.extract(progress)
    return work.write(parts)


def _adapter_reader(path: str | Path) -> TensorReader:
    weights = read_faithdiff(path)
    if weights.lq_encoder is None or weights.alignment is None:
        raise WeightsError(
            f"{weights.path.name} holds only {', '.join(sorted(weights.parts))}; the LQ encoder and the alignment are "
            f"needed. Give FaithDiff.bin, or the `_adapter` file."
        )
    if weights.backbone is not SDXL:
        raise WeightsError(
            f"{weights.path.name} is made for {weights.backbone.name}, but LoRAs are extracted for SDXL. Give an "
            f"adapter for SDXL."
        )
    weights.check_finite()
    return TensorReader(weights.path)


class _Extraction:
    """One extraction: the layers that are done, and those to do."""

    def __init__(self, difference: Difference, settings: ExtractionSettings, output: Path, combined: bool) -> None:
        self.difference = difference
        self.settings = settings
        self.output = output
        self.combined = combined
        self.keep_differences = combined or settings.differences == "comfyui"
        self.dtype = COMPUTE_DTYPES[settings.dtype]
        self.folder = output.with_name(f".{output.name}.layers")
        source = difference.faithdiff
        try:
            config = UNetConfig.from_shapes({name: source.kind(name)[1] for name in source.names})
        except (KeyError, IndexError) as error:
            raise WeightsError(
                f"{source.path.name}: the U-Net is incomplete; it lacks a tensor such as {error.args[0]}."
            ) from error
        missing = sorted(config.shapes().keys() ^ source.names.keys())
        if missing:
            raise WeightsError(f"{source.path.name}: the U-Net is not SDXL's; it differs in {missing[0]}.")
        self.layers = lora_layers(config)

    def _identity(self) -> dict[str, Any]:
        """What finished layers depend on."""
        files = [
            [reader.path.name, (status := reader.path.stat()).st_size, status.st_mtime_ns]
            for reader in (*self.difference.faithdiff.readers, *self.difference.base.readers)
        ]
        own = self.settings
        return {
            "files": files,
            "rank": own.rank,
            "energy": own.energy,
            "dtype": own.dtype,
            "differences": self.keep_differences,
            "values": max(own.rank, *own.ranks),
        }

    def open_folder(self, force: bool) -> None:
        """Make the folder of finished layers, or take over one with the same settings.

        Raises:
            SettingsError: it is there with other settings.
        """
        text = json.dumps(self._identity(), indent=1)
        file = self.folder / _SETTINGS_FILE
        if self.folder.is_dir():
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                return
            if file.is_file() and not force:
                raise SettingsError(
                    f"{self.folder} holds finished layers of an extraction with other files or settings. Give the same "
                    f"ones to go on with it, or start again (--force, or remove the folder)."
                )
            shutil.rmtree(self.folder)
        try:
            write_atomically(file, text.encode())
        except OSError as error:
            raise SettingsError(f"{self.folder} cannot be written: {error.strerror or error}.") from error

    def _file(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"

    def extract(self, progress: Progress | None) -> None:
        """Work on all layers that are not done."""
        source = self.difference.base
        sizes = dict.fromkeys(self.layers, 0)
        for name in source.names:
            sizes[name.rpartition(".")[0]] += torch.Size(source.kind(name)[1]).numel()
        total, done = sum(sizes.values()), 0
        for layer, size in sizes.items():
            if not self._file(layer).is_file():
                self._extract_layer(layer)
            done += size
            if progress is not None:
                progress(done, total)

    def _extract_layer(self, layer: str) -> None:
        tensors: dict[str, Tensor] = {}
        name, lora = f"{layer}.weight", self.layers[layer]
        weight = self.difference.base.read(name)
        change = self.difference.faithdiff.read(name) - weight
        shape: Shape = tuple(weight.shape)
        weight_energy = _energy(weight)
        del weight
        values: list[float] = []
        rank, energy, residual, other = 0, 0.0, 0.0, 0.0
        if len(shape) > 1:
            found = decompose(
                change.flatten(1), max(self.settings.rank, *self.settings.ranks), zlib.crc32(layer.encode())
            )
            values, energy, rank = found.values.tolist(), found.energy, min(self.settings.rank, len(found.values))
            if self.settings.energy is not None:
                rank = min(rank, found.rank_for(self.settings.energy))
            if rank:
                up, down = (factor.to(self.dtype) for factor in found.factors(rank))
                residual = _energy(change.flatten(1).addmm_(up.float(), down.float(), alpha=-1))
                tensors |= {
                    UP: up.reshape(up.shape + (1,) * (len(shape) - 2)),
                    DOWN: down.reshape(rank, *shape[1:]),
                    ALPHA: torch.tensor(float(rank)),
                }
            else:
                residual = energy
        else:
            other = _energy(change)
            tensors[WEIGHT_DIFFERENCE] = change
        if f"{layer}.bias" in self.difference.base.names:
            change = self.difference.read(f"{layer}.bias")
            other += _energy(change)
            tensors[BIAS_DIFFERENCE] = change
        if not self.keep_differences:
            tensors = {key: value for key, value in tensors.items() if key in (UP, DOWN, ALPHA)}
        report = LayerReport(layer, shape, energy, other, weight_energy, values, rank, residual)
        kinds: dict[str, tuple[torch.dtype, Shape]] = {
            f"{lora}.{key}": (torch.float32 if key == ALPHA else self.dtype, tuple(value.shape))
            for key, value in tensors.items()
        }
        layout = plan_file(kinds, {_LAYER: json.dumps(report.as_dict())})
        with new_files({self._file(layer): layout}) as files:
            for key, value in tensors.items():
                file = files[self._file(layer)]
                write_tensor(file, layout, f"{lora}.{key}", value, self.difference.faithdiff.path.name)

    def write(self, adapter: TensorReader | None) -> ExtractionReport:
        """Put the finished layers, and FaithDiff's adapter, into one file.

        Raises:
            WeightsError: there is no difference.
        """
        readers = [TensorReader(self._file(layer)) for layer in self.layers]
        reports = [LayerReport.from_dict(json.loads(reader.metadata[_LAYER])) for reader in readers]
        if not any(report.energy for report in reports):
            shutil.rmtree(self.folder)
            raise WeightsError(
                f"{self.difference.faithdiff.path.name} and {self.difference.base.path.name} have the same weights: "
                f"there is nothing to extract. Give what FaithDiff was trained from as the base."
            )
        kinds: dict[str, tuple[torch.dtype, Shape]] = {}
        for reader in readers:
            kinds |= reader.kinds
        own = [] if adapter is None else [key for key in adapter.kinds if (part_of(key) or ("",))[0] in _ADAPTER_PARTS]
        if adapter is not None:
            kinds |= {key: (self.dtype, adapter.kinds[key][1]) for key in own}
        layout: Layout = plan_file(kinds, self._metadata(reports))
        with new_files({self.output: layout}) as files:
            file = files[self.output]
            for reader in readers:
                for key in reader.kinds:
                    copy_tensor(file, layout, key, reader.read(key))
            if adapter is not None:
                for key in own:
                    write_tensor(file, layout, key, adapter.read(key), adapter.path.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        stored = self.dtype.itemsize * sum(report.size_at(report.rank) for report in reports)
        return ExtractionReport(
            self.output, reports, self.settings.ranks, self.dtype.itemsize, layout.size - stored, self.keep_differences
        )

    def _metadata(self, reports: Sequence[LayerReport]) -> dict[str, str]:
        settings = self.settings
        return {
            "faithdiff.format_version": FORMAT_VERSION,
            PART_KEY: "faithdiff_lora" if self.combined else LORA,
            "faithdiff.dtype": settings.dtype,
            "faithdiff.source": self.difference.faithdiff.path.name,
            **marks(SDXL, self.difference.faithdiff.prediction or NOISE),
            "faithdiff.lora": json.dumps(
                {
                    "base": self.difference.base.path.name,
                    "rank": settings.rank,
                    "energy": settings.energy,
                    "differences": self.keep_differences,
                }
            ),
            # By these, programs that sort LoRAs by the model they are for know this one.
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(max(report.rank for report in reports)),
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }


def _energy(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
