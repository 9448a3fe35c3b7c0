"""The stage that attaches the concepts of a library that a call's prompts name.

It reads all arguments that are prompts and attaches all concepts that they name: a batch whose
prompts name different concepts is drawn with all of them. Splitting the batch would require the
relation of every argument of every pipeline to the prompts (noise, masks, reference images,
callbacks), and one generator would draw different noise for each part. Fusion restricts concepts to
their prompts; for images with only the concepts of one prompt, call once for each prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from customize.base.memory_plan import GIB, parse_memory_size
from customize.concepts.library.index import LibraryEntry
from customize.concepts.library.library import Library
from customize.concepts.types import Adaptation
from customize.core.merges import SUM
from customize.core.precision import full_precision
from customize.errors import ConceptError, ConfigError
from customize.families import Family
from customize.pipeline.call_lock import is_nested
from customize.pipeline.merge_plan import resolve_merge
from customize.pipeline.request import resolve_attachments
from customize.pipeline.sources import add_components, read_sources
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.pipeline.state import AttachedState, StageSetting, check_shared_components
from customize.pipeline.transaction import apply_attachments
from customize.pipeline.update_cache import UpdateCache, update_factors
from customize.pipeline.validation import check_base, check_vocabularies, warn_about_overlaps
from customize.stages.check_prompts import Vocabulary, flatten_texts, prompt_arguments
from customize.text import plural


@dataclass(frozen=True)
class LibrarySource(StageSetting):
    """The library that is passed to ``load_custom``.

    Attributes:
        library: Folder, or collection on the hub.
        cache_size: Memory for concepts and merges that are not attached, such as "2GB".
    """

    library: str | Path
    cache_size: str

    def bind(self, family: Family) -> LibraryCache:
        """Open the library without reading its concepts."""
        if not isinstance(self.library, str | Path):
            raise ConfigError(
                f"a {type(self.library).__name__} is not a library",
                where="library",
                fix="give a folder with concepts in it, or a collection of the hub's",
            )
        cache = UpdateCache(parse_memory_size(self.cache_size, "library_cache"))
        return LibraryCache(Library(self.library), family.fingerprint(), cache)


@dataclass(eq=False)
class LibraryCache(StageSetting):
    """A library, and its cached concepts for one model.

    Attributes:
        library: The folder.
        fingerprint: Architecture of the model, to which concepts must be compatible.
        update_cache: Concepts, input statistics and merges of the sets that prompts have named.
        active_concepts: Source -> stamp and concept, for the concepts that the last prompt named.
    """

    library: Library
    fingerprint: Mapping[str, Any]
    update_cache: UpdateCache
    active_concepts: Mapping[str, tuple[str, Adaptation]] = field(default_factory=dict)

    unsaveable = (
        "the concepts of a library are attached beside the weights as prompts name them, and "
        "stock diffusers could not open what is saved"
    )

    def report(self, state: AttachedState) -> str:
        """Return the folder, the number of concepts, the active ones and the memory in use."""
        entries = self.library.entries.values()
        compatible = sum(map(self.is_compatible, entries))
        active = [name for name, attached in state.attached.items() if attached.routed]
        sizes = (self.update_cache.size, self.update_cache.limit)
        size, limit = (f"{number / GIB:.3g}" for number in sizes)
        return (
            f"library: {self.library.folder}, {plural(len(entries), 'concept')}, {compatible} of "
            f"them for this model; the latest prompt named {', '.join(active) or 'none'}; "
            f"{size} of {limit} GB in memory"
        )

    def is_compatible(self, entry: LibraryEntry) -> bool:
        """Whether the model has the concept's architecture, if the latter is recorded."""
        if not entry.family:
            return True
        # A merge of LoRA files records only its family.
        recorded = entry.fingerprint
        matches = not recorded or recorded.get("denoiser") == self.fingerprint["denoiser"]
        return entry.family == self.fingerprint["family"] and matches

    def find_entry(self, trigger: str) -> LibraryEntry | None:
        """Return the concept with a trigger, or None if the library has none.

        If the concept's files have changed, the library is read again.

        Args:
            trigger: In lower case.

        Raises:
            ConceptError: The concept cannot be read, or was trained on another model; or several
                concepts have the trigger.
        """
        entry = self._find_compatible(trigger)
        if entry is None or not self.library.is_unchanged(entry):
            self.library.refresh()
            entry = self._find_compatible(trigger)
        if entry is not None and entry.error:
            raise ConceptError(
                f"{trigger} calls a concept of the library that cannot be read: {entry.error}",
                where=self.library.path(entry),
            )
        return entry

    def _find_compatible(self, trigger: str) -> LibraryEntry | None:
        called = self.library.find_by_trigger(trigger)
        compatible = [entry for entry in called if self.is_compatible(entry)]
        if len(compatible) > 1:
            raise ConceptError(
                f"{trigger} calls {len(compatible)} concepts of the library: "
                f"{', '.join(entry.source for entry in compatible)}",
                where=self.library.folder,
                fix="leave one of them there, or load one by load_custom with a name of its own",
            )
        if called and not compatible:
            raise ConceptError(
                f"{trigger} calls {called[0].name} of the library, which was learned on "
                f"{called[0].family} ({called[0].base}), and that differs from this pipeline's "
                f"{self.fingerprint['family']} model in architecture or size",
                where=self.library.path(called[0]),
                fix="draw it with a pipeline of the base that it was learned on",
            )
        return compatible[0] if compatible else None

    def load_concept(
        self, entry: LibraryEntry, read: Callable[[LibraryEntry], Adaptation]
    ) -> Adaptation:
        """Return a concept in the current state of its files.

        Args:
            entry: The concept's entry in the index.
            read: Reads the concept if it is not in memory.

        Raises:
            ConceptError: Raised by ``read``; or the concept's files contradict the index.
        """
        key = ("concept", entry.source)
        for cached in (self.update_cache.get(key), self.active_concepts.get(entry.source)):
            if cached is not None and cached[0] == entry.stamp:
                in_memory: Adaptation = cached[1]
                return in_memory
        concept = read(entry)
        if concept.info.name != entry.name:
            raise ConceptError(
                f"the files are those of {concept.info.name}, and the library's index has them as "
                f"{entry.name}",
                where=self.library.path(entry),
                fix="delete the index, the hidden file .library.sqlite, which is made anew",
            )
        tokens = [rows for subject in concept.subjects for rows in subject.embeddings.values()]
        tensors = [*update_factors(concept.updates), *tokens]
        self.update_cache.put_tensors(key, (entry.stamp, concept), tensors)
        return concept


