"""Writing the folder of a reference model, which may be that of a training run as well."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from customize.atomic import fsync_folder, partial_folder, write_atomic, write_new_file
from customize.concepts.io.file_layout import TRAINING_FILES
from customize.concepts.io.output_folder import list_output
from customize.errors import StorageError, storage_error
from customize.references.encoder_inputs import ReferenceProcessor
from customize.references.model_files import (
    CONFIG_FILE,
    FACTS_FILE,
    INCOMPLETE,
    PROCESSOR_FOLDER,
)

#: Names that transformers reads in a processor's folder, of whatever version wrote them.
_PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that a reference model must not be written to.

    A folder may be new, be empty except for the files of training runs, or contain a model.

    Raises:
        StorageError: The folder contains other files, or cannot be listed.
    """
    names = list_output(folder)
    if CONFIG_FILE not in names and not names <= TRAINING_FILES:
        raise StorageError(
            "the folder holds other files", where=folder, fix="choose a new or empty folder"
        )


def write_model(folder: Path, files: Mapping[str, bytes], processor: ReferenceProcessor) -> None:
    """Write a reference model, atomically.

    All files are written to a temporary folder, which is renamed to a new folder. In an existing
    one the files of the model before are replaced, with the facts on its training, and other files
    stay. An error restores the model before. A crash in the moment of replacing leaves a folder
    that is refused as incomplete when it is read, and that can be written to again.

    Args:
        folder: As :func:`check_model_folder` allows.
        files: Path in the folder -> content, with the configuration.
        processor: Tokenizer and image processor.

    Raises:
        StorageError: The folder contains something else, or cannot be written.
    """
    check_model_folder(folder)
    exists = folder.is_dir()
    # Inside an existing folder, which may be a link to another disk.
    target = folder / "model" if exists else folder
    try:
        with partial_folder(target) as new, partial_folder(target) as old:
            for name, data in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                write_new_file(new / name, data)
            processor.save_pretrained(new / PROCESSOR_FOLDER)
            if exists:
                _replace_files(folder, new, old)
            else:
                new.rename(folder)
            fsync_folder(folder)
            fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error


def _replace_files(folder: Path, new: Path, old: Path) -> None:
    """Move the files of a new model into a folder, and those that they replace out of it.

    Args:
        folder: The folder.
        new: Folder of the new files.
        old: Empty folder for the replaced files.

    Raises:
        OSError: A file cannot be moved; the folder is as before.
    """
    names = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
    names.remove(CONFIG_FILE)
    stale = [f"{PROCESSOR_FOLDER}/{name}" for name in _PROCESSOR_FILES]
    stale = [name for name in (FACTS_FILE, *stale) if name not in names]
    replaced = [name for name in (*names, *stale) if os.path.lexists(folder / name)]
    config = folder / CONFIG_FILE
    if config.exists():
        shutil.copy2(config, old / CONFIG_FILE)
    # First, so that a mixture of two models is never read.
    write_atomic(config, json.dumps(INCOMPLETE).encode())
    try:
        for name in replaced:
            _move(folder / name, old / name)
        for name in names:
            _move(new / name, folder / name)
        _move(new / CONFIG_FILE, config)
    except BaseException:
        _restore(folder, new, old, names, replaced)
        raise


def _restore(
    folder: Path, new: Path, old: Path, names: Sequence[str], replaced: Sequence[str]
) -> None:
    """Undo :func:`_replace_files` from wherever it stopped."""
    for name in names:
        if not os.path.lexists(new / name):
            (folder / name).unlink()
    for name in replaced:
        if os.path.lexists(old / name):
            _move(old / name, folder / name)
    if (old / CONFIG_FILE).exists():
        _move(old / CONFIG_FILE, folder / CONFIG_FILE)
    else:
        (folder / CONFIG_FILE).unlink()


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
