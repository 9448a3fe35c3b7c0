"""Many concepts, learned apart, as one adapter."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.formats.lora import Adaptation, LoraInfo
from customize.concepts.input_statistics import LayerFactors, LayerInputs, load_recorded_inputs
from customize.concepts.merge.component_weights import BlockWeights, Weight, layer_weight
from customize.concepts.types import ConceptInfo
from customize.core.fusion import fusion
from customize.core.lowrank import LowRank, check_same_weight, weighted_sum
from customize.core.merges import MERGES, check_settings, mean_ratio
from customize.core.scalars import as_float
from customize.core.truncation import truncate_randomized
from customize.errors import ConceptError, ConfigError
from customize.near_names import suggest_names
from customize.text import quote

SUM, FUSION = "sum", "fusion"
METHODS = (*MERGES, FUSION)
#: Fusion where every concept brings its record, else the sum.
AUTO = "auto"
#: What part of a sum each concept makes does not depend on the others, so that some may be in the
#: weights, and the others beside them; fusion is told of the others.
SEPARABLE = (SUM, FUSION)

# How much the base's own inputs count in a fusion against one concept's, for each concept.
_GENERIC_WEIGHT = 0.1


def merge(
    concepts: Sequence[Adaptation],
    weights: Sequence[Weight],
    method: str = SUM,
    inputs: Sequence[LayerInputs] = (),
    others: Sequence[LayerInputs] = (),
    **settings: Any,
) -> dict[str, dict[str, LowRank]]:
    """Merge concepts into one update per layer: :func:`plan_merge`, computed for all layers."""
    layers = plan_merge(concepts, weights, method, inputs, others, **settings)
    return {c: {m: layer.compute() for m, layer in own.items()} for c, own in layers.items()}


@dataclass(frozen=True, eq=False)
class LayerMerge:
    """What is to become one layer's update.

    Attributes:
        updates: of the concepts, in their order; of rank 0 where one leaves the layer alone.
        weights: as many.
        merge: gives their merge; None for the sum.
        names: of the concepts.
    """

    updates: Sequence[LowRank]
    weights: Sequence[float]
    merge: Callable[[], LowRank] | None
    names: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.updates[0].shape

    def largest_concept(self) -> str:
        """The concept with the largest weighted update, for messages."""
        sizes = [
            abs(weight * p.scale) * float(p.up.double().norm() * p.down.double().norm())
            for p, weight in zip(self.updates, self.weights, strict=True)
        ]
        largest = sizes.index(max(sizes))
        return f"{self.names[largest]} (weight {self.weights[largest]:g})"

    def compute(self) -> LowRank:
        """The update, computed anew by each call.

        Raises:
            ConfigError: a setting of the method is out of its range.
        """
        return weighted_sum(self.updates, self.weights) if self.merge is None else self.merge()

    def truncate(self, merged: LowRank | None = None) -> LowRank:
        """The update for an adapter: of no higher rank than those of the concepts together.

        What is wider, as after pruning, becomes the nearest that is not
        (:func:`customize.core.truncation.truncate_randomized`); all else is :meth:`compute`.

        Args:
            merged: where it is known already.
        """
        update = self.compute() if merged is None else merged
        together = sum(each.rank for each in self.updates)
        return update if update.rank <= together else truncate_randomized(update, together)

    def summands(self) -> tuple[Sequence[LowRank], Sequence[float]]:
        """Products and weights whose sum the update is, for :func:`core.lowrank.add_to`."""
        if self.merge is None:
            return self.updates, self.weights
        return [self.merge()], [1.0]


def plan_merge(
    concepts: Sequence[Adaptation],
    weights: Sequence[Weight],
    method: str = SUM,
    inputs: Sequence[LayerInputs] = (),
    others: Sequence[LayerInputs] = (),
    **settings: Any,
) -> dict[str, dict[str, LayerMerge]]:
    """What is to be merged in each layer that any of the concepts changes, all of it checked.

    A concept that leaves a layer alone counts there as an update of zero. One concept without
    others is as it is. Tokens are not merged: each concept keeps its own.

    Args:
        concepts: at least one, all learned on one architecture.
        weights: as many, finite. They are summed as they are and need not add to 1. Where one by
            component and block is 0, the concept counts as without these layers.
        method: a name in :data:`METHODS`.
        inputs: for "fusion", what each concept's layers read. Layers without a record are summed.
        others: what is not to be disturbed, for "fusion": those of concepts that the model has
            already.
        settings: of the method, such as ``density=0.3``; see :mod:`customize.core.merges`. A
            ``seed`` gives each layer its own. The ``balance`` of "subject_style" is that of all
            layers that both change, unless it is given.

    Returns:
        component -> module -> layer, under the names used in files. Its update is as wide as the
        layer where the method prunes; see :meth:`LayerMerge.truncate`.

    Raises:
        ConceptError: no concepts, two for different families or sizes, or two of one name.
        ConfigError: an unknown method or setting, one that merges several for a single concept,
            another number of weights, or one that is not finite.
    """
    check_compatible(concepts)
    if len(weights) != len(concepts):
        raise ConfigError(
            f"{len(weights)} weights were given for {len(concepts)} concepts",
            where="weights",
            fix="give one weight for each concept",
        )
    for concept, weight in zip(concepts, weights, strict=True):
        if not isinstance(weight, BlockWeights) and math.isnan(as_float(weight)):
            raise ConfigError(
                f"the weight of {concept.info.name} is {quote(weight)}",
                where="weights",
                fix="give finite weights",
            )
    check_method(method, settings)
    if method == FUSION and len(inputs) != len(concepts):
        raise ConfigError(
            f"the layer inputs of {len(inputs)} concepts were given for {len(concepts)}",
            where="inputs",
            fix="give those of each, as customize.record_inputs gives them",
        )
    if len(concepts) + len(others) == 1:
        check_single_concept(method)
        method = SUM
    products = [_nonzero_updates(c, weight) for c, weight in zip(concepts, weights, strict=True)]
    if method == "subject_style" and len(concepts) == 2:
        settings = {"balance": _balance(products)} | settings
    names = [concept.info.name for concept in concepts]
    layers: dict[str, dict[str, LayerMerge]] = {}
    for component in _union_keys(products):
        updates = [own.get(component, {}) for own in products]
        layers[component] = {}
        for module in _union_keys(updates):
            at = [layer_weight(weight, component, module) for weight in weights]
            some = next(own[module] for own in updates if module in own)
            zero = LowRank(some.up[:, :0], some.down[:0])
            own = [each.get(module, zero) for each in updates]
            try:
                check_same_weight(own)
            except ConceptError as error:
                raise ConceptError(
                    error.problem, where=f"{component}.{module}", fix=error.fix
                ) from error
            how: Callable[[], LowRank] | None = None
            if method == FUSION:
                how = partial(_fuse_layer, own, at, inputs, others, (component, module))
            elif method != SUM:
                how = partial(
                    MERGES[method], own, at, **_layer_settings(settings, component, module)
                )
            layers[component][module] = LayerMerge(own, at, how, names)
    return layers


def check_method(method: str, settings: Mapping[str, Any]) -> None:
    """Refuse what no concepts can be merged by.

    Raises:
        ConfigError: no such method, or a setting that it does not have.
    """
    if not isinstance(method, str) or method not in METHODS:
        shown = method if isinstance(method, str) else quote(method)
        raise ConfigError(
            f"there is no merge {shown}",
            where="merge",
            fix=suggest_names(method, METHODS),
        )
    check_settings(method, settings)


def check_single_concept(method: str) -> None:
    """Refuse a method that would do more to a single concept than take it as it is.

    Raises:
        ConfigError: it is neither the sum, nor the average, nor fusion.
    """
    if method not in (AUTO, SUM, "average", FUSION):
        raise ConfigError(
            f"{method} merges several concepts, and one was given",
            where="merge",
            fix="leave the method out; a LoRA file of a smaller rank is what --rank gives",
        )


def choose_method(
    method: str,
    concepts: Sequence[Adaptation],
    known: Mapping[str, LayerInputs],
    read: Callable[[Adaptation], LayerInputs | None],
) -> tuple[str, dict[str, LayerInputs], list[Adaptation]]:
    """What "auto" comes to, and the records that fusion needs.

    It is the sum of concepts that were learned in one run, which is what was learned.

    Args:
        known: concept's name -> its record, of those whose records are at hand.
        read: looks for another one's, such as :func:`read_record`.

    Returns:
        The method, never "auto"; the records by name; and the concepts that have none, for the
        caller of "fusion" to record or to refuse. Nothing is read for other methods.

    Raises:
        ConceptError: a record cannot be read, or is not of its concept.
    """
    if method not in (AUTO, FUSION):
        return method, dict(known), []
    if method == AUTO and trained_together(concepts):
        return SUM, dict(known), []
    records = dict(known)
    for concept in concepts:
        name = concept.info.name
        if name not in records:
            found = read(concept)
            records |= {} if found is None else {name: found}
    lacking = [concept for concept in concepts if concept.info.name not in records]
    if method == FUSION or not lacking:
        return FUSION, records, lacking
    if records:
        names = ", ".join(concept.info.name for concept in lacking)
        warnings.warn(
            f"the concepts are summed, not fused, as there is no record of what the layers of "
            f'{names} read; make one with customize record, or in load_custom by merge="fusion"',
            stacklevel=6,
        )
    return SUM, records, lacking


def trained_together(concepts: Sequence[Adaptation]) -> bool:
    """Whether these are all that one run has learned, and more than one."""
    names = {concept.info.name for concept in concepts}
    return len(names) > 1 and all(
        {concept.info.name, *concept.info.learned_with} == names for concept in concepts
    )


def read_record(concept: Adaptation) -> LayerInputs | None:
    """The record that lies beside a concept's files; see :func:`choose_method`."""
    return load_recorded_inputs(concept.info.name, concept.updates, concept.source)


