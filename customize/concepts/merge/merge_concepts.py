"""Merging concepts that were trained separately into one adapter, layer by layer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from customize.concepts.adapter import saved_module_name
from customize.concepts.input_statistics import LayerFactors, LayerInputs
from customize.concepts.merge.choose_method import check_concept_count
from customize.concepts.merge.compatibility import check_compatible
from customize.concepts.merge.component_weights import BlockWeights, Weight, layer_weight
from customize.concepts.types import Adaptation
from customize.core.lowrank import LowRank, check_same_weight, weighted_sum
from customize.core.merges import MERGES, SUM
from customize.core.merges.method import MergeMethod, RecordedInputs
from customize.core.scalars import as_float
from customize.core.truncation import truncate_randomized
from customize.errors import ConceptError, ConfigError
from customize.near_names import suggest_names
from customize.text import plural, quote


def merge_concepts(
    concepts: Sequence[Adaptation],
    weights: Sequence[Weight],
    method: str = SUM.name,
    inputs: Sequence[LayerInputs] = (),
    preserved: Sequence[LayerInputs] = (),
    **settings: Any,
) -> dict[str, dict[str, LowRank]]:
    """Merge concepts into one update per layer: :func:`plan_merge`, computed for all layers."""
    layers = plan_merge(concepts, weights, method, inputs, preserved, **settings)
    return {
        component: {module: layer.compute() for module, layer in component_layers.items()}
        for component, component_layers in layers.items()
    }


@dataclass(frozen=True, eq=False)
class LayerMerge:
    """The merge of one layer, computed on demand.

    Attributes:
        updates: One of each concept, in their order; of rank 0 where a concept does not change the
            layer.
        weights: As many numbers.
        merge: Computes the merged update; None for the sum.
        names: Names of the concepts.
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
        """Name and weight of the concept with the largest weighted update, for messages."""
        sizes = [
            abs(weight * update.scale)
            * float(update.up.double().norm() * update.down.double().norm())
            for update, weight in zip(self.updates, self.weights, strict=True)
        ]
        largest = sizes.index(max(sizes))
        return f"{self.names[largest]} (weight {self.weights[largest]:g})"

    def compute(self) -> LowRank:
        """Compute the merged update; each call computes it anew."""
        return weighted_sum(self.updates, self.weights) if self.merge is None else self.merge()

    def truncate(self, merged: LowRank | None = None) -> LowRank:
        """Compute the update for an adapter, of at most the sum of the concepts' ranks.

        An update of higher rank, such as a pruned one, is approximated at that rank by
        :func:`customize.core.truncation.truncate_randomized`; any other is returned unchanged.

        Args:
            merged: The result of :meth:`compute`; None to compute it.
        """
        update = self.compute() if merged is None else merged
        rank = sum(concept_update.rank for concept_update in self.updates)
        return update if update.rank <= rank else truncate_randomized(update, rank)

    def summands(self) -> tuple[Sequence[LowRank], Sequence[float]]:
        """Updates and weights whose sum is the merged update.

        They are the arguments of :func:`customize.core.lowrank.add_weighted_sum`.
        """
        if self.merge is None:
            return self.updates, self.weights
        return [self.merge()], [1.0]


