"""What a call to ``load_custom`` asks for, worked out without touching the pipeline."""

from __future__ import annotations

import warnings
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

#: A number, or a dict by component and block: see
#: :mod:`customize.concepts.merge.component_weights`.
GivenWeight = float | Mapping[str, Any] | BlockWeights
Weights = Sequence[GivenWeight] | Mapping[str, GivenWeight] | None


def resolve_attachments(
    before: Mapping[str, AttachedConcept],
    new: Sequence[Adaptation],
    weights: Weights,
    fuse: bool,
    family: Family,
) -> dict[str, AttachedConcept]:
    """What is to be attached after the call.

    Args:
        before: what is attached now; a concept of ``new`` that is among it must be identical.
        weights, fuse: as in :func:`customize.load_custom`.
        family: whose components and blocks weights may name.

    Raises:
        ConfigError: weights that fit nothing or are not finite.
        ConceptError: a name or trigger is taken.
    """
    _check_names(before, new)
    after = {**before}
    for concept in new:
        name = concept.info.name
        kept = before[name].weight if name in before else 1.0
        after[name] = AttachedConcept(concept, kept, fuse)
    for name, weight in _by_name(after, new, weights, family).items():
        # A call that gives weights alone is about the concepts that these name.
        fused = after[name].fused or (fuse and not new)
        after[name] = replace(after[name], weight=weight, fused=fused, routed=False)
    for a, b in combinations([attached.concept.info for attached in after.values()], 2):
        same = [trigger for trigger in a.triggers if trigger in b.triggers]
        if same:
            free = b if len(b.triggers) == 1 else a
            raise ConceptError(
                f"the concepts {a.name} and {b.name} have the same trigger {same[0]}",
                fix=f'give one another name and trigger: names=["{free.name}-2"], one name or None '
                "for each concept (--names)"
                if len(free.triggers) == 1
                else "load the concepts that one of them was merged from, without this one",
            )
    return after


def is_identical(a: Adaptation, b: Adaptation) -> bool:
    """Whether two concepts do the same to a model, whatever else is noted on them."""
    if a is b:
        return True
    facts = ("name", "trigger", "family", "fingerprint", "num_tokens")
    if any(getattr(a.info, fact) != getattr(b.info, fact) for fact in facts):
        return False
    tokens = [{s.trigger: s.embeddings for s in each.subjects} for each in (a, b)]
    vectors = [each.vector_updates if isinstance(each, Lora) else {} for each in (a, b)]
    return all(_alike(*pair) for pair in ((a.updates, b.updates), tokens, vectors))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, LowRank):
        return a.scale == b.scale and _alike(a.up, b.up) and _alike(a.down, b.down)
    if isinstance(a, VectorUpdate):
        return a.is_replacement == b.is_replacement and torch.equal(a.values, b.values)
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _check_names(before: Mapping[str, AttachedConcept], new: Sequence[Adaptation]) -> None:
    given: set[str] = set()
    for concept in new:
        name = concept.info.name
        if name in given:
            raise ConceptError(
                f"two concepts are called {name}",
                fix="give each once; a LoRA is called by its file's name, or by "
                f'names=[None, "{name}-2"]',
            )
        given.add(name)
        if name in before and not is_identical(before[name].concept, concept):
            raise ConceptError(
                f"another concept called {name} is attached already",
                fix=f'call unload_custom("{name}") first, or give this one another name: '
                f'names=["{name}-2"] (--names)',
            )


def _by_name(
    after: Mapping[str, AttachedConcept],
    new: Sequence[Adaptation],
    weights: Weights,
    family: Family,
) -> dict[str, Weight]:
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        given = dict(weights)
        for name in given:
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
    elif len(weights) != len(new):
        raise ConfigError(
            f"{len(weights)} weights were given for {len(new)} concepts",
            where="weights",
            fix="give one for each, or a dict from concept name to weight",
        )
    else:
        given = {concept.info.name: weight for concept, weight in zip(new, weights, strict=True)}
    by_block = any(isinstance(weight, Mapping) for weight in given.values())
    layers = {key: list(family.layers(key)) for key in family.adaptable} if by_block else {}
    found = {
        name: parse_weight(name, weight, layers, list(family.denoisers) if by_block else [])
        for name, weight in given.items()
    }
    for name, weight in found.items():
        if isinstance(weight, BlockWeights):
            _warn_of_unused(after[name].concept, weight)
    return found


def _warn_of_unused(concept: Adaptation, weight: BlockWeights) -> None:
    layers = [
        f"{component}.{module.removeprefix('text_model.')}."
        for component, own in concept.updates.items()
        for module in own
    ]
    if isinstance(concept, Lora):
        layers += [
            f"{part}.{name}." for part, own in concept.vector_updates.items() for name in own
        ]
    for path in weight.keys:
        if path and not any(layer.startswith(f"{path}.") for layer in layers):
            warnings.warn(
                f"{concept.info.name} changes no layer of {path}, so its weight there does nothing",
                stacklevel=7,
            )