def _layer_settings(settings: Mapping[str, Any], component: str, module: str) -> Mapping[str, Any]:
    if "seed" not in settings:
        return settings
    text = f"{settings['seed']} {component}.{module}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    return {**settings, "seed": seed}


def _nonzero_updates(concept: Adaptation, weight: Weight) -> dict[str, dict[str, LowRank]]:
    """A concept's updates by one name for each layer, as one that was never saved may have the
    model's; without those that its weights by component and block leave out."""
    blocks = weight if isinstance(weight, BlockWeights) else None
    kept = {
        component: {
            saved_module_name(component, module): update
            for module, update in own.items()
            if blocks is None or blocks.for_layer(component, module)
        }
        for component, own in concept.updates.items()
    }
    return {component: own for component, own in kept.items() if own}


def _balance(products: Sequence[Mapping[str, Mapping[str, LowRank]]]) -> float:
    """How much larger the first one's entries are than the second's, over the layers of both."""
    updates = [
        {
            (component, module): update
            for component, own in each.items()
            for module, update in own.items()
        }
        for each in products
    ]
    places = [place for place in updates[0] if place in updates[1]]
    return mean_ratio([(updates[0][place], updates[1][place]) for place in places])


def _fuse_layer(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    inputs: Sequence[LayerInputs],
    others: Sequence[LayerInputs],
    place: tuple[str, str],
) -> LowRank:
    """The updates of one layer, fused where their inputs are known, and summed with the rest."""
    component, module = place

    width = updates[0].shape[1]

    def rows(factors: LayerFactors) -> Tensor | None:
        found = factors.get(component, {}).get(module)
        if found is not None and found.shape[-1] != width:
            raise ConceptError(
                f"a record has inputs of width {found.shape[-1]} of a layer of width {width}",
                where=f"{component}.{module}",
                fix="record the inputs of these concepts again: customize record",
            )
        return found

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
    still += [own * math.sqrt(_GENERIC_WEIGHT) for own in generic if own is not None]
    left_alone = [each for each in still if each is not None]
    fused = fusion(
        [updates[k] for k in known],
        [weights[k] for k in known],
        list(known.values()),
        torch.cat(left_alone) if left_alone else None,
    )
    return weighted_sum([fused, *(updates[k] for k in rest)], [1.0, *(weights[k] for k in rest)])


def check_compatible(concepts: Sequence[Adaptation]) -> None:
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
                f"two concepts are called {info.name}",
                fix="give each once, or another name to one of them (--names)",
            )
        names.add(info.name)
        strange = incompatibility(first, info)
        if strange:
            raise ConceptError(
                strange,
                where=info.name,
                fix="merge concepts of one base model, or of bases of the same architecture",
            )
        # A LoRA from elsewhere says only its family; its layers' shapes are compared on merging.
        first = first if first.fingerprint else info


def incompatibility(a: ConceptInfo | LoraInfo, b: ConceptInfo | LoraInfo) -> str:
    """Why two do not belong to one architecture, as far as both say which; empty where they do."""
    both = a.fingerprint and b.fingerprint
    if a.family == b.family and (not both or a.fingerprint == b.fingerprint):
        return ""
    return (
        f"{a.name} was learned on {a.family} ({a.base or 'unknown'}) and {b.name} on {b.family} "
        f"({b.base or 'unknown'}), which differ in architecture or size"
    )


def _union_keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