@contextmanager
def _run(context: CallContext, arguments: CallArguments) -> Iterator[CallArguments]:
    """Attach the concepts that the prompts name, which stay attached after the call.

    A nested call of the same models, such as from a callback, restores the previous concepts.
    """
    family, state = context.family, context.state
    prompts = prompt_arguments(arguments)
    texts = [text for value in prompts.values() for text in flatten_texts(value)]
    if not texts:
        yield arguments
        return
    cache = state.get_setting(LibraryCache)
    assert cache is not None
    entries = _find_named(family, state, cache, texts)
    before = None
    if is_nested():
        before = [cache.library.entries[source] for source in cache.active_concepts]
    _attach(family, state, cache, {entry.source: entry for entry in entries.values()}.values())
    words = {
        trigger: entry.trigger_words or entry.name.replace("-", " ").replace("_", " ")
        for trigger, entry in entries.items()
        if not entry.has_token_embeddings and trigger == entry.trigger
    }
    try:
        yield arguments | {name: _replace(value, words) for name, value in prompts.items()}
    finally:
        if before is not None and state.get_setting(LibraryCache) is cache:
            _attach(family, state, cache, before)


STAGE = Stage(
    "library",
    _run,
    setting=LibraryCache,
    acts=lambda state, arguments: LibraryCache in state.stage_settings,
)


