"""Choosing a merge method: validation, the method of "auto", and the records that it needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from customize.concepts.input_statistics import LayerInputs, load_recorded_inputs
from customize.concepts.types import Adaptation
from customize.core.merges import FUSION, MERGES, SUM
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.text import plural, quote

#: Fusion if every concept has recorded inputs, else the sum.
AUTO = "auto"


def parse_method(merge: object, where: str = "merge") -> tuple[str, dict[str, Any]]:
    """Parse and check a ``merge=`` argument.

    Args:
        merge: The name of a method, "auto", or a dict of a "method" and its settings.
        where: The name of the argument, for error messages.

    Returns:
        The name and the settings.

    Raises:
        ConfigError: If there is no such method, or it has no such setting, or the value of a
            setting is invalid.
    """
    settings = dict(merge) if isinstance(merge, Mapping) else {"method": merge}
    names = (AUTO, *MERGES)
    if "method" not in settings:
        raise ConfigError(
            "the merge has settings and no method",
            where=where,
            fix=f'add "method", one of {", ".join(names)}',
        )
    method = settings.pop("method")
    if not isinstance(method, str) or method not in names:
        raise ConfigError(
            f"unknown merge method {quote(method)}",
            where=where,
            fix=f'{suggest_names(method, names)}, or give a dict with one as its "method" and its'
            " settings",
        )
    MERGES[SUM.name if method == AUTO else method].check_settings(settings)
    return method, settings


def check_concept_count(method: str, count: int) -> None:
    """Check that a method can merge this number of concepts.

    Raises:
        ConfigError: If one concept is to be merged by a method that needs two.
    """
    least = 1 if method == AUTO else MERGES[method].min_concepts
    if 0 < count < least:
        raise ConfigError(
            f"the merge {method} needs at least {plural(least, 'concept')}, not {count}",
            where="merge",
            fix="leave the method out; use --rank to reduce the rank of a LoRA file",
        )


def may_need_inputs(method: str) -> bool:
    """Whether a method, or one that "auto" may resolve to, depends on recorded inputs."""
    return method == AUTO or MERGES[method].needs_inputs


def choose_method(
    method: str,
    concepts: Sequence[Adaptation],
    loaded: Mapping[str, LayerInputs],
    read: Callable[[Adaptation], LayerInputs | None],
) -> tuple[str, dict[str, LayerInputs], list[Adaptation]]:
    """Resolve "auto", and collect the records that the method needs.

    Concepts that were trained in one run resolve to the sum, which the run optimized.

    Args:
        method: A name in :data:`customize.core.merges.MERGES`, or "auto".
        concepts: The concepts to merge.
        loaded: Concept name -> record, for records in memory.
        read: Returns the record of another concept, or None; such as :func:`read_record`.

    Returns:
        The name of the method, never "auto"; concept name -> record; and the concepts without a
        record, which the caller records or refuses if the method needs inputs. Records are read
        only for methods that may need them.

    Raises:
        ConceptError: If a record cannot be read, or belongs to other updates.
    """
    if not may_need_inputs(method):
        return method, dict(loaded), []
    if method == AUTO and trained_together(concepts):
        return SUM.name, dict(loaded), []
    records = dict(loaded)
    for concept in concepts:
        name = concept.info.name
        if name not in records and (record := read(concept)) is not None:
            records[name] = record
    missing = [concept for concept in concepts if concept.info.name not in records]
    if method != AUTO:
        return method, records, missing
    if not missing:
        return FUSION.name, records, missing
    if records:
        names = ", ".join(concept.info.name for concept in missing)
        warnings.warn(
            f"the concepts are summed, not fused, because the layer inputs of {names} are not "
            'recorded; record them with customize record, or in load_custom with merge="fusion"',
            stacklevel=6,
        )
    return SUM.name, records, missing


def trained_together(concepts: Sequence[Adaptation]) -> bool:
    """Whether the concepts are all those of one joint training run, and more than one."""
    names = {concept.info.name for concept in concepts}
    return len(names) > 1 and all(
        {concept.info.name, *concept.info.trained_with} == names for concept in concepts
    )


def read_record(concept: Adaptation) -> LayerInputs | None:
    """Read the recorded inputs stored beside a concept's files; None if there are none.

    Raises:
        ConceptError: If the record cannot be read, or belongs to other updates.
    """
    return load_recorded_inputs(concept.info.name, concept.updates, concept.source)
