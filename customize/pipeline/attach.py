"""Attaching concepts to a pipeline: what is wanted, whether it fits, then the change itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from customize.api.patch_diffusers import wrap_calls
from customize.base.apply_memory_plan import apply_memory_plan, choose_memory_plan, execution_device
from customize.base.attention import apply_backend as kernels
from customize.base.attention.select_backend import choose_backends
from customize.base.memory_plan import parse_memory_size
from customize.concepts.formats.lora_file import LoraFile
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.library.index import LibraryEntry
from customize.concepts.library.library import Library
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.types import Adaptation
from customize.core.merges import SUM
from customize.errors import ConfigError
from customize.families import Family
from customize.near_names import suggest_names
from customize.pipeline.call_wrapper import find_state, lock_models
from customize.pipeline.library_cache import LibraryCache
from customize.pipeline.lru_cache import LRUCache
from customize.pipeline.record_inputs import (
    parse_merge,
    recorded,
    resolve_merge,
    resolve_merge_without,
)
from customize.pipeline.request import Weights, resolve_attachments
from customize.pipeline.sources import Into, get_family, read_sources, with_all_parts
from customize.pipeline.state import (
    AttachedConcept,
    AttachedState,
    check_shared_components,
    get_state,
    set_state,
)
from customize.pipeline.transaction import apply_attachments
from customize.pipeline.user_warnings import warn_user
from customize.pipeline.validation import check_base, check_vocabulary
from customize.text import quote

P = ParamSpec("P")
T = TypeVar("T")


def _alone(function: Callable[P, T]) -> Callable[P, T]:
    """Let it wait until no call uses the models of the pipeline, its first argument, and calls wait
    for it."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock_models(args[0]):
            return function(*args, **kwargs)

    return alone


@_alone
def load(
    pipe: Any,
    sources: Sequence[str | Path | Adaptation | LoraFile | object],
    *,
    weights: Weights,
    names: Sequence[str | None] | None,
    into: Into,
    ignore: str | Sequence[str] | None,
    fuse: bool,
    merge: str | Mapping[str, Any] | None,
    attention: str | None,
    memory: str | None,
    library: str | Path | None,
    library_cache: str,
) -> None:
    """What :func:`customize.load_custom` does."""
    family = get_family(pipe)
    wrap_calls(type(pipe))  # where someone replaced its `__call__`
    settings, learned = _settings_in(sources)
    concerned = bool(learned or weights or merge is not None)
    others = bool(settings) or library is not None
    if not concerned and not others and attention is None and memory is None:
        if find_state(pipe) is not None:  # as is for all pipelines of the same models
            return
        raise ConfigError(
            "there is nothing to load",
            fix="give concepts, a dict of weights, a merge, a library, a Decor, an attention "
            "backend or an amount of memory",
        )
    chosen = parse_merge(merge)
    plan = None if memory is None else choose_memory_plan(pipe, family, memory)
    changes = _loading(family, learned, weights, names, into, ignore, fuse) if concerned else None
    state = get_state(family) if changes is None else changes.state
    cache = None if library is None else _opened_shelf(family, state, library, library_cache)
    device = execution_device(pipe, family, anywhere=plan is not None)
    choices = {} if attention is None else choose_backends(family, attention, device)
    # Concepts come last, so that adapters are left alone by whatever is done to the weights.
    with ExitStack() as undoing:
        undoing.enter_context(kernels.apply_backends(family, choices))
        if plan is not None:
            undoing.enter_context(apply_memory_plan(pipe, family, plan, device))
        if cache is not None:
            undoing.enter_context(_shelved(family, state, cache))
        if changes is not None:
            _change(changes, chosen)
        if settings:
            state.stage_settings |= settings
            set_state(with_all_parts(family, state), state)


def _settings_in(sources: Sequence[object]) -> tuple[dict[type, Any], list[Any]]:
    """What of the sources stages take for all calls, by its type, and the rest."""
    from customize.stages import STAGES  # stages may attach concepts themselves

    types = tuple(stage.setting for stage in STAGES if stage.setting is not None)
    found: dict[type, Any] = {}
    for each in sources:
        if isinstance(each, types):
            if type(each) in found:
                raise ConfigError(f"two {type(each).__name__} are given", fix="give one")
            found[type(each)] = each
    return found, [each for each in sources if not isinstance(each, types)]


