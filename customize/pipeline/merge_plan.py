"""Choosing how the concepts of a pipeline are merged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from customize.concepts.merge.choose_method import (
    AUTO,
    choose_method,
    may_need_inputs,
    parse_method,
    read_record,
)
from customize.core.merges import FUSION, MERGES, SUM
from customize.errors import ConfigError
from customize.families import Family
from customize.pipeline.record_inputs import record_concepts
from customize.pipeline.state import AttachedConcept, AttachedState, MergePlan

#: Method and its settings, from the ``merge`` argument of :func:`customize.load_custom`.
MergeRequest = tuple[str, dict[str, Any]]


def parse_merge(merge: str | Mapping[str, Any] | None) -> MergeRequest | None:
    """Check the ``merge`` argument of :func:`customize.load_custom`; None stays None.

    Raises:
        ConfigError: The method does not exist, or has no such setting.
    """
    return None if merge is None else parse_method(merge)


def resolve_merge(
    family: Family,
    state: AttachedState,
    after: Mapping[str, AttachedConcept],
    request: MergeRequest | None,
) -> MergePlan:
    """Return how the concepts that a call attaches will be merged.

    Input statistics saved beside the concepts are read. Those that the method needs and lacks are
    recorded, for which the pipeline draws.

    Args:
        family: Family of all components that the state changes.
        state: Attached concepts and their merge before the call.
        after: Concept name -> concept, after the call.
        request: Result of :func:`parse_merge`; None keeps the present method.

    Raises:
        ConfigError: A concept without input statistics names no words to draw it with; or some
            concepts are fused and some not, with a method that merges them together.
        ConceptError: Input statistics cannot be read, or belong to another concept.
    """
    before = state.merge_plan
    method, settings = request or (before.requested_method, dict(before.method_settings))
    if len(after) < 2:
        return MergePlan(method, method_settings=settings)
    is_joint = method in MERGES and not MERGES[method].is_separable
    if is_joint and len({attached.fused for attached in after.values()}) > 1:
        unfused = [name for name, attached in after.items() if not attached.fused]
        raise ConfigError(
            f"{method} merges all concepts together, and {', '.join(unfused)} would be beside the "
            "weights, while others are in them",
            where="merge",
            fix="give fuse=True for all or for none, naming those that are attached already in "
            'weights=, or choose "sum"',
        )
    known = {
        name: statistics
        for name, statistics in before.input_statistics.items()
        if name in after and not after[name].routed
    }
    cache = state.update_cache
    read = read_record if cache is None else partial(cache.get_input_statistics, read=read_record)
    concepts = [attached.concept for attached in after.values()]
    resolved, statistics, missing = choose_method(method, concepts, known, read)
    if MERGES[resolved].needs_inputs:
        recorded = record_concepts(family, state, missing)
        if cache is not None:
            for concept in missing:
                cache.put_input_statistics(concept, recorded[concept.info.name])
        statistics |= recorded
    return MergePlan(method, resolved, statistics if may_need_inputs(method) else {}, settings)


def resolve_merge_without(state: AttachedState, after: Mapping[str, AttachedConcept]) -> MergePlan:
    """Return how the remaining concepts will be merged; nothing is read or drawn.

    Args:
        state: Attached concepts and their merge before the call.
        after: Concept name -> concept, some of those that are attached.
    """
    before = state.merge_plan
    known = {
        name: statistics for name, statistics in before.input_statistics.items() if name in after
    }
    method = SUM.name
    if len(after) > 1:
        method = before.requested_method
        if may_need_inputs(method):
            with_inputs = FUSION.name if method == AUTO else method
            method = with_inputs if known.keys() == after.keys() else SUM.name
    return MergePlan(before.requested_method, method, known, before.method_settings)
