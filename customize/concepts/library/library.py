"""A library: a folder of concepts, found by what prompts call them."""

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
from customize.safe_read import MAX_SAFETENSORS_BYTES, open_regular, path_exists, real_path
from customize.text import one_line

# A concept's files beside its safetensors: those that are read, and those that are not.
_CHECKED = (INFO_FILE, PEFT_FILES[1])
_FREE = re.compile(rf"{re.escape(CARD_FILE)}|{re.escape(MERGED_FILE)}|sample-\d+\.png")

#: What looks like a trigger in a prompt.
TRIGGER_PATTERN = rf"<{NAME_PATTERN}>"


class Library:
    """The concepts of a folder: folders and single files, ours and LoRAs from elsewhere.

    Attributes:
        folder: where they are.
        entries: source -> what is known of it.
        stale: how many rows of the index did not hold any more when it was last looked at.
        kept: whether the index could be written; else it is in memory alone.

    Args:
        source: an existing folder, which may be empty, or not to be written in; or a collection of
            the hub's, see :func:`customize.concepts.io.hub.download_collection`.

    Raises:
        ConfigError: it is no folder, or cannot be looked into; the hub has no such collection.
        ConceptError: the hub doesn't give all of a collection.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = _folder_of(source)
        self.entries: dict[str, LibraryEntry] = {}
        delete_leftovers(self.folder)
        self.num_stale_rows, self.is_index_saved = 0, True
        self._called: dict[str, list[LibraryEntry]] = {}
        self._seen = 0
        self._refresh(read_index(self.folder))

    def __repr__(self) -> str:
        names = sorted(entry.name for entry in self.entries.values())
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"Library({str(self.folder)!r}: {len(names)} concepts: {listed or 'none'})"

    def refresh(self) -> None:
        """Look at the files again; only those that are new or changed are read.

        Raises:
            ConfigError: the folder is gone, or cannot be looked into.
        """
        self._refresh(self.entries)

    def refresh_if_changed(self) -> None:
        """Look again where something was put into the folder or taken out since the last time.

        Raises:
            ConfigError: as :meth:`refresh`.
        """
        if self._changed_at() != self._seen:
            self.refresh()

    def find_by_trigger(self, trigger: str) -> list[LibraryEntry]:
        """All that a token such as ``<rex>`` calls; upper and lower case are alike."""
        return self._called.get(trigger.lower(), [])

    def similar_triggers(self, trigger: str, fits: Callable[[LibraryEntry], bool]) -> list[str]:
        """Up to three triggers, of concepts that fit, that are written much like one."""
        offered = [each for each, entries in self._called.items() if any(map(fits, entries))]
        return find_near_names(trigger, offered)

    def path(self, entry: LibraryEntry) -> Path:
        """Where a concept lies."""
        return self.folder / entry.source

    def is_unchanged(self, entry: LibraryEntry) -> bool:
        """Whether the files of a concept are still those that were indexed."""
        return file_stamp(self.folder, entry.source) == entry.stamp

    def _changed_at(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:  # it is gone, which looking into it will tell
            return 0

    def _refresh(self, known: dict[str, LibraryEntry]) -> None:
        self._seen = self._changed_at()
        try:
            found = scan_stamps(self.folder)
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
            for source, stamp in found.items()
        }
        self.num_stale_rows = sum(
            entries.get(source) is not entry for source, entry in known.items()
        )
        self.num_stale_rows += sum(source not in known for source in entries)
        self.entries = entries
        self._called = {}
        for entry in entries.values():
            for trigger in entry.trigger_tokens:
                self._called.setdefault(trigger, []).append(entry)
        if self.num_stale_rows:
            try:
                write_index(self.folder, entries.values())
                self.is_index_saved = True
            except OSError:  # read-only, or the disk is full: the index is for speed alone
                self.is_index_saved = False


def _folder_of(source: str | Path) -> Path:
    if isinstance(source, str) and is_collection_slug(source) and not os.path.exists(source):
        return download_collection(source)
    return Path(source)


def add_to_library(library: str | Path, source: str | Path) -> LibraryEntry:
    """Copy a concept into a library, whole or not at all, with the record that lies beside it.

    The shared directions that its slice avoids come along, if the library has none that serve, so
    that what is learned there later is kept apart from it. The concept is read whole first. Of two
    processes that add one name at the same time, one does.

    Args:
        library: a folder; made if it is not there.
        source: a concept's folder or file, a LoRA from elsewhere, or a hub id.

    Returns:
        Its row in the library.

    Raises:
        ConceptError: the concept cannot be read, or its name or trigger is taken there.
        StorageError: the library cannot be written.
    """
    folder = Path(library)
    concept, path = open_adaptation(source), locate_concept(source)
    name = concept.info.name
    target = folder / (name if path.is_dir() else f"{name}.safetensors")
    with lock_library(folder), lock_folder(target):
        held = Library(folder)
        triggers = dict.fromkeys([concept.info.trigger or f"<{name}>", *concept.info.triggers])
        taken = [
            (entry, trigger) for trigger in triggers for entry in held.find_by_trigger(trigger)
        ]
        taken += [(e, e.trigger) for e in held.entries.values() if e.name == name]
        if taken:
            other, trigger = taken[0]
            raise ConceptError(
                f"the library has a concept {other.name} already, which {trigger} calls",
                where=held.path(other),
                fix="delete that one first if this one is to replace it",
            )
        if os.path.lexists(target):
            raise ConceptError(
                "something else is in the place of the concept", where=target, fix="move it away"
            )
        try:
            if isinstance(concept, Concept) and concept.info.basis is not None:
                copy_shared_directions(folder, path.parent, concept.info.basis)
            _copy(path, target)
        except OSError as error:
            raise storage_error(error, target) from error
        held.refresh()
    return held.entries[target.name]


def _copy(source: Path, target: Path) -> None:
    """Copy a concept atomically."""
    if not source.is_dir():
        record = layer_inputs_path(source)
        if path_exists(record):  # first, so that the concept never is there without it
            LayerInputs.load(record)
            _copy_file(record, target.with_suffix(f".{LAYER_INPUTS_FILE}"))
        _copy_file(source, target)
        return
    names, left = _parts(source)
    if left:
        warnings.warn(
            one_line(
                f"{len(left)} of the files in {source} are no part of the concept, or links out of "
                f"its folder, and are not copied: {', '.join(left)}"
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


def _parts(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a concept's files in its folder, and those of what else is there.

    Files that were read as what they are may be links to anywhere, as they are in the hub's cache.
    Cards and pictures, which nobody checks, may not: a link would publish whatever it leads to.
    """
    names: list[str] = []
    left: list[str] = []
    if path_exists(folder / LAYER_INPUTS_FILE):
        LayerInputs.load(folder / LAYER_INPUTS_FILE)
    inside = [real_path(folder)]
    if inside[0].parent.name == "snapshots":  # of the hub's cache, whose files are links to blobs
        inside.append(inside[0].parents[1] / "blobs")
    for path in list_folder(folder):
        # A merge's embeddings for other programs are in its LoRA's header, too.
        unneeded = path.name == KOHYA_EMBEDS_FOLDER and path_exists(folder / MERGED_FILE)
        if path.name.startswith(".") or path.name in TRAINING_FILES or unneeded:
            continue
        checked = path.name in _CHECKED or path.suffix == ".safetensors"
        card = _FREE.fullmatch(path.name) and os.path.isfile(path)
        free = card and real_path(path).parent in inside
        (names if (checked or free) and not path.is_dir() else left).append(path.name)
    return names, left
