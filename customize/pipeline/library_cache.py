"""A library at a pipeline: which of its concepts fit, and what of them is in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from customize.concepts.input_statistics import LayerFactors, LayerInputs
from customize.concepts.library.index import LibraryEntry
from customize.concepts.library.library import Library
from customize.concepts.types import Adaptation
from customize.core.lowrank import LowRank
from customize.errors import ConceptError
from customize.pipeline.lru_cache import LRUCache, tensor_bytes

Updates = Mapping[str, Mapping[str, LowRank]]

# What a value in the cache takes beside its tensors, about.
_BESIDE = 1024


@dataclass(eq=False)
class LibraryCache:
    """A library, and what was read of it.

    Attributes:
        library: the folder.
        fingerprint: of the pipeline's model, which tells the concepts that it can take.
        cache: concepts, records of layer inputs, and merges of the sets that prompts named; what
            is attached right now is in use anyway and not counted.
        active_concepts: source -> stamp and concept, of those that the latest prompt named.
    """

    library: Library
    fingerprint: Mapping[str, Any]
    cache: LRUCache[Hashable]
    active_concepts: Mapping[str, tuple[str, Adaptation]] = field(default_factory=dict)

    def is_compatible(self, entry: LibraryEntry) -> bool:
        """Whether the pipeline's model is of the concept's architecture, as far as it says one."""
        if not entry.family:
            return True
        own, theirs = self.fingerprint, entry.fingerprint
        # A merge of LoRAs from elsewhere says its family alone.
        alike = not theirs or theirs.get("denoiser") == own["denoiser"]
        return entry.family == own["family"] and alike

    def find_entry(self, trigger: str) -> LibraryEntry | None:
        """The concept that a token calls; None where the library knows none.

        Its files are looked at, and after a change the library's.

        Raises:
            ConceptError: it cannot be read, or was learned on another model; or several have it.
        """
        found = self._one(trigger)
        if found is None or not self.library.is_unchanged(found):
            self.library.refresh()
            found = self._one(trigger)
        if found is not None and found.error:
            raise ConceptError(
                f"{trigger} calls a concept of the library that cannot be read: {found.error}",
                where=self.library.path(found),
            )
        return found

    def _one(self, trigger: str) -> LibraryEntry | None:
        called = self.library.find_by_trigger(trigger)
        fitting = [entry for entry in called if self.is_compatible(entry)]
        if len(fitting) > 1:
            raise ConceptError(
                f"{trigger} calls {len(fitting)} concepts of the library: "
                f"{', '.join(entry.source for entry in fitting)}",
                where=self.library.folder,
                fix="leave one of them there, or load one by load_custom with a name of its own",
            )
        if called and not fitting:
            raise ConceptError(
                f"{trigger} calls {called[0].name} of the library, which was learned on "
                f"{called[0].family} ({called[0].base}), and that differs from this pipeline's "
                f"{self.fingerprint['family']} model in architecture or size",
                where=self.library.path(called[0]),
                fix="draw it with a pipeline of the base that it was learned on",
            )
        return fitting[0] if fitting else None

    def load_concept(
        self, entry: LibraryEntry, read: Callable[[LibraryEntry], Adaptation]
    ) -> Adaptation:
        """A concept as its files have it, read where it isn't in memory.

        Raises:
            ConceptError: see ``read``; or its files say something else than the index.
        """
        for kept in (
            self.cache.get(("concept", entry.source)),
            self.active_concepts.get(entry.source),
        ):
            if kept is not None and kept[0] == entry.stamp:
                here: Adaptation = kept[1]
                return here
        found = read(entry)
        if found.info.name != entry.name:
            raise ConceptError(
                f"the files are those of {found.info.name}, and the library's index has them as "
                f"{entry.name}",
                where=self.library.path(entry),
                fix="delete the index, the hidden file .library.sqlite, which is made anew",
            )
        tokens = [rows for subject in found.subjects for rows in subject.embeddings.values()]
        size = tensor_bytes([*factors_of(found.updates), *tokens])
        self.cache.put(("concept", entry.source), (entry.stamp, found), size + _BESIDE)
        return found

    def get_input_statistics(
        self, concept: Adaptation, read: Callable[[Adaptation], LayerInputs | None]
    ) -> LayerInputs | None:
        """What a concept's layers read, as ``read`` finds it where it isn't in memory."""
        kept = self.cache.get(("record", id(concept)))
        if kept is not None and kept[0]() is concept:
            found: LayerInputs | None = kept[1]
            return found
        found = read(concept)
        self.put_input_statistics(concept, found)
        return found

    def put_input_statistics(self, concept: Adaptation, record: LayerInputs | None) -> None:
        """Know a concept's record, or that it has none, as long as there is room."""
        size = (
            0 if record is None else tensor_bytes([*_rows(record.concept), *_rows(record.generic)])
        )
        self.cache.put(("record", id(concept)), (weakref.ref(concept), record), size + _BESIDE)

    def get_merged_updates(
        self,
        how: Hashable,
        of: Sequence[Any],
        make: Callable[[], Updates],
    ) -> Updates:
        """What ``make`` gives, or gave before of the very same.

        Args:
            how: the method, weights and all else that it depends on beside objects.
            of: the concepts and records that it depends on.
        """
        key = ("merge", how, tuple(map(id, of)))
        kept = self.cache.get(key)
        # An id may be another object's by now.
        if kept is not None and all(ref() is each for ref, each in zip(kept[0], of, strict=True)):
            found: Updates = kept[1]
            return found
        found = make()
        size = tensor_bytes(factors_of(found))
        self.cache.put(key, ([weakref.ref(each) for each in of], found), size + _BESIDE)
        return found


def factors_of(products: Updates) -> list[Tensor]:
    updates = [update for own in products.values() for update in own.values()]
    return [factor for update in updates for factor in (update.up, update.down)]


def _rows(factors: LayerFactors) -> list[Tensor]:
    return [rows for own in factors.values() for rows in own.values()]
