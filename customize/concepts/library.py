"""A library: a folder of concepts, found by what prompts call them."""

from __future__ import annotations

import difflib
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from customize.concepts.claims import alone_in
from customize.concepts.concept import NAME
from customize.concepts.files import sync_folder
from customize.concepts.formats.opening import opened
from customize.concepts.hub import collected, is_collection
from customize.concepts.index import Entry, described, read_index, stamp_of, stamps, write_index
from customize.concepts.inputs import place_beside
from customize.concepts.layout import INPUTS_FILE, WORK_NAMES
from customize.concepts.reading import located
from customize.errors import ConceptError, ConfigError, storage_error

#: What looks like a trigger in a prompt.
TRIGGER = rf"<{NAME}>"


class Library:
    """The concepts of a folder: folders and single files, ours and LoRAs from elsewhere.

    Attributes:
        folder: where they are.
        entries: source -> what is known of it.
        stale: how many rows of the index did not hold any more when it was last looked at.
        kept: whether the index could be written; else it is in memory alone.

    Args:
        source: an existing folder, which may be empty, or not to be written in; or a collection of
            the hub's, see :func:`customize.concepts.hub.collected`.

    Raises:
        ConfigError: it is no folder, or cannot be looked into; the hub has no such collection.
        ConceptError: the hub doesn't give all of a collection.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = _folder_of(source)
        self.entries: dict[str, Entry] = {}
        self.stale, self.kept = 0, True
        self._called: dict[str, list[Entry]] = {}
        self._seen = 0
        self._refresh(read_index(self.folder))

    def refresh(self) -> None:
        """Look at the files again; only those that are new or changed are read.

        Raises:
            ConfigError: the folder is gone, or cannot be looked into.
        """
        self._refresh(self.entries)

    def follow(self) -> None:
        """Look again where something was put into the folder or taken out since the last time.

        Raises:
            ConfigError: as :meth:`refresh`.
        """
        if self._changed_at() != self._seen:
            self.refresh()

    def called(self, trigger: str) -> list[Entry]:
        """All that a token such as ``<rex>`` calls; upper and lower case are alike."""
        return self._called.get(trigger.lower(), [])

    def near(self, trigger: str, fits: Callable[[Entry], bool]) -> list[str]:
        """Up to three triggers, of concepts that fit, that are written much like one."""
        offered = [each for each, entries in self._called.items() if any(map(fits, entries))]
        return difflib.get_close_matches(trigger.lower(), offered, 3)

    def path(self, entry: Entry) -> Path:
        """Where a concept lies."""
        return self.folder / entry.source

    def is_fresh(self, entry: Entry) -> bool:
        """Whether the files of a concept are still those that were indexed."""
        return stamp_of(self.folder, entry.source) == entry.stamp

    def _changed_at(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:  # it is gone, which looking into it will tell
            return 0

    def _refresh(self, known: dict[str, Entry]) -> None:
        self._seen = self._changed_at()
        try:
            found = stamps(self.folder)
        except OSError as error:
            raise ConfigError(
                f"the library cannot be read: {error.strerror}",
                where=self.folder,
                fix="name a folder with concepts in it",
            ) from error
        entries = {
            source: known[source]
            if source in known and known[source].stamp == stamp
            else described(self.folder, source, stamp)
            for source, stamp in found.items()
        }
        self.stale = sum(entries.get(source) is not entry for source, entry in known.items())
        self.stale += sum(source not in known for source in entries)
        self.entries = entries
        self._called = {}
        for entry in entries.values():
            for trigger in entry.called:
                self._called.setdefault(trigger, []).append(entry)
        if self.stale:
            try:
                write_index(self.folder, entries.values())
                self.kept = True
            except OSError:  # read-only, or the disk is full: the index is for speed alone
                self.kept = False


def _folder_of(source: str | Path) -> Path:
    if isinstance(source, str) and is_collection(source) and not os.path.exists(source):
        return collected(source)
    return Path(source)


def add(library: str | Path, source: str | Path) -> Entry:
    """Copy a concept into a library, whole or not at all, with the record that lies beside it.

    The concept is read whole first. Of two processes that add one name at the same time, one does.

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
    concept, path = opened(source), located(source)
    name = concept.info.name
    target = folder / (name if path.is_dir() else f"{name}.safetensors")
    with alone_in(folder):
        held = Library(folder)
        trigger = concept.info.trigger or f"<{name}>"
        taken = [*held.called(trigger), *(e for e in held.entries.values() if e.name == name)]
        if taken:
            raise ConceptError(
                f"the library has a concept {taken[0].name} already, which {taken[0].trigger} "
                "calls",
                where=held.path(taken[0]),
                fix="delete that one first if this one is to replace it",
            )
        if os.path.lexists(target):
            raise ConceptError(
                "something else is in the place of the concept", where=target, fix="move it away"
            )
        partial = folder / f".{target.name}.{secrets.token_hex(4)}.partial"
        try:
            _copy(path, partial, target)
            sync_folder(folder)
        except OSError as error:
            raise storage_error(error, target) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.unlink()
        held.refresh()
    return held.entries[target.name]


def _copy(source: Path, partial: Path, target: Path) -> None:
    """Copy to a hidden place first, and rename when all is there."""
    if source.is_dir():
        hidden = shutil.ignore_patterns(".*", *WORK_NAMES)
        shutil.copytree(source, partial, ignore=hidden)
        partial.rename(target)
        return
    record = place_beside(source)
    if record.is_file():  # first, so that the concept never is there without it
        shutil.copyfile(record, partial)
        os.replace(partial, target.with_suffix(f".{INPUTS_FILE}"))
    shutil.copyfile(source, partial)
    os.replace(partial, target)
