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
from customize.concepts.formats.lora import Adaptation, LoraFile
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.library.byte_cache import ByteCache
from customize.concepts.library.index import Entry
from customize.concepts.library.library import Library
from customize.concepts.merge.merge_concepts import SUM
from customize.concepts.slices.overlap import find_overlaps
from customize.errors import ConfigError
from customize.families import Family
from customize.near_names import suggest_names
from customize.pipeline.call_wrapper import alone_with, state_of
from customize.pipeline.library_cache import Shelf
from customize.pipeline.record_inputs import merging_of, merging_without, method_of, recorded
from customize.pipeline.request import Weights, wanted
from customize.pipeline.sources import Into, family_in, read_sources, with_all_parts
from customize.pipeline.state import Attached, Holder, check_sharing, find, keep
from customize.pipeline.transaction import change
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
        with alone_with(args[0]):
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
    family = family_in(pipe)
    wrap_calls(type(pipe))  # where someone replaced its `__call__`
    settings, learned = _settings_in(sources)
    concerned = bool(learned or weights or merge is not None)
    others = bool(settings) or library is not None
    if not concerned and not others and attention is None and memory is None:
        if state_of(pipe) is not None:  # as is for all pipelines of the same models
            return
        raise ConfigError(
            "there is nothing to load",
            fix="give concepts, a dict of weights, a merge, a library, a Decor, an attention "
            "backend or an amount of memory",
        )
    chosen = method_of(merge)
    plan = None if memory is None else choose_memory_plan(pipe, family, memory)
    changes = _loading(family, learned, weights, names, into, ignore, fuse) if concerned else None
    holder = find(family) if changes is None else changes.holder
    shelf = None if library is None else _opened_shelf(family, holder, library, library_cache)
    device = execution_device(pipe, family, anywhere=plan is not None)
    choices = {} if attention is None else choose_backends(family, attention, device)
    # Concepts come last, so that adapters are left alone by whatever is done to the weights.
    with ExitStack() as undoing:
        undoing.enter_context(kernels.apply_backends(family, choices))
        if plan is not None:
            undoing.enter_context(apply_memory_plan(pipe, family, plan, device))
        if shelf is not None:
            undoing.enter_context(_shelved(family, holder, shelf))
        if changes is not None:
            _change(changes, chosen)
        if settings:
            holder.settings |= settings
            keep(with_all_parts(family, holder), holder)


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


def _opened_shelf(family: Family, holder: Holder, library: str | Path, library_cache: str) -> Shelf:
    """A library with nothing of it in memory yet; nothing changes."""
    if not isinstance(library, str | Path):
        raise ConfigError(
            f"a {type(library).__name__} is not a library",
            where="library",
            fix="give a folder with concepts in it, or a collection of the hub's",
        )
    cache: ByteCache[Hashable] = ByteCache(parse_memory_size(library_cache, "library_cache"))
    check_sharing(family, holder)
    whole = with_all_parts(family, holder)
    return Shelf(Library(library), whole.fingerprint(), cache)


@contextmanager
def _shelved(family: Family, holder: Holder, shelf: Shelf) -> Iterator[None]:
    """Let prompts take concepts from a library; after an error, from the one before."""
    before, holder.shelf = holder.shelf, shelf
    whole = with_all_parts(family, holder)
    keep(whole, holder)
    try:
        yield
    except BaseException:
        holder.shelf = before
        keep(whole, holder)
        raise


def route_to(family: Family, holder: Holder, entries: Sequence[Entry]) -> None:
    """Attach these concepts of the library, beside those that were loaded by name.

    Nothing is done where they are attached already.

    Args:
        entries: rows of the library at the pipeline's models, whose concepts fit them.

    Raises:
        ConceptError: one cannot be read, or does not go with what is attached.
    """
    shelf = holder.shelf
    assert shelf is not None
    whole = with_all_parts(family, holder)

    def read(entry: Entry) -> Adaptation:
        found = read_sources(whole, [shelf.library.path(entry)])
        check_base(whole, found)
        return found[0]

    # In one order, whatever the prompt's, as rounding depends on it.
    ordered = sorted(entries, key=lambda entry: entry.name)
    new = [shelf.concept(entry, read) for entry in ordered]
    before = holder.attached
    kept = {name: each for name, each in before.items() if not each.routed}
    now = [each.concept for each in before.values() if each.routed]
    same = len(now) == len(new) and all(a is b for a, b in zip(now, new, strict=True))
    if same and all(adapter.is_there() for adapter in holder.adapters):
        return
    check_sharing(family, holder)
    found = wanted(kept, new, None, False, whole)
    after = {n: each if n in kept else replace(each, routed=True) for n, each in found.items()}
    _check_vocabularies(whole, holder, new)
    merging = merging_of(whole, holder, after, None)
    if merging.method == SUM:
        _tell_collisions(before, after)
    change(whole, holder, after, merging)
    shelf.active = {e.source: (e.stamp, c) for e, c in zip(ordered, new, strict=True)}


