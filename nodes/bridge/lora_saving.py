"""Extracting a LoRA of FaithDiff into ComfyUI's output folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths

from ...faithdiff_core.dtypes import COMPUTE_DTYPES
from ...faithdiff_core.errors import SaveError
from .folders import base_path, faithdiff_path
from .step_progress import show_text, work_progress

if TYPE_CHECKING:
    from ...faithdiff_core.weights.lora_extraction import Differences

DTYPES = tuple(sorted(COMPUTE_DTYPES, key=lambda name: name != "fp16"))
"""Of a saved file, the default first."""

CONTENTS: dict[str, tuple[bool, Differences, str, str]] = {
    "lora_and_adapter": (True, "none", "diffusion_models", "_faithdiff_lora"),
    "lora": (False, "none", "loras", "_lora"),
    "lora_with_differences": (False, "comfyui", "loras", "_lora"),
}
"""What a file can hold: whether the adapter, what of biases and norms, the folder within the output folder where the
nodes that load it look, and what its name ends in.
"""


def save_lora(
    faithdiff_name: str, base_name: str, contents: str, rank: int, energy: float, dtype: str, filename_prefix: str
) -> str:
    """Extract a LoRA, with ComfyUI's progress bar and cancel.

    A run that was cancelled goes on where it was when the same one is started again.

    Args:
        faithdiff_name: a file with FaithDiff's U-Net, and its adapter where that is to be part of the file.
        base_name: what FaithDiff was trained from.
        contents: a key of `CONTENTS`.
        rank: most singular values of a layer.
        energy: share of a layer's squared difference that is enough; 1 takes `rank` everywhere.
        dtype: of the file.
        filename_prefix: beginning of its name, with a folder within the output folder or without.

    Returns:
        The file's name within the output folder, and the table of its errors.

    Raises:
        WeightsError: a file is not what it should be, or they do not belong together.
        SettingsError: a setting is out of range, or the disk is full.
        SaveError: the name leads out of the output folder.
    """
    # Here, not above: few start ComfyUI to extract, and it takes long to import.
    from ...faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora

    with_adapter, differences, folder, suffix = CONTENTS[contents]
    if not Path(filename_prefix).parent.name:
        filename_prefix = f"{folder}/{filename_prefix}"
    output_folder = folder_paths.get_output_directory()
    try:
        full_folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix + suffix, output_folder)
    except Exception as error:  # ComfyUI raises a bare one for names that lead out of the folder
        raise SaveError(f"filename_prefix {filename_prefix!r} cannot be used: {error}") from error
    output = Path(full_folder) / f"{name}_{counter:05}_.safetensors"
    faithdiff = faithdiff_path(faithdiff_name)
    settings = ExtractionSettings(rank, energy if energy < 1.0 else None, dtype, differences)
    report = extract_lora(
        faithdiff,
        base_path(base_name),
        output,
        settings,
        adapter=faithdiff if with_adapter else None,
        force=True,  # the name is new; this drops layers that a cancelled run with other settings left
        progress=work_progress(),
    )
    show_text(f"{output.name}: error {report.error:.3f} at rank {rank}")
    return f"{output.relative_to(output_folder).as_posix()}\n{report.table()}"