def _opened_shelf(
    family: Family, state: AttachedState, library: str | Path, library_cache: str
) -> LibraryCache:
    """A library with nothing of it in memory yet; nothing changes."""
    if not isinstance(library, str | Path):
        raise ConfigError(
            f"a {type(library).__name__} is not a library",
            where="library",
            fix="give a folder with concepts in it, or a collection of the hub's",
        )
    cache: LRUCache[Hashable] = LRUCache(parse_memory_size(library_cache, "library_cache"))
    check_shared_components(family, state)
    whole = with_all_parts(family, state)
    return LibraryCache(Library(library), whole.fingerprint(), cache)


@contextmanager
def _shelved(family: Family, state: AttachedState, cache: LibraryCache) -> Iterator[None]:
    """Let prompts take concepts from a library; after an error, from the one before."""
    before, state.library_cache = state.library_cache, cache
    whole = with_all_parts(family, state)
    set_state(whole, state)
    try:
        yield
    except BaseException:
        state.library_cache = before
        set_state(whole, state)
        raise


def route_to(family: Family, state: AttachedState, entries: Sequence[LibraryEntry]) -> None:
    """Attach these concepts of the library, beside those that were loaded by name.

    Nothing is done where they are attached already.

    Args:
        entries: rows of the library at the pipeline's models, whose concepts fit them.

    Raises:
        ConceptError: one cannot be read, or does not go with what is attached.
    """
    cache = state.library_cache
    assert cache is not None
    whole = with_all_parts(family, state)

    def read(entry: LibraryEntry) -> Adaptation:
        found = read_sources(whole, [cache.library.path(entry)])
        check_base(whole, found)
        return found[0]

    # In one order, whatever the prompt's, as rounding depends on it.
    ordered = sorted(entries, key=lambda entry: entry.name)
    new = [cache.load_concept(entry, read) for entry in ordered]
    before = state.attached
    kept = {name: each for name, each in before.items() if not each.routed}
    now = [each.concept for each in before.values() if each.routed]
    same = len(now) == len(new) and all(a is b for a, b in zip(now, new, strict=True))
    if same and all(adapter.is_attached() for adapter in state.adapters):
        return
    check_shared_components(family, state)
    found = resolve_attachments(kept, new, None, False, whole)
    after = {n: each if n in kept else replace(each, routed=True) for n, each in found.items()}
    _check_vocabularies(whole, state, new)
    merging = resolve_merge(whole, state, after, None)
    if merging.method == SUM.name:
        _tell_collisions(before, after)
    apply_attachments(whole, state, after, merging)
    cache.active_concepts = {e.source: (e.stamp, c) for e, c in zip(ordered, new, strict=True)}


@_alone
def set_to(
    pipe: Any, sources: Sequence[str | Path | Adaptation | LoraFile], *, weights: Weights = None
) -> None:
    """Attach these concepts and no others; those that are attached already keep their mode.

    Nothing is done where it is so already, so that a step of a pipeline can ask at each call.

    Args:
        weights: as in :func:`customize.load_custom`, but 1.0 for each concept where left out.
    """
    family = get_family(pipe)
    new = read_sources(family, sources)
    state = get_state(family)
    check_shared_components(family, state)
    before = state.attached
    names = [concept.info.name for concept in new]
    kept = {name: replace(before[name], weight=1.0) for name in names if name in before}
    found = resolve_attachments(kept, new, weights, False, with_all_parts(family, state))
    after = {
        name: replace(found[name], fused=name in before and before[name].fused, routed=False)
        for name in names
    }
    now, then = ([(e.name, e.weight, e.routed) for e in each.values()] for each in (before, after))
    if now != then or not all(adapter.is_attached() for adapter in state.adapters):
        _change(_checked(family, state, after, new))


