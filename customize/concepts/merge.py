"""Many concepts, learned apart, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from customize.concepts.concept import Concept
from customize.core.lowrank import MERGES, LowRank
from customize.errors import ConceptError, ConfigError


def merge(
    concepts: Sequence[Concept], weights: Sequence[float], method: str = "sum"
) -> dict[str, dict[str, LowRank]]:
    """One update for each layer that any of the concepts changes.

    A concept that leaves a layer alone counts there as an update of zero. Tokens are not merged:
    each concept keeps its own.

    Args:
        concepts: at least one, all learned on one architecture.
        weights: as many, finite. They are summed as they are and need not add to 1.
        method: a name in :data:`customize.core.lowrank.MERGES`.

    Returns:
        component -> module -> update, under the names used in files.

    Raises:
        ConceptError: no concepts, two for different families or sizes, or two of one name.
        ConfigError: an unknown method, another number of weights, or one that is not finite.
    """
    check_together(concepts)
    if len(weights) != len(concepts):
        raise ConfigError(
            f"{len(weights)} weights were given for {len(concepts)} concepts",
            where="weights",
            fix="give one weight for each concept",
        )
    for concept, weight in zip(concepts, weights, strict=True):
        if not math.isfinite(weight):
            raise ConfigError(
                f"the weight of {concept.info.name} is {weight}",
                where="weights",
                fix="give finite weights",
            )
    if method not in MERGES:
        raise ConfigError(
            f"there is no merge {method}", where="method", fix=f"choose from {', '.join(MERGES)}"
        )
    merged: dict[str, dict[str, LowRank]] = {}
    for component in _ordered(concept.products for concept in concepts):
        updates = [concept.products.get(component, {}) for concept in concepts]
        merged[component] = {}
        for module in _ordered(updates):
            some = next(own[module] for own in updates if module in own)
            zero = LowRank(some.up[:, :0], some.down[:0])
            own = [each.get(module, zero) for each in updates]
            try:
                merged[component][module] = MERGES[method](own, weights)
            except ConceptError as error:
                raise ConceptError(
                    error.what, where=f"{component}.{module}", fix=error.fix
                ) from error
    return merged


def check_together(concepts: Sequence[Concept]) -> None:
    """Refuse concepts that no one model can carry together.

    Raises:
        ConceptError: no concepts, two for different families or sizes, or two of one name.
    """
    if not concepts:
        raise ConceptError("there is nothing to merge", fix="give at least one concept")
    first = concepts[0].info
    names: set[str] = set()
    for concept in concepts:
        info = concept.info
        if info.name in names:
            raise ConceptError(
                f"two concepts are called {info.name}", fix="give each once, or rename one"
            )
        names.add(info.name)
        if (info.family, info.fingerprint) != (first.family, first.fingerprint):
            raise ConceptError(
                f"{first.name} was learned on {first.family} ({first.base}) and {info.name} on "
                f"{info.family} ({info.base}), which differ in architecture or size",
                where=info.name,
                fix="merge concepts of one base model, or of bases of the same architecture",
            )


def _ordered(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
