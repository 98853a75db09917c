"""Converting the published file: a U-Net that loads anywhere and a small adapter beside it, or one smaller file.

The published `FaithDiff.bin` holds everything in fp32, 10 GB in one pickle. `convert` streams it, tensor by tensor,
into safetensors files (https://github.com/huggingface/safetensors, "Format"), so memory stays far below the file's
size.
"""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..dtypes import DTYPES, dtype_name
from ..errors import SettingsError, WeightsError
from ..models.shapes import Shape
from .checkpoint_file import open_tensors
from .faithdiff_file import ENCODER_PREFIX, FaithDiffWeights, part_of, read_faithdiff
from .marks import PREDICTIONS, marks
from .quantization import MARK, QUANTIZED_DTYPES, QuantizedFormat, format_name, quantize, quantized_weights
from .safetensors_writer import (
    Layout,
    check_finite,
    check_free,
    copy_tensor,
    new_files,
    plan_file,
    to_disk,
    write_tensor,
)
from .unet_names import CHECKPOINT_PREFIX, checkpoint_names
from .unet_shapes import UNetConfig

FORMAT_VERSION = "1"
"""Goes up when a converted file's names or layout change."""

_REMAP_BYTES = 512 * 2**20
"""The source is mapped again after this many bytes: pages once read count as memory in use until their mapping ends."""

_SHA256_PLACEHOLDER = "0" * 64
"""Stands in the header until the source's SHA-256 is known; the digest has as many characters."""

Progress = Callable[[int, int], None]
"""Called as progress(done, total) with bytes of the source's tensors; it may raise to cancel."""