@dataclass(frozen=True, eq=False)
class _Changes:
    """What :func:`change` is to be given."""

    family: Family
    state: AttachedState
    after: dict[str, AttachedConcept]


def _change(changes: _Changes, chosen: tuple[str, dict[str, Any]] | None = None) -> None:
    family, state, after = changes.family, changes.state, changes.after
    apply_attachments(family, state, after, resolve_merge(family, state, after, chosen))


def _loading(
    family: Family,
    sources: Sequence[str | Path | Adaptation | LoraFile],
    weights: Weights,
    names: Sequence[str | None] | None,
    into: Into,
    ignore: str | Sequence[str] | None,
    fuse: bool,
) -> _Changes:
    """Read and check the concepts of a call; nothing changes."""
    new = read_sources(family, sources, into, ignore)
    if names is not None:
        if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != len(new):
            raise ConfigError(
                f"{quote(names)} does not name {len(new)} concepts",
                where="names",
                fix="give a list with a name for each, or None where it keeps its own",
            )
        new = [c.renamed(name) if name else c for c, name in zip(new, names, strict=True)]
    state = get_state(family)
    check_shared_components(family, state)
    whole = with_all_parts(family, state)
    return _checked(
        family, state, resolve_attachments(state.attached, new, weights, fuse, whole), new
    )


def _checked(
    family: Family,
    state: AttachedState,
    after: dict[str, AttachedConcept],
    new: Sequence[Adaptation],
) -> _Changes:
    """Check what is wanted against the pipeline."""
    before = state.attached
    family = with_all_parts(family, state)
    check_base(family, new)
    _check_vocabularies(family, state, [c for c in new if c.info.name not in before])
    _tell_collisions(before, after)
    return _Changes(family, state, after)


def _check_vocabularies(
    family: Family, state: AttachedState, concepts: Sequence[Adaptation]
) -> None:
    """Refuse concepts whose tokens are there, and not from an earlier call of the library."""
    left = {trigger for _, trigger in state.token_names}
    for concept in concepts:
        check_vocabulary(family, concept, left)


def _tell_collisions(
    before: Mapping[str, AttachedConcept], after: Mapping[str, AttachedConcept]
) -> None:
    """Before the change, since a warning may be turned into an error."""
    for collision in find_overlaps([each.concept for each in after.values()]):
        if not {collision.first, collision.second} <= set(before):
            warn_user(str(collision))


@_alone
def record(
    pipe: Any,
    source: str | Path | Adaptation | LoraFile,
    prompts: Sequence[str] | None,
    words: str | None,
) -> LayerInputs:
    """What :func:`customize.record_inputs` does."""
    family = get_family(pipe)
    (concept,) = read_sources(family, [source])
    state = get_state(family)
    check_shared_components(family, state)
    check_base(family, [concept])
    family = with_all_parts(family, state)
    return recorded(family, state, [concept], prompts, words)[concept.info.name]


@_alone
def unload(pipe: Any, names: Sequence[str]) -> None:
    """What :func:`customize.unload_custom` does."""
    family = get_family(pipe)
    state = get_state(family)
    if not state.attached and state.library_cache is None:
        check_shared_components(family, state)
    before = state.attached
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{quote(name)} is not the name of a concept",
                fix='give each name by itself: unload_custom("rex", "tom")',
            )
        if name not in before:
            raise ConfigError(
                f"no concept {name} is attached",
                fix=suggest_names(name, before, otherwise="load it first"),
            )
    after = {name: kept for name, kept in before.items() if names and name not in names}
    cache, settings = state.library_cache, state.stage_settings
    if not names:
        state.library_cache, state.stage_settings = None, {}
    whole = with_all_parts(family, state)
    try:
        if before or cache is not None:
            apply_attachments(whole, state, after, resolve_merge_without(state, after))
        else:
            set_state(whole, state)
    except BaseException:
        state.library_cache, state.stage_settings = cache, settings
        set_state(whole, state)
        raise
    if not names:
        for part in family.components.values():
            if isinstance(part, nn.Module):
                kernels.restore_backends(part)