@full_precision(tf32=True)
def _attach(
    family: Family, state: AttachedState, cache: LibraryCache, entries: Iterable[LibraryEntry]
) -> None:
    """Attach concepts of the library in addition to those loaded by name.

    If exactly these are attached, nothing changes.

    Args:
        family: The models of the pipeline.
        state: The concepts attached to them.
        cache: The library.
        entries: Entries of concepts that are compatible with the model.

    Raises:
        ConceptError: A concept cannot be read, or conflicts with what is attached.
    """
    full_family = add_components(family, state.components)

    def read(entry: LibraryEntry) -> Adaptation:
        concepts = read_sources(full_family, state, [cache.library.path(entry)])
        check_base(full_family, concepts)
        return concepts[0]

    # In a fixed order, independent of the prompt, because rounding depends on it.
    ordered = sorted(entries, key=lambda entry: entry.name)
    concepts = [cache.load_concept(entry, read) for entry in ordered]
    before = state.attached
    by_name = {name: attached for name, attached in before.items() if not attached.routed}
    routed = [attached.concept for attached in before.values() if attached.routed]
    is_same = list(map(id, routed)) == list(map(id, concepts))
    if is_same and state.has_all_adapters:
        return
    check_shared_components(family, state)
    resolved = resolve_attachments(by_name, concepts, None, False, full_family)
    after = {
        name: attached if name in by_name else replace(attached, routed=True)
        for name, attached in resolved.items()
    }
    check_vocabularies(full_family, state, concepts)
    merge_plan = resolve_merge(full_family, state, after, None)
    if merge_plan.method == SUM.name:
        warn_about_overlaps(before, after)
    apply_attachments(full_family, state, after, merge_plan)
    cache.active_concepts = {
        entry.source: (entry.stamp, concept)
        for entry, concept in zip(ordered, concepts, strict=True)
    }


def _find_named(
    family: Family, state: AttachedState, cache: LibraryCache, texts: Sequence[str]
) -> dict[str, LibraryEntry]:
    """Return trigger in lower case -> the concept of the library, for triggers in texts.

    Raises:
        ConfigError: A text contains a token in the form of a trigger that neither the library nor
            a tokenizer has.
        ConceptError: See :meth:`LibraryCache.find_entry`.
    """
    cache.library.refresh_if_changed()
    by_name = [name for name, attached in state.attached.items() if not attached.routed]
    vocabulary = Vocabulary(family, state, by_name)
    loaded = {trigger.lower() for trigger in vocabulary.triggers}
    entries: dict[str, LibraryEntry] = {}
    for token in vocabulary.find_triggers(texts):
        trigger = token.lower()
        if trigger in loaded or trigger in entries:
            continue
        entry = cache.find_entry(trigger)
        if entry is not None:
            entries[trigger] = entry
            continue
        if not vocabulary.is_known_elsewhere(token):
            near = ", ".join(cache.library.similar_triggers(trigger, cache.is_compatible))
            count = len(cache.library.entries)
            raise ConfigError(
                f"the prompt names {token}, and none of the {plural(count, 'concept')} of the "
                "library has that trigger" + (f"; it has {near}" if near else ""),
                where=cache.library.folder,
                fix="write one that is there, add the concept to the library, or leave out the "
                "brackets where a plain word is meant",
            )
    return entries


def _replace(prompt: Any, words: Mapping[str, str]) -> Any:
    """Replace triggers of LoRA files by their words in a prompt or a nested batch of prompts."""
    if not words:
        return prompt
    if isinstance(prompt, str):
        pattern = "|".join(map(re.escape, words))
        return re.sub(pattern, lambda m: words[m.group().lower()], prompt, flags=re.IGNORECASE)
    if isinstance(prompt, Mapping):
        return {key: _replace(text, words) for key, text in prompt.items()}
    if isinstance(prompt, list | tuple):
        return type(prompt)(_replace(text, words) for text in prompt)
    return prompt