def convert(
    path: str | Path,
    out_dir: str | Path | None = None,
    dtype: str | torch.dtype = "fp16",
    *,
    one_file: bool = False,
    prediction: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Split a FaithDiff file into `<name>_unet.safetensors` and `<name>_adapter.safetensors`, or make it smaller.

    The U-Net keeps diffusers' names and loads as any U-Net of its backbone does. The adapter keeps the published names.
    All carry the format version, their dtype and the source's SHA-256 in their metadata, and for another backbone than
    SDXL which one it is and what its U-Net predicts. They are written under temporary names
    and renamed when all are whole; after an error or a cancel nothing is left behind.

    In an fp8 file only matrices and kernels have 8 bits: biases and norms are a thousandth of the size, and a norm's
    factor of about 1 would be off by up to 6 % there. For the same reason the adapter stays in fp16: it has 90 MB
    beside the U-Net's gigabytes, and what it gets wrong shows in the image's structure.

    A quantized U-Net (`QUANTIZED_DTYPES`) has ComfyUI's names, under which alone ComfyUI reads quantized layers. These
    are the linear layers of the transformers, 86 % of SDXL's U-Net (see `quantized_weights`); all else stays in fp16.

    Args:
        path: a file that holds U-Net, LQ encoder and alignment.
        out_dir: folder to write to. Defaults to the source's.
        dtype: one of `DTYPES`, by name or as torch's, or a name out of `QUANTIZED_DTYPES`.
        one_file: write all parts to `<name>_<dtype>.safetensors` instead of splitting them.
        prediction: what the U-Net predicts, `epsilon` (noise) or `v_prediction`, for a file that does not say it.
        force: overwrite files that are there.
        progress: called as progress(done, total) in bytes; may raise to cancel.

    Returns:
        Paths of the U-Net and the adapter, or of the one file.

    Raises:
        WeightsError: the source is no such file, or a value does not fit into the dtype.
        SettingsError: the dtype or the prediction is unknown, a file is in the way, or the disk is too full.
        MissingPackageError: the dtype needs a package that is not installed.
    """
    path = Path(path)
    target = check_dtype(dtype)
    if prediction is not None and prediction not in PREDICTIONS:
        raise SettingsError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction}.")
    folder = path.parent if out_dir is None else Path(out_dir)
    weights = read_faithdiff(path)
    if weights.kind != "full":
        raise WeightsError(
            f"{path.name} holds only {', '.join(sorted(weights.parts))}; there is nothing to split. Give the published "
            f"FaithDiff.bin, which holds U-Net, LQ encoder and alignment."
        )
    if weights.quantization is not None:
        raise WeightsError(
            f"{path.name} is quantized already ({weights.quantization}); converting it again would add up the errors. "
            f"Give the file that it was made from, such as the published FaithDiff.bin."
        )
    if weights.marked is not None and prediction not in (None, weights.marked):
        raise SettingsError(
            f"{path.name} says that its U-Net predicts {weights.marked}, and prediction is {prediction}. Leave it out."
        )
    weights = replace(weights, marked=weights.marked or prediction)
    plan = _Plan.of(target, weights.parts["unet"].config)
    names = ("full",) if one_file else ("unet", "adapter")
    ends = {"full": plan.name, "unet": "unet", "adapter": "adapter"}
    paths = {name: folder / f"{path.stem}_{ends[name]}.safetensors" for name in names}
    check_free(list(paths.values()), force)
    layouts = {name: _layout(name, path, weights, plan) for name in paths}
    del weights
    with _hashing(path) as digest, new_files({out: layouts[name] for name, out in paths.items()}) as files:
        named = {name: files[out] for name, out in paths.items()}
        _write_tensors(path, named, layouts, plan, progress)
        for file in named.values():
            to_disk(file)  # what takes time goes to the disk while the source is still being hashed
        sha256 = digest().encode()
        for name, file in named.items():
            file.seek(layouts[name].header.index(_SHA256_PLACEHOLDER.encode()))
            file.write(sha256)
    return tuple(paths.values())


def check_dtype(dtype: str | torch.dtype) -> torch.dtype | QuantizedFormat:
    """A dtype of `DTYPES`, given by name or as torch's, or a format of `QUANTIZED_DTYPES` by name.

    Raises:
        SettingsError: it is none of them.
    """
    known = DTYPES | QUANTIZED_DTYPES
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in known.values():
        raise SettingsError(f"dtype must be one of {', '.join(known)}, got {dtype}.")
    return found


@dataclass(frozen=True)
class _Plan:
    """How the U-Net is stored.

    Attributes:
        name: of the dtype or the format.
        dtype: of the weights that are not quantized.
        form: the format of those that are; None if none is.
        quantized: shapes of these weights, by diffusers' names.
        names: the U-Net's tensors: diffusers' name to the one in the file.
    """

    name: str
    dtype: torch.dtype
    form: QuantizedFormat | None
    quantized: dict[str, Shape]
    names: dict[str, str]

    @classmethod
    def of(cls, target: torch.dtype | QuantizedFormat, config: UNetConfig) -> _Plan:
        if isinstance(target, torch.dtype):
            return cls(dtype_name(target), target, None, {}, {})
        names = {name: CHECKPOINT_PREFIX + own for name, own in checkpoint_names(config).items()}
        chosen = quantized_weights(config, target)
        return cls(format_name(target), torch.float16, target, chosen, names)

    def stored(self, part: str, name: str, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of what is stored for a tensor of the source, by name in the file."""
        if part != "unet" or name not in self.quantized:
            narrow = self.dtype.itemsize == 1 and (part != "unet" or len(shape) < 2)
            return {self.names.get(name, name): (torch.float16 if narrow else self.dtype, shape)}
        assert self.form is not None
        layer = self.names[name].removesuffix(".weight")
        entries = self.form.entries(shape) | {MARK: (torch.uint8, tuple(self.form.mark().shape))}
        return {f"{layer}.{end}": kind for end, kind in entries.items()}


def _place_of(key: str) -> tuple[str, str] | None:
    """Which part a key of the source belongs to, and its name in a converted file."""
    place = part_of(key)
    if place is None:
        return None
    return ("unet", place[1]) if place[0] == "unet" else ("adapter", key)


def _layout(name: str, path: Path, weights: FaithDiffWeights, plan: _Plan) -> Layout:
    """The layout of a converted file."""
    kinds: dict[str, tuple[torch.dtype, Shape]] = {}
    if name != "adapter":
        for key, tensor in weights.parts["unet"].state.items():
            kinds |= plan.stored("unet", key, tuple(tensor.shape))
    if name != "unet":
        encoder = {ENCODER_PREFIX + key: value for key, value in weights.parts["lq_encoder"].state.items()}
        for key, tensor in (encoder | dict(weights.parts["alignment"].state)).items():
            kinds |= plan.stored("adapter", key, tuple(tensor.shape))
    adapter_dtype = torch.float16 if plan.dtype.itemsize == 1 else plan.dtype
    metadata = {
        "faithdiff.format_version": FORMAT_VERSION,
        "faithdiff.part": name,
        "faithdiff.dtype": dtype_name(adapter_dtype) if name == "adapter" else plan.name,
        "faithdiff.source_sha256": _SHA256_PLACEHOLDER,
        "faithdiff.source": path.name,
        **marks(weights.backbone, weights.prediction),
    }
    return plan_file(kinds, metadata)


def _write_tensors(
    path: Path, files: dict[str, BinaryIO], layouts: dict[str, Layout], plan: _Plan, progress: Progress | None
) -> None:
    tensors, _ = open_tensors(path)
    todo = [key for key in tensors if _place_of(key) is not None]
    total = sum(tensors[key].nbytes for key in todo)
    limit = _REMAP_BYTES if _is_mapped(path) else total
    done = mapped = 0
    for key in todo:
        if mapped > limit:
            tensors.clear()
            tensors, _ = open_tensors(path)
            mapped = 0
        place = _place_of(key)
        assert place is not None
        part, name = place
        out = part if part in files else "full"
        file, layout = files[out], layouts[out]
        value = tensors[key]
        mapped += value.nbytes
        if part == "unet" and name in plan.quantized:
            _write_quantized(file, layout, plan, name, value, path.name)
        else:
            write_tensor(file, layout, plan.names.get(name, name), value, path.name)
        done += value.nbytes
        if progress is not None:
            progress(done, total)


def _write_quantized(file: BinaryIO, layout: Layout, plan: _Plan, name: str, value: Tensor, source: str) -> None:
    """Quantize a layer's weights, and write them with their scales and their mark."""
    assert plan.form is not None
    check_finite(source, name, value)
    layer = plan.names[name].removesuffix(".weight")
    for end, entry in {**quantize(value, plan.form), MARK: plan.form.mark()}.items():
        copy_tensor(file, layout, f"{layer}.{end}", entry)


def _is_mapped(path: Path) -> bool:
    """Whether opening a file maps its tensors. Those of torch before 1.6 are read whole, each time."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" or zipfile.is_zipfile(path)


@contextmanager
def _hashing(path: Path) -> Iterator[Callable[[], str]]:
    """Compute a file's SHA-256 on a separate thread; returns a function that waits for it."""
    digest = hashlib.sha256()
    stop = threading.Event()
    failure: list[OSError] = []

    def work() -> None:
        try:
            with path.open("rb") as file:
                while not stop.is_set() and (block := file.read(2**20)):
                    digest.update(block)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="faithdiff-sha256", daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        if failure:
            raise WeightsError(f"{path.name} cannot be read to its end ({failure[0]}).") from failure[0]
        return digest.hexdigest()

    try:
        yield result
    finally:
        stop.set()
        thread.join()
