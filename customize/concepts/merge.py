"""Many concepts, learned apart, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from customize.concepts.adapter import file_name
from customize.concepts.concept import ConceptInfo
from customize.concepts.formats.lora import Adaptation, LoraInfo
from customize.core.lowrank import MERGES, LowRank
from customize.errors import ConceptError, ConfigError


def merge(
    concepts: Sequence[Adaptation], weights: Sequence[float], method: str = "sum"
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
        # By one name for each layer, as a concept that was never saved may have the model's.
        updates = [
            {file_name(component, m): u for m, u in concept.products.get(component, {}).items()}
            for concept in concepts
        ]
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


def check_together(concepts: Sequence[Adaptation]) -> None:
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
        strange = strangers(first, info)
        if strange:
            raise ConceptError(
                strange,
                where=info.name,
                fix="merge concepts of one base model, or of bases of the same architecture",
            )
        # A LoRA from elsewhere says only its family; its layers' shapes are compared on merging.
        first = first if first.fingerprint else info


def strangers(a: ConceptInfo | LoraInfo, b: ConceptInfo | LoraInfo) -> str:
    """Why two do not belong to one architecture, as far as both say which; empty where they do."""
    both = a.fingerprint and b.fingerprint
    if a.family == b.family and (not both or a.fingerprint == b.fingerprint):
        return ""
    return (
        f"{a.name} was learned on {a.family} ({a.base or 'unknown'}) and {b.name} on {b.family} "
        f"({b.base or 'unknown'}), which differ in architecture or size"
    )


def _ordered(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
