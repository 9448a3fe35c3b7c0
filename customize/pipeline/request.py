"""Resolving which concepts a call of ``load_custom`` requests, without touching the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from customize.concepts.merge.component_weights import BlockWeights, Weight, parse_weight
from customize.concepts.types import Adaptation, Lora, VectorUpdate
from customize.core.lowrank import LowRank
from customize.errors import ConceptError, ConfigError
from customize.families import Family
from customize.near_names import suggest_names
from customize.pipeline.state import AttachedConcept
from customize.text import plural
from customize.user_warnings import warn_user

#: A number, or a dict by component and block: see
#: :mod:`customize.concepts.merge.component_weights`.
RequestedWeight = float | Mapping[str, Any] | BlockWeights
Weights = Sequence[RequestedWeight] | Mapping[str, RequestedWeight] | None


def resolve_attachments(
    before: Mapping[str, AttachedConcept],
    concepts: Sequence[Adaptation],
    weights: Weights,
    fuse: bool,
    family: Family,
) -> dict[str, AttachedConcept]:
    """Return name -> concept for everything that is attached after the call.

    Args:
        before: Name -> attached concept. One of ``concepts`` with such a name must be identical.
        concepts: Concepts that the call names.
        weights: As for :func:`customize.load_custom`.
        fuse: As for :func:`customize.load_custom`.
        family: Family whose components and blocks weights may name.

    Raises:
        ConfigError: A weight belongs to no concept, component or block, or is not finite.
        ConceptError: A name or trigger is taken.
    """
    _check_names(before, concepts)
    after = dict(before)
    for concept in concepts:
        name = concept.info.name
        after[name] = AttachedConcept(concept, before[name].weight if name in before else 1.0, fuse)
    for name, weight in _parse_weights(after, concepts, weights, family).items():
        # Without concepts, `fuse` is for those that the weights name.
        fused = after[name].fused or (fuse and not concepts)
        after[name] = replace(after[name], weight=weight, fused=fused, routed=False)
    for a, b in combinations([attached.concept.info for attached in after.values()], 2):
        common = [trigger for trigger in a.triggers if trigger in b.triggers]
        if common:
            renamed = b if len(b.triggers) == 1 else a
            raise ConceptError(
                f"the concepts {a.name} and {b.name} have the same trigger {common[0]}",
                fix=f'give one another name and trigger: names=["{renamed.name}-2"], one name or '
                "None for each concept (--names)"
                if len(renamed.triggers) == 1
                else "load the concepts that one of them was merged from, without this one",
            )
    return after


def _check_names(before: Mapping[str, AttachedConcept], concepts: Sequence[Adaptation]) -> None:
    names: set[str] = set()
    for concept in concepts:
        name = concept.info.name
        if name in names:
            raise ConceptError(
                f"two concepts are called {name}",
                fix="give each once; a LoRA is called by its file's name, or by "
                f'names=[None, "{name}-2"]',
            )
        names.add(name)
        if name in before and not _is_identical(before[name].concept, concept):
            raise ConceptError(
                f"another concept called {name} is attached already",
                fix=f'call unload_custom("{name}") first, or give this one another name: '
                f'names=["{name}-2"] (--names)',
            )


def _is_identical(a: Adaptation, b: Adaptation) -> bool:
    """Return whether two concepts have the same effect on a model, apart from their metadata."""
    if a is b:
        return True
    facts = ("name", "trigger", "family", "fingerprint", "num_tokens")
    if any(getattr(a.info, fact) != getattr(b.info, fact) for fact in facts):
        return False

    def contents(concept: Adaptation) -> list[Any]:
        tokens = {subject.trigger: subject.embeddings for subject in concept.subjects}
        vectors = concept.vector_updates if isinstance(concept, Lora) else {}
        return [concept.updates, tokens, vectors]

    return all(map(_is_equal, contents(a), contents(b)))


def _is_equal(a: Any, b: Any) -> bool:
    """Compare nested mappings of updates and tensors exactly."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, LowRank):
        return a.scale == b.scale and _is_equal(a.up, b.up) and _is_equal(a.down, b.down)
    if isinstance(a, VectorUpdate):
        return a.is_replacement == b.is_replacement and torch.equal(a.values, b.values)
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _parse_weights(
    after: Mapping[str, AttachedConcept],
    concepts: Sequence[Adaptation],
    weights: Weights,
    family: Family,
) -> dict[str, Weight]:
    """Return concept name -> weight, for the concepts that ``weights`` is about."""
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        requested = dict(weights)
        for name in requested:
            if name not in after:
                raise ConfigError(
                    f"a weight is given for {name}, which is neither attached nor being loaded",
                    where="weights",
                    fix=suggest_names(name, after, otherwise="load it first"),
                )
    elif isinstance(weights, str | bytes) or not isinstance(weights, Sequence):
        raise ConfigError(
            f"weights are of type {type(weights).__name__}",
            where="weights",
            fix="give a list with a number for each concept, or a dict from name to number",
        )
    elif len(weights) != len(concepts):
        raise ConfigError(
            f"{plural(len(weights), 'weight')} for {plural(len(concepts), 'concept')}",
            where="weights",
            fix="give one for each, or a dict from concept name to weight",
        )
    else:
        names = [concept.info.name for concept in concepts]
        requested = dict(zip(names, weights, strict=True))
    has_blocks = any(isinstance(weight, Mapping) for weight in requested.values())
    layers = {key: list(family.layers(key)) for key in family.adaptable} if has_blocks else {}
    denoisers = list(family.denoisers) if has_blocks else []
    parsed = {
        name: parse_weight(name, weight, layers, denoisers) for name, weight in requested.items()
    }
    for name, weight in parsed.items():
        if isinstance(weight, BlockWeights):
            _warn_about_unused_weights(after[name].concept, weight)
    return parsed


def _warn_about_unused_weights(concept: Adaptation, weight: BlockWeights) -> None:
    layers = [
        f"{component}.{module.removeprefix('text_model.')}."
        for component, updates in concept.updates.items()
        for module in updates
    ]
    if isinstance(concept, Lora):
        layers += [
            f"{component}.{name}."
            for component, vectors in concept.vector_updates.items()
            for name in vectors
        ]
    for path in weight.keys:
        if path and not any(layer.startswith(f"{path}.") for layer in layers):
            warn_user(
                f"{concept.info.name} changes no layer of {path}, so its weight there does nothing"
            )
