"""Many concepts, learned apart, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from customize.concepts.adapter import file_name
from customize.concepts.concept import ConceptInfo
from customize.concepts.formats.lora import Adaptation, LoraInfo
from customize.concepts.inputs import Factors, LayerInputs
from customize.core.fusion import fusion
from customize.core.lowrank import MERGES, LowRank, weighted_sum
from customize.errors import ConceptError, ConfigError

SUM, FUSION = "sum", "fusion"
METHODS = (*MERGES, FUSION)
#: Fusion where every concept brings its record, else the sum.
AUTO = "auto"

# How much the base's own inputs count in a fusion against one concept's, for each concept.
_HOLD = 0.1


def merge(
    concepts: Sequence[Adaptation],
    weights: Sequence[float],
    method: str = SUM,
    inputs: Sequence[LayerInputs] = (),
    others: Sequence[LayerInputs] = (),
) -> dict[str, dict[str, LowRank]]:
    """One update for each layer that any of the concepts changes.

    A concept that leaves a layer alone counts there as an update of zero. Tokens are not merged:
    each concept keeps its own.

    Args:
        concepts: at least one, all learned on one architecture.
        weights: as many, finite. They are summed as they are and need not add to 1.
        method: a name in :data:`METHODS`.
        inputs: for "fusion", what each concept's layers read. Layers without a record are summed.
        others: what is not to be disturbed, for "fusion": those of concepts that the model has
            already. One concept without others stays as it is.

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
    if method not in METHODS:
        raise ConfigError(
            f"there is no merge {method}", where="method", fix=f"choose from {', '.join(METHODS)}"
        )
    if method == FUSION and len(inputs) != len(concepts):
        raise ConfigError(
            f"the layer inputs of {len(inputs)} concepts were given for {len(concepts)}",
            where="inputs",
            fix="give those of each, as customize.record_inputs gives them",
        )
    if method == FUSION and len(concepts) + len(others) == 1:
        method = SUM
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
                if method == FUSION:
                    place = (component, module)
                    merged[component][module] = _fused(own, weights, inputs, others, place)
                else:
                    merged[component][module] = MERGES[method](own, weights)
            except ConceptError as error:
                raise ConceptError(
                    error.what, where=f"{component}.{module}", fix=error.fix
                ) from error
    return merged


def _fused(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    inputs: Sequence[LayerInputs],
    others: Sequence[LayerInputs],
    place: tuple[str, str],
) -> LowRank:
    """The updates of one layer, fused where their inputs are known, and summed with the rest."""
    component, module = place

    def rows(factors: Factors) -> Tensor | None:
        return factors.get(component, {}).get(module)

    known, rest = {}, []
    for k, each in enumerate(inputs):
        own = rows(each.own)
        if own is not None and updates[k].rank:
            known[k] = own
        else:
            rest.append(k)
    if not known:
        return weighted_sum(updates, weights)
    still = [rows(each.own) for each in others]
    generic = [rows(each.generic) for each in (*inputs, *others)]
    still += [own * math.sqrt(_HOLD) for own in generic if own is not None]
    left_alone = [each for each in still if each is not None]
    fused = fusion(
        [updates[k] for k in known],
        [weights[k] for k in known],
        list(known.values()),
        torch.cat(left_alone) if left_alone else None,
    )
    return weighted_sum([fused, *(updates[k] for k in rest)], [1.0, *(weights[k] for k in rest)])


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
