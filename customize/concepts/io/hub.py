"""What the Hugging Face hub gives: a concept by its id, and a collection of them as a library."""

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

# A collection may name whole models, of which nothing is to be downloaded.
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
    """Whether a text can be that of a repository, ``user/name``."""
    return re.fullmatch(_ID, source) is not None


def is_collection_slug(source: str) -> bool:
    """Whether a text can be a collection's, ``user/its-title-`` and 24 hexadecimal digits."""
    return re.fullmatch(_COLLECTION, source) is not None


def download(hub_id: str) -> Path:
    """The folder of a concept or LoRA in the hub's cache, downloaded where it is not there yet.

    Raises:
        ConceptError: the hub doesn't give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except Exception as error:  # offline, not found, gated: all mean no concept here
        if system_errno(error) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise storage_error(error, hub_id) from error
        raise ConceptError(
            f"there is no such folder, and the hub did not give it: {error}",
            where=hub_id,
            fix=suggest_paths(hub_id, "check the path or the id"),
        ) from error


def download_collection(slug: str) -> Path:
    """The concepts and LoRAs of a collection, each in a folder of its own, in one folder.

    The folder is kept under the hub's cache. What has changed on the hub is downloaded anew, what
    the collection no longer has is deleted. Without a connection it is as it was the last time.

    Args:
        slug: as the collection's address has it after ``collections/``.

    Raises:
        ConfigError: the hub doesn't give the collection, and it never did.
        ConceptError: the hub doesn't give one of its concepts.
        StorageError: the folder cannot be written.
    """
    from huggingface_hub import constants, get_collection, snapshot_download

    folder = Path(constants.HF_HOME) / "customize" / slug.replace("/", "--")
    try:
        items = get_collection(slug).items
    except Exception as error:  # offline, not found, private
        if not folder.is_dir():
            raise ConfigError(
                f"there is no such folder, and the hub gave no such collection: {error}",
                where=slug,
                fix=suggest_paths(slug, "check the path or the collection's address"),
            ) from error
        warnings.warn(
            one_line(
                f"the collection {slug} is as it was downloaded before, as the hub did not give "
                f"it: {error}"
            ),
            stacklevel=2,
        )
        return folder
    places = _places([item.item_id for item in items if item.item_type == "model"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.is_dir() and old.name not in places.values():
                shutil.rmtree(old)
    except OSError as error:
        raise storage_error(error, folder) from error
    for hub_id, name in places.items():
        try:
            snapshot_download(hub_id, allow_patterns=_FILES, local_dir=folder / name)
        except Exception as error:
            raise ConceptError(
                f"the hub did not give a concept of the collection {slug}: {error}",
                where=hub_id,
                fix="check that you may read it, or take it out of the collection",
            ) from error
    return folder


def _places(hub_ids: Sequence[str]) -> dict[str, str]:
    """Hub id -> its folder's name, which LoRAs go by: without the user where that is enough."""
    short = [hub_id.rpartition("/")[2] for hub_id in hub_ids]
    often = Counter(name.lower() for name in short)
    return {
        hub_id: name if often[name.lower()] == 1 else hub_id.replace("/", "-")
        for hub_id, name in zip(hub_ids, short, strict=True)
    }
