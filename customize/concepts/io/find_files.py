"""Locating concepts and LoRAs: as paths, in libraries, and in the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from customize.concepts.io.file_layout import INFO_FILE, LORA_FILE, MERGED_FILE
from customize.concepts.io.hub import download, is_hub_id
from customize.errors import ConceptError
from customize.near_names import suggest_paths
from customize.safe_read import PICKLE_SUFFIXES, as_path, path_exists


def list_folder(folder: Path) -> list[Path]:
    """The paths in a folder, sorted.

    Raises:
        ConceptError: If the folder cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConceptError(
            f"the folder cannot be listed: {error.strerror}",
            where=folder,
            fix="allow reading and entering it",
        ) from error


def is_hidden(name: str) -> bool:
    """Whether a library ignores files and folders of this name."""
    return name.startswith(".") or name == "lost+found"  # the root folder of a disk


def find_in_subfolders(library: Path, name: str) -> list[Path]:
    """The files with a name in the visible subfolders of a library, sorted.

    Files in folders that cannot be entered are included: reading them reports the problem.

    Raises:
        ConceptError: If the library cannot be listed.
    """
    try:
        folders = sorted(entry.path for entry in os.scandir(library) if not is_hidden(entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConceptError(
            f"the library cannot be listed: {error.strerror}",
            where=library,
            fix="allow reading and entering it, or name another one",
        ) from error
    paths = (Path(folder) / name for folder in folders)
    return [path for path in paths if path_exists(path)]


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder that contains a pickle instead of the expected files.

    Raises:
        ConceptError: With the path of the first pickle.
    """
    for file in list_folder(folder):
        if file.suffix.lower() in PICKLE_SUFFIXES:
            _refuse_pickle(file)


def _refuse_pickle(path: Path) -> NoReturn:
    raise ConceptError(
        "pickle files can run code when they are opened, so they are not read",
        where=path,
        fix="get or convert the file as .safetensors",
    )


def locate(source: str | Path) -> Path:
    """The path of a source; a hub id is downloaded.

    Args:
        source: A path, or a hub id (``user/name``).

    Raises:
        ConceptError: If the source does not exist or cannot be reached, or it is a pickle.
        ConfigError: If the source is no path.
    """
    path = as_path(source, "source")
    try:
        os.stat(path)
    except PermissionError as error:
        raise ConceptError(
            f"the concept cannot be reached: {error.strerror}",
            where=path,
            fix="allow entering its parent folders",
        ) from error
    except (OSError, ValueError):  # the path does not exist, or is not a valid file name
        if path_exists(path):
            raise ConceptError(
                "the link is broken", where=path, fix="repair or delete it"
            ) from None
    else:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            _refuse_pickle(path)
        return path
    if isinstance(source, str) and is_hub_id(source):
        return download(source)
    raise ConceptError(
        "the concept does not exist", where=source, fix=suggest_paths(source, "check the path")
    )


def locate_concept(source: str | Path) -> Path:
    """The path of a concept, merge or LoRA; for the LoRA file of a concept or merge, its folder.

    Raises:
        ConceptError, ConfigError: As :func:`locate`.
    """
    path = locate(source)
    info_files = (path.parent / name for name in (INFO_FILE, MERGED_FILE))
    return path.parent if path.name == LORA_FILE and any(map(path_exists, info_files)) else path
