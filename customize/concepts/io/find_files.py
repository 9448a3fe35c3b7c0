"""Where concepts lie: in folders, in libraries, and with what the hub gave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from customize.concepts.io.file_layout import INFO_FILE, LORA_FILE, MERGED_FILE
from customize.concepts.io.hub import download, is_hub_id
from customize.errors import ConceptError
from customize.near_names import suggest_paths
from customize.safe_read import PICKLE_SUFFIXES, path_exists


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, sorted.

    Raises:
        ConceptError: it cannot be looked into.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConceptError(
            f"the folder cannot be looked into: {error.strerror}",
            where=folder,
            fix="allow reading and entering it",
        ) from error


def is_hidden(name: str) -> bool:
    """Whether what has this name in a library is none of its concepts, whatever it is."""
    return name.startswith(".") or name == "lost+found"  # which a disk of its own has


def find_in_subfolders(library: Path, name: str) -> list[Path]:
    """The files of a name in a library's folders, sorted, without hidden folders.

    Those in folders that may not be entered count too: reading them tells what is wrong.
    """
    try:
        folders = sorted(entry.path for entry in os.scandir(library) if not is_hidden(entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConceptError(
            f"the library cannot be looked into: {error.strerror}",
            where=library,
            fix="allow reading and entering it, or name another one",
        ) from error
    paths = (Path(folder) / name for folder in folders)
    return [path for path in paths if path_exists(path)]


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder with a pickle in it, when what was looked for is not there.

    Raises:
        ConceptError: naming the first.
    """
    for file in list_folder(folder):
        if file.suffix.lower() in PICKLE_SUFFIXES:
            _refuse_pickle(file)


def _refuse_pickle(path: Path) -> NoReturn:
    raise ConceptError(
        "files of this kind can run code when they are opened, so they are not read",
        where=path,
        fix="get or convert it as .safetensors",
    )


def locate(source: str | Path) -> Path:
    """Where a concept or LoRA lies: the path itself, or what the hub gave for an id.

    Raises:
        ConceptError: nothing is there, or it is a pickle.
    """
    path = Path(source)
    try:
        os.stat(path)
    except PermissionError as error:
        raise ConceptError(
            f"the concept cannot be reached: {error.strerror}",
            where=path,
            fix="allow entering the folders that it is in",
        ) from error
    except (OSError, ValueError):  # nothing is there, or no file can have this name
        if path_exists(path):
            raise ConceptError(
                "the link leads nowhere", where=path, fix="mend or delete it"
            ) from None
    else:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            _refuse_pickle(path)
        return path
    if isinstance(source, str) and is_hub_id(source):
        return download(source)
    raise ConceptError(
        "there is no such concept", where=source, fix=suggest_paths(source, "check the path")
    )


def locate_concept(source: str | Path) -> Path:
    """The same; the LoRA's file in the folder of a concept or merge stands for the folder, in whose
    other files the rest is."""
    path = locate(source)
    beside = (path.parent / name for name in (INFO_FILE, MERGED_FILE))
    return path.parent if path.name == LORA_FILE and any(map(path_exists, beside)) else path