@_alone
def set_to(
    pipe: Any, sources: Sequence[str | Path | Adaptation | LoraFile], *, weights: Weights = None
) -> None:
    """Attach these concepts and no others; those that are attached already keep their mode.

    Nothing is done where it is so already, so that a step of a pipeline can ask at each call.

    Args:
        weights: as in :func:`customize.load_custom`, but 1.0 for each concept where left out.
    """
    family = family_in(pipe)
    new = read_sources(family, sources)
    holder = find(family)
    check_sharing(family, holder)
    before = holder.attached
    names = [concept.info.name for concept in new]
    kept = {name: replace(before[name], weight=1.0) for name in names if name in before}
    found = wanted(kept, new, weights, False, with_all_parts(family, holder))
    after = {
        name: replace(found[name], fused=name in before and before[name].fused, routed=False)
        for name in names
    }
    now, then = ([(e.name, e.weight, e.routed) for e in each.values()] for each in (before, after))
    if now != then or not all(adapter.is_there() for adapter in holder.adapters):
        _change(_checked(family, holder, after, new))


@dataclass(frozen=True, eq=False)
class _Changes:
    """What :func:`change` is to be given."""

    family: Family
    holder: Holder
    after: dict[str, Attached]


def _change(changes: _Changes, chosen: tuple[str, dict[str, Any]] | None = None) -> None:
    family, holder, after = changes.family, changes.holder, changes.after
    change(family, holder, after, merging_of(family, holder, after, chosen))


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
    holder = find(family)
    check_sharing(family, holder)
    whole = with_all_parts(family, holder)
    return _checked(family, holder, wanted(holder.attached, new, weights, fuse, whole), new)


def _checked(
    family: Family,
    holder: Holder,
    after: dict[str, Attached],
    new: Sequence[Adaptation],
) -> _Changes:
    """Check what is wanted against the pipeline."""
    before = holder.attached
    family = with_all_parts(family, holder)
    check_base(family, new)
    _check_vocabularies(family, holder, [c for c in new if c.info.name not in before])
    _tell_collisions(before, after)
    return _Changes(family, holder, after)


def _check_vocabularies(family: Family, holder: Holder, concepts: Sequence[Adaptation]) -> None:
    """Refuse concepts whose tokens are there, and not from an earlier call of the library."""
    left = {trigger for _, trigger in holder.tokens}
    for concept in concepts:
        check_vocabulary(family, concept, left)


def _tell_collisions(before: Mapping[str, Attached], after: Mapping[str, Attached]) -> None:
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
    family = family_in(pipe)
    (concept,) = read_sources(family, [source])
    holder = find(family)
    check_sharing(family, holder)
    check_base(family, [concept])
    family = with_all_parts(family, holder)
    return recorded(family, holder, [concept], prompts, words)[concept.info.name]


@_alone
def unload(pipe: Any, names: Sequence[str]) -> None:
    """What :func:`customize.unload_custom` does."""
    family = family_in(pipe)
    holder = find(family)
    if not holder.attached and holder.shelf is None:
        check_sharing(family, holder)
    before = holder.attached
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
    shelf, settings = holder.shelf, holder.settings
    if not names:
        holder.shelf, holder.settings = None, {}
    whole = with_all_parts(family, holder)
    try:
        if before or shelf is not None:
            change(whole, holder, after, merging_without(holder, after))
        else:
            keep(whole, holder)
    except BaseException:
        holder.shelf, holder.settings = shelf, settings
        keep(whole, holder)
        raise
    if not names:
        for part in family.components.values():
            if isinstance(part, nn.Module):
                kernels.restore_backends(part)
