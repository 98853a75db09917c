"""Model folders: where ComfyUI looks for this pack's files."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...faithdiff_core.errors import WeightsError

FAITHDIFF_FOLDERS = ("faithdiff", "model_patches", "diffusion_models")
"""Folders that are searched for FaithDiff's files, in order; the first is this pack's own."""

BASE_FOLDERS = ("checkpoints", "diffusion_models")
"""Folders that are searched for the model that FaithDiff was trained from."""

CAPTIONER_FOLDER = "LLM"
"""Folder that is searched for captioners; other packs with language models use this one, too."""


def register_folders() -> None:
    """Tell ComfyUI of this pack's folders, so that they are searched, and shown in error messages, like its own.

    Both can be moved with extra_model_paths.yaml.
    """
    for name in (FAITHDIFF_FOLDERS[0], CAPTIONER_FOLDER):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
    folder_paths.folder_names_and_paths[FAITHDIFF_FOLDERS[0]][1].update(folder_paths.supported_pt_extensions)


def faithdiff_files() -> list[str]:
    """Names in all of FaithDiff's folders, each once."""
    names: dict[str, None] = {}
    for folder in FAITHDIFF_FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            names.update(dict.fromkeys(folder_paths.get_filename_list(folder)))
    return list(names)


def faithdiff_path(name: str) -> str:
    """The full path of a file that `faithdiff_files` listed.

    Raises:
        WeightsError: it is in none of the folders any more.
    """
    return _path(name, FAITHDIFF_FOLDERS)


def _path(name: str, folders: tuple[str, ...]) -> str:
    for folder in folders:
        path: str | None = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise WeightsError(
        f"{Path(name).name} is in none of the model folders {', '.join(folders)}. Put it there, and refresh the page."
    )


def base_files() -> list[str]:
    """Names of checkpoints and of U-Nets, each once."""
    return list(dict.fromkeys(name for folder in BASE_FOLDERS for name in folder_paths.get_filename_list(folder)))


def base_path(name: str) -> str:
    """The full path of a file that `base_files` listed.

    Raises:
        WeightsError: it is in none of the folders any more.
    """
    return _path(name, BASE_FOLDERS)


def captioner_folders() -> list[str]:
    """Where captioners are looked for, in order."""
    folders: list[str] = folder_paths.get_folder_paths(CAPTIONER_FOLDER)
    return folders
