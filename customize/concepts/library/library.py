"""A library: a folder of concepts, found by the triggers in prompts."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from customize.atomic import atomic_file, delete_leftovers, fsync_folder, partial_folder
from customize.concepts.concept_info import NAME_PATTERN
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.file_layout import (
    CARD_FILE,
    INFO_FILE,
    KOHYA_EMBEDS_FOLDER,
    LAYER_INPUTS_FILE,
    MERGED_FILE,
    PEFT_FILES,
    TRAINING_FILES,
)
from customize.concepts.io.find_files import list_folder, locate_concept
from customize.concepts.io.folder_lock import lock_folder
from customize.concepts.io.hub import download_collection, is_collection_slug
from customize.concepts.library.index import (
    LibraryEntry,
    describe_concept,
    file_stamp,
    read_index,
    scan_stamps,
    write_index,
)
from customize.concepts.slices.shared_directions import copy_shared_directions
from customize.concepts.slices.slice_reservations import lock_library
from customize.concepts.types import Concept
from customize.errors import ConceptError, ConfigError, storage_error
from customize.near_names import find_near_names, suggest_paths
from customize.safe_read import MAX_SAFETENSORS_BYTES, as_path, open_regular, path_exists, real_path
from customize.text import one_line, plural

# Files of a concept besides safetensors: those that are validated, and those that are not.
_VALIDATED = (INFO_FILE, PEFT_FILES[1])
_UNVALIDATED = re.compile(rf"{re.escape(CARD_FILE)}|{re.escape(MERGED_FILE)}|sample-\d+\.png")

#: The pattern of a trigger in a prompt.
TRIGGER_PATTERN = rf"<{NAME_PATTERN}>"


class Library:
    """The concepts of a folder: folders and single files, concepts and LoRAs of other programs.

    Attributes:
        folder: The folder.
        entries: Source -> entry.
        num_stale_rows: How many rows of the index were outdated when the folder was last scanned.
        is_index_saved: Whether the index could be written; otherwise it is only in memory.

    Args:
        source: An existing folder, which may be empty or read-only; or the slug of a collection on
            the hub (:func:`customize.concepts.io.hub.download_collection`).

    Raises:
        ConfigError: If the source is no path or not a folder, or cannot be listed; or the hub has
            no such collection.
        ConceptError: If a concept of the collection cannot be downloaded.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = _folder_of(source)
        self.entries: dict[str, LibraryEntry] = {}
        delete_leftovers(self.folder)
        self.num_stale_rows, self.is_index_saved = 0, True
        self._by_trigger: dict[str, list[LibraryEntry]] = {}
        self._scanned_mtime = 0
        self._refresh(read_index(self.folder))

    def __repr__(self) -> str:
        names = sorted(entry.name for entry in self.entries.values())
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"Library({str(self.folder)!r}: {plural(len(names), 'concept')}: {shown or 'none'})"

    def refresh(self) -> None:
        """Scan the folder again; only new and changed files are read.

        Raises:
            ConfigError: If the folder does not exist, or cannot be listed.
        """
        self._refresh(self.entries)

    def refresh_if_changed(self) -> None:
        """Scan the folder again if files were added or removed since the last scan.

        Raises:
            ConfigError: As :meth:`refresh`.
        """
        if self._mtime() != self._scanned_mtime:
            self.refresh()

    def find_by_trigger(self, trigger: str) -> list[LibraryEntry]:
        """The entries with a trigger such as ``<rex>``; case is ignored."""
        return self._by_trigger.get(trigger.lower(), [])

    def similar_triggers(self, trigger: str, fits: Callable[[LibraryEntry], bool]) -> list[str]:
        """Up to three similar triggers of entries that fit.

        Args:
            trigger: The misspelled trigger.
            fits: Whether an entry can be suggested.
        """
        triggers = [name for name, entries in self._by_trigger.items() if any(map(fits, entries))]
        return find_near_names(trigger, triggers)

    def path(self, entry: LibraryEntry) -> Path:
        """The path of an entry's folder or file."""
        return self.folder / entry.source

    def is_unchanged(self, entry: LibraryEntry) -> bool:
        """Whether the files of an entry have not changed since they were indexed."""
        return file_stamp(self.folder, entry.source) == entry.stamp

    def _mtime(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:  # reported by the scan
            return 0

    def _refresh(self, known: dict[str, LibraryEntry]) -> None:
        self._scanned_mtime = self._mtime()
        try:
            stamps = scan_stamps(self.folder)
        except OSError as error:
            raise ConfigError(
                f"the library cannot be read: {error.strerror}",
                where=self.folder,
                fix=suggest_paths(self.folder, "name a folder with concepts in it"),
            ) from error
        entries = {
            source: known[source]
            if source in known and known[source].stamp == stamp
            else describe_concept(self.folder, source, stamp)
            for source, stamp in stamps.items()
        }
        self.num_stale_rows = sum(
            entries.get(source) is not entry for source, entry in known.items()
        )
        self.num_stale_rows += sum(source not in known for source in entries)
        self.entries = entries
        self._by_trigger = {}
        for entry in entries.values():
            for trigger in entry.trigger_tokens:
                self._by_trigger.setdefault(trigger, []).append(entry)
        if self.num_stale_rows:
            try:
                write_index(self.folder, entries.values())
                self.is_index_saved = True
            except OSError:  # read-only or full disk: the index only saves time
                self.is_index_saved = False


def _folder_of(source: str | Path) -> Path:
    if isinstance(source, str) and is_collection_slug(source) and not os.path.exists(source):
        return download_collection(source)
    return as_path(source, "library")


def add_to_library(library: str | Path, source: str | Path) -> LibraryEntry:
    """Copy a concept and its recorded layer inputs into a library, atomically.

    The concept is validated first. The shared directions that its slice avoids are copied too,
    unless the library has equivalent ones. A lock prevents two processes from adding one name.

    Args:
        library: A folder; created if it does not exist.
        source: A concept's folder or file, a LoRA of another program, or a hub id.

    Returns:
        The concept's entry in the library.

    Raises:
        ConceptError: If the concept cannot be read, or its name or trigger is taken in the library.
        StorageError: If the library cannot be written.
    """
    folder = as_path(library, "library")
    concept, path = open_adaptation(source), locate_concept(source)
    name = concept.info.name
    target = folder / (name if path.is_dir() else f"{name}.safetensors")
    with lock_library(folder), lock_folder(target):
        destination = Library(folder)
        triggers = dict.fromkeys([concept.info.trigger or f"<{name}>", *concept.info.triggers])
        taken = [
            (entry, trigger)
            for trigger in triggers
            for entry in destination.find_by_trigger(trigger)
        ]
        taken += [(e, e.trigger) for e in destination.entries.values() if e.name == name]
        if taken:
            other, trigger = taken[0]
            raise ConceptError(
                f"the library already has the concept {other.name} with the trigger {trigger}",
                where=destination.path(other),
                fix="delete it first to replace it",
            )
        if os.path.lexists(target):
            raise ConceptError(
                "the concept's path in the library exists", where=target, fix="move it away"
            )
        try:
            if isinstance(concept, Concept) and concept.info.basis is not None:
                copy_shared_directions(folder, path.parent, concept.info.basis)
            _copy(path, target)
        except OSError as error:
            raise storage_error(error, target) from error
        destination.refresh()
    return destination.entries[target.name]


def _copy(source: Path, target: Path) -> None:
    """Copy a concept atomically."""
    if not source.is_dir():
        record = layer_inputs_path(source)
        if path_exists(record):  # first, so that the concept never exists without it
            LayerInputs.load(record)
            _copy_file(record, target.with_suffix(f".{LAYER_INPUTS_FILE}"))
        _copy_file(source, target)
        return
    names, skipped = _concept_files(source)
    if skipped:
        warnings.warn(
            one_line(
                f"{len(skipped)} of the files in {source} do not belong to the concept, or are "
                f"links out of its folder, and are not copied: {', '.join(skipped)}"
            ),
            stacklevel=4,
        )
    with partial_folder(target) as partial:
        for name in names:
            _copy_file(source / name, partial / name)
        partial.rename(target)
        fsync_folder(target.parent)


def _copy_file(source: Path, target: Path) -> None:
    with open_regular(source, MAX_SAFETENSORS_BYTES) as file, atomic_file(target) as copy:
        shutil.copyfileobj(file, copy, 2**20)


def _concept_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a concept's files in its folder, and of the other files.

    Validated files may be links to anywhere, as in the hub's cache. Cards and pictures are not
    validated and may not: copying a link would publish its target.
    """
    names: list[str] = []
    skipped: list[str] = []
    if path_exists(folder / LAYER_INPUTS_FILE):
        LayerInputs.load(folder / LAYER_INPUTS_FILE)
    allowed = [real_path(folder)]
    if allowed[0].parent.name == "snapshots":  # in the hub's cache, files are links to blobs
        allowed.append(allowed[0].parents[1] / "blobs")
    for path in list_folder(folder):
        # The LoRA's header of a merge contains these embeddings too.
        is_redundant = path.name == KOHYA_EMBEDS_FOLDER and path_exists(folder / MERGED_FILE)
        if path.name.startswith(".") or path.name in TRAINING_FILES or is_redundant:
            continue
        is_validated = path.name in _VALIDATED or path.suffix == ".safetensors"
        is_card = _UNVALIDATED.fullmatch(path.name) and os.path.isfile(path)
        is_inside = is_card and real_path(path).parent in allowed
        belongs = (is_validated or is_inside) and not path.is_dir()
        (names if belongs else skipped).append(path.name)
    return names, skipped
