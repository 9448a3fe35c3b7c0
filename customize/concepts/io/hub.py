"""Downloading from the Hugging Face hub: a concept by its id, a collection as a library."""

from __future__ import annotations

import errno
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from customize.concepts.io.file_layout import (
    EMBEDS_FILE,
    INFO_FILE,
    LAYER_INPUTS_FILE,
    LAYERWISE_EMBEDS_FILE,
    LORA_FILE,
    MERGED_EMBEDS_FILE,
    MERGED_FILE,
    PEFT_FILES,
    SECOND_LORA_FILE,
)
from customize.errors import ConceptError, ConfigError, storage_error, system_errno
from customize.near_names import suggest_paths
from customize.text import one_line

# Only these files are downloaded, because a repository may be a whole model.
_FILES = [
    LORA_FILE,
    SECOND_LORA_FILE,
    EMBEDS_FILE,
    LAYERWISE_EMBEDS_FILE,
    INFO_FILE,
    LAYER_INPUTS_FILE,
    *PEFT_FILES,
]
_FILES += [MERGED_FILE, MERGED_EMBEDS_FILE.format("*")]
_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
_COLLECTION = r"[\w-][\w.-]*/[\w.-]*[0-9a-f]{24}"


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a repository id, ``user/name``."""
    return re.fullmatch(_ID, source) is not None


def is_collection_slug(source: str) -> bool:
    """Whether a text has the form of a collection slug: ``user/title-`` and 24 hex digits."""
    return re.fullmatch(_COLLECTION, source) is not None


def download(hub_id: str, files: Sequence[str] = _FILES) -> Path:
    """Download a repository into the hub's cache, unless it is cached, and return its folder.

    Args:
        hub_id: Its id.
        files: Patterns of the files; default: those of concepts and LoRAs.

    Raises:
        ConceptError: If the download fails.
        StorageError: If the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except Exception as error:  # offline, not found, gated
        if system_errno(error) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise storage_error(error, hub_id) from error
        raise ConceptError(
            f"the folder does not exist, and downloading it from the hub failed: {error}",
            where=hub_id,
            fix=suggest_paths(hub_id, "check the path or the id"),
        ) from error


def download_collection(slug: str) -> Path:
    """Download the concepts and LoRAs of a collection, one subfolder each, and return the folder.

    The folder is in the hub's cache. Changed files are downloaded again, and concepts removed from
    the collection are deleted. Without a connection the folder of the last download is used.

    Args:
        slug: The part of the collection's address after ``collections/``.

    Raises:
        ConfigError: If the collection cannot be listed, and was never downloaded.
        ConceptError: If one of its concepts cannot be downloaded.
        StorageError: If the folder cannot be written.
    """
    from huggingface_hub import constants, get_collection, snapshot_download

    folder = Path(constants.HF_HOME) / "customize" / slug.replace("/", "--")
    try:
        items = get_collection(slug).items
    except Exception as error:  # offline, not found, private
        if not folder.is_dir():
            raise ConfigError(
                f"the folder does not exist, and listing the collection on the hub failed: {error}",
                where=slug,
                fix=suggest_paths(slug, "check the path or the collection's address"),
            ) from error
        warnings.warn(
            one_line(
                f"listing the collection {slug} on the hub failed, so its last download is used: "
                f"{error}"
            ),
            stacklevel=2,
        )
        return folder
    folders = _folder_names([item.item_id for item in items if item.item_type == "model"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.is_dir() and old.name not in folders.values():
                shutil.rmtree(old)
    except OSError as error:
        raise storage_error(error, folder) from error
    for hub_id, name in folders.items():
        try:
            snapshot_download(hub_id, allow_patterns=_FILES, local_dir=folder / name)
        except Exception as error:
            raise ConceptError(
                f"downloading a concept of the collection {slug} failed: {error}",
                where=hub_id,
                fix="check your access to it, or remove it from the collection",
            ) from error
    return folder


def _folder_names(hub_ids: Sequence[str]) -> dict[str, str]:
    """Hub id -> folder name, which names LoRAs: without the user where that is unambiguous."""
    short = [hub_id.rpartition("/")[2] for hub_id in hub_ids]
    counts = Counter(name.lower() for name in short)
    return {
        hub_id: name if counts[name.lower()] == 1 else hub_id.replace("/", "-")
        for hub_id, name in zip(hub_ids, short, strict=True)
    }