def plan_merge(
    concepts: Sequence[Adaptation],
    weights: Sequence[Weight],
    method: str = SUM.name,
    inputs: Sequence[LayerInputs] = (),
    preserved: Sequence[LayerInputs] = (),
    **settings: Any,
) -> dict[str, dict[str, LayerMerge]]:
    """Check a merge, and plan it for each layer that any of the concepts changes.

    A layer that a concept does not change counts as an update of zero. A single concept is
    returned as it is. Tokens are not merged: each concept keeps its own.

    Args:
        concepts: At least one, all trained on one architecture.
        weights: One finite weight per concept; they need not add up to 1. Layers where a weight by
            component and block is 0 count as unchanged by the concept.
        method: A name in :data:`customize.core.merges.MERGES`.
        inputs: For methods that need inputs, the record of each concept. Layers without a record
            are summed.
        preserved: For the same methods, the records of concepts that are attached already and
            should not change.
        settings: Settings of the method, such as ``density=0.3``. A ``seed`` gives each layer a
            seed of its own.

    Returns:
        Component -> module name in files -> merge of the layer. Pruned updates have full rank;
        :meth:`LayerMerge.truncate` reduces it.

    Raises:
        ConceptError: If there are no concepts, two belong to different families or sizes, or two
            have one name; or if the record of a layer has another width.
        ConfigError: If the method or a setting is unknown or invalid, the method needs more
            concepts, or the weights or records do not match the concepts.
    """
    check_compatible(concepts)
    if len(weights) != len(concepts):
        raise ConfigError(
            f"{plural(len(weights), 'weight')} for {plural(len(concepts), 'concept')}",
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
    if not isinstance(method, str) or method not in MERGES:
        raise ConfigError(
            f"unknown merge method {quote(method)}",
            where="merge",
            fix=suggest_names(method, MERGES),
        )
    declaration = MERGES[method]
    declaration.check_settings(settings)
    if declaration.needs_inputs and len(inputs) != len(concepts):
        raise ConfigError(
            f"the merge {method} of {plural(len(concepts), 'concept')} needs as many records of "
            f"layer inputs, not {len(inputs)}",
            where="inputs",
            fix="give the record of each concept, as customize.record_inputs returns them",
        )
    if len(concepts) + len(preserved) == 1:
        check_concept_count(method, 1)
        declaration = SUM
    names = [concept.info.name for concept in concepts]
    updates = [_nonzero_updates(*pair) for pair in zip(concepts, weights, strict=True)]
    layers: dict[str, dict[str, LayerMerge]] = {}
    for component, module in _layer_names(updates):
        layer_updates = _layer_updates(updates, component, module)
        layer_weights = [layer_weight(weight, component, module) for weight in weights]
        merge: Callable[[], LowRank] | None = None
        if declaration is not SUM:
            arguments: list[Any] = [layer_updates, layer_weights]
            if declaration.needs_inputs:
                width = layer_updates[0].shape[1]
                arguments.append(_layer_inputs(inputs, preserved, component, module, width))
            layer_settings = _layer_settings(declaration, settings, component, module)
            merge = partial(declaration.merge, *arguments, **layer_settings)
        layers.setdefault(component, {})[module] = LayerMerge(
            layer_updates, layer_weights, merge, names
        )
    return layers


ComponentUpdates = Mapping[str, Mapping[str, LowRank]]


def _nonzero_updates(concept: Adaptation, weight: Weight) -> dict[str, dict[str, LowRank]]:
    """A concept's updates by the layer names in files, without layers of weight 0.

    A concept that was not saved may use the model's own names for its layers.
    """
    updates: dict[str, dict[str, LowRank]] = {}
    for component, component_updates in concept.updates.items():
        for module, update in component_updates.items():
            if not isinstance(weight, BlockWeights) or weight.for_layer(component, module):
                updates.setdefault(component, {})[saved_module_name(component, module)] = update
    return updates


def _layer_names(updates: Sequence[ComponentUpdates]) -> Iterable[tuple[str, str]]:
    """(component, module) of each layer that any concept changes, grouped by component."""
    for component in dict.fromkeys(component for concept in updates for component in concept):
        modules = (module for concept in updates for module in concept.get(component, {}))
        for module in dict.fromkeys(modules):
            yield component, module


def _layer_updates(
    updates: Sequence[ComponentUpdates], component: str, module: str
) -> list[LowRank]:
    """Each concept's update of one layer, of rank 0 where it has none.

    Raises:
        ConceptError: If shapes or devices differ.
    """
    layer_updates = [concept.get(component, {}).get(module) for concept in updates]
    existing = next(update for update in layer_updates if update is not None)
    zero = LowRank(existing.up[:, :0], existing.down[:0])
    filled = [zero if update is None else update for update in layer_updates]
    try:
        check_same_weight(filled)
    except ConceptError as error:
        raise ConceptError(error.problem, where=f"{component}.{module}", fix=error.fix) from error
    return filled


def _layer_inputs(
    inputs: Sequence[LayerInputs],
    preserved: Sequence[LayerInputs],
    component: str,
    module: str,
    width: int,
) -> RecordedInputs:
    """The records of one layer.

    Raises:
        ConceptError: If a record has another width than the layer.
    """

    def layer_factor(factors: LayerFactors) -> Tensor | None:
        factor = factors.get(component, {}).get(module)
        if factor is not None and factor.shape[-1] != width:
            raise ConceptError(
                f"a record has inputs of width {factor.shape[-1]}, and the layer has width {width}",
                where=f"{component}.{module}",
                fix="record the inputs of these concepts again: customize record",
            )
        return factor

    generic = (layer_factor(record.generic) for record in (*inputs, *preserved))
    others = (layer_factor(record.concept) for record in preserved)
    return RecordedInputs(
        concepts=[layer_factor(record.concept) for record in inputs],
        preserved=[factor for factor in others if factor is not None],
        generic=[factor for factor in generic if factor is not None],
    )


def _layer_settings(
    method: MergeMethod, settings: Mapping[str, Any], component: str, module: str
) -> dict[str, Any]:
    """The settings for one layer, with seeds that differ between layers."""
    layer_settings = dict(settings)
    for setting in method.settings:
        if setting.is_seed:
            seed = settings.get(setting.name, setting.default)
            text = f"{seed} {component}.{module}"
            digest = hashlib.sha256(text.encode()).digest()
            layer_settings[setting.name] = int.from_bytes(digest[:7], "little")
    return layer_settings
