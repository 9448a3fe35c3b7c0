"""Attaching concepts to a pipeline and detaching them: the main paths, from request to commit.

No other call may use the pipeline's models meanwhile: callers hold
:func:`customize.pipeline.model_locks.lock_models`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from customize.base.apply_memory_plan import apply_memory_plan, choose_memory_plan, execution_device
from customize.base.attention.apply_backend import apply_backends, restore_backends
from customize.base.attention.select_backend import choose_backends
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.pipeline.merge_plan import parse_merge, resolve_merge, resolve_merge_without
from customize.pipeline.request import Weights, resolve_attachments
from customize.pipeline.sources import Into, add_components, get_family, read_sources
from customize.pipeline.state import (
    AttachedState,
    StageSetting,
    check_shared_components,
    get_state,
    set_state,
)
from customize.pipeline.transaction import apply_attachments
from customize.pipeline.validation import check_base, check_vocabularies, warn_about_overlaps
from customize.text import plural, quote


def load(
    pipe: Any,
    sources: Sequence[object],
    *,
    settings: Sequence[StageSetting],
    weights: Weights,
    names: Sequence[str | None] | None,
    into: Into,
    ignore: str | Sequence[str] | None,
    fuse: bool,
    merge: str | Mapping[str, Any] | None,
    attention: str | None,
    memory: str | None,
) -> None:
    """Attach concepts and apply settings.

    ``sources`` are folders, files, hub ids or concepts, and ``settings`` are settings of stages for
    all calls, one of each type. The other arguments are those of :func:`customize.load_custom`.
    """
    family = get_family(pipe)
    changes_concepts = bool(sources or weights or merge is not None)
    if not (changes_concepts or settings or attention is not None or memory is not None):
        if get_state(pipe) is not None:  # attached through another pipeline of the same models
            return
        raise ConfigError(
            "there is nothing to load",
            fix="give concepts, a dict of weights, a merge, a library, a Decor, an attention "
            "backend or an amount of memory",
        )

    # Read, resolve and validate everything; nothing changes.
    state = get_state(pipe) or AttachedState()
    full_family = add_components(family, state.components)
    merge_request = parse_merge(merge)
    plan = None if memory is None else choose_memory_plan(pipe, family, memory)
    after = None
    if changes_concepts:
        concepts = read_sources(family, state, sources, into, ignore)
        if names is not None:
            is_list = isinstance(names, Sequence) and not isinstance(names, str)
            if not is_list or len(names) != len(concepts):
                raise ConfigError(
                    f"{quote(names)} does not name {plural(len(concepts), 'concept')}",
                    where="names",
                    fix="give a list with a name for each, or None where it keeps its own",
                )
            concepts = [
                concept.renamed(name) if name else concept
                for concept, name in zip(concepts, names, strict=True)
            ]
        check_shared_components(family, state)
        after = resolve_attachments(state.attached, concepts, weights, fuse, full_family)
        check_base(full_family, concepts)
        new = [concept for concept in concepts if concept.info.name not in state.attached]
        check_vocabularies(full_family, state, new)
        warn_about_overlaps(state.attached, after)
    bound_settings = [setting.bind(full_family) for setting in settings]
    if any(setting.update_cache is not None for setting in bound_settings):
        check_shared_components(family, state)
    if plan is not None or attention is not None:  # it takes a walk over all modules
        device = execution_device(pipe, family, use_accelerator=plan is not None)
    backends = {} if attention is None else choose_backends(family, attention, device)

    # Apply; after an error every step is undone. Concepts come after the steps that change weights,
    # so that these do not touch adapters, and before the settings, whose update cache would keep
    # layers wrapped when the concepts are taken back.
    attached_before, plan_before = state.attached, state.merge_plan
    settings_before = state.stage_settings
    with ExitStack() as transaction:
        transaction.enter_context(apply_backends(family, backends))
        if plan is not None:
            transaction.enter_context(apply_memory_plan(pipe, family, plan, device))
        if after is not None:
            merge_plan = resolve_merge(full_family, state, after, merge_request)
            apply_attachments(full_family, state, after, merge_plan)
        if bound_settings:
            try:
                state.stage_settings = settings_before | {
                    type(setting): setting for setting in bound_settings
                }
                set_state(full_family, state)
            except BaseException:
                state.stage_settings = settings_before
                if after is None:
                    set_state(full_family, state)
                else:
                    apply_attachments(full_family, state, attached_before, plan_before)
                raise


def unload(pipe: Any, names: Sequence[str]) -> None:
    """Detach concepts by name; without names, everything that :func:`load` attached or set."""
    family = get_family(pipe)
    state = get_state(pipe) or AttachedState()
    changes_models = state.changes_models
    if not changes_models:
        check_shared_components(family, state)
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{quote(name)} is not the name of a concept",
                fix='give each name by itself: unload_custom("rex", "tom")',
            )
        if name not in state.attached:
            raise ConfigError(
                f"no concept {name} is attached",
                fix=suggest_names(name, state.attached, otherwise="load it first"),
            )
    full_family = add_components(family, state.components)
    after = {
        name: attached for name, attached in state.attached.items() if names and name not in names
    }
    settings = state.stage_settings
    try:
        if not names:
            state.stage_settings = {}
        if changes_models:
            apply_attachments(full_family, state, after, resolve_merge_without(state, after))
        else:
            set_state(full_family, state)
    except BaseException:
        state.stage_settings = settings
        set_state(full_family, state)
        raise
    if not names:
        for component in family.components.values():
            if isinstance(component, nn.Module):
                restore_backends(component)


def set_concepts(pipe: Any, sources: Sequence[object], weights: Weights = None) -> None:
    """Attach these concepts and no others; attached ones keep their mode.

    It does nothing if they are attached already, so that a step of a pipeline can run it at every
    call.

    Args:
        pipe: A pipeline of a known family.
        sources: Folders, files, hub ids or concepts.
        weights: As for :func:`customize.load_custom`, but 1.0 for each concept where left out.
    """
    family = get_family(pipe)
    state = get_state(pipe) or AttachedState()
    full_family = add_components(family, state.components)
    concepts = read_sources(family, state, sources)
    check_shared_components(family, state)
    before = state.attached
    names = [concept.info.name for concept in concepts]
    retained = {name: replace(before[name], weight=1.0) for name in names if name in before}
    resolved = resolve_attachments(retained, concepts, weights, False, full_family)
    after = {
        name: replace(resolved[name], fused=name in before and before[name].fused, routed=False)
        for name in names
    }
    present, requested = (
        [(attached.name, attached.weight, attached.routed) for attached in by_name.values()]
        for by_name in (before, after)
    )
    if present == requested and state.has_all_adapters:
        return
    check_base(full_family, concepts)
    new = [concept for concept in concepts if concept.info.name not in before]
    check_vocabularies(full_family, state, new)
    warn_about_overlaps(before, after)
    merge_plan = resolve_merge(full_family, state, after, None)
    apply_attachments(full_family, state, after, merge_plan)
