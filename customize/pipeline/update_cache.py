"""A cache of merged updates and input statistics, for attachments that change at every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from customize.concepts.input_statistics import LayerInputs
from customize.concepts.types import Adaptation
from customize.core.lowrank import LowRank
from customize.pipeline.lru_cache import LRUCache, tensor_bytes

Updates = Mapping[str, Mapping[str, LowRank]]

# Approximate size in bytes of a cached value apart from its tensors.
_OVERHEAD = 1024


class UpdateCache(LRUCache[Hashable]):
    """Least recently used values within a number of bytes, for sets of attached concepts.

    Cached objects that are in use anyway, because they are attached, do not count.
    """

    def put_tensors(self, key: Hashable, value: Any, tensors: Iterable[Tensor]) -> None:
        """Cache a value of the size of these tensors."""
        self.put(key, value, tensor_bytes(list(tensors)) + _OVERHEAD)

    def get_input_statistics(
        self, concept: Adaptation, read: Callable[[Adaptation], LayerInputs | None]
    ) -> LayerInputs | None:
        """Return a concept's input statistics, by calling ``read`` if they are not cached."""
        entry = self.get(("input statistics", id(concept)))
        if entry is not None and entry[0]() is concept:
            cached: LayerInputs | None = entry[1]
            return cached
        statistics = read(concept)
        self.put_input_statistics(concept, statistics)
        return statistics

    def put_input_statistics(self, concept: Adaptation, statistics: LayerInputs | None) -> None:
        """Cache a concept's input statistics; None if it has none."""
        parts = () if statistics is None else (statistics.concept, statistics.generic)
        tensors = [rows for part in parts for layers in part.values() for rows in layers.values()]
        key = ("input statistics", id(concept))
        self.put_tensors(key, (weakref.ref(concept), statistics), tensors)

    def get_merged_updates(
        self, options: Hashable, inputs: Sequence[Any], merge: Callable[[], Updates]
    ) -> Updates:
        """Return merged updates, by calling ``merge`` if they are not cached.

        Args:
            options: Merge method, weights and everything else that the result depends on.
            inputs: The concepts and input statistics that the result depends on, by identity.
            merge: Computes component -> module -> update.
        """
        key = ("merge", options, tuple(map(id, inputs)))
        entry = self.get(key)
        # A new object may have the id of one that is gone.
        if entry is not None and all(
            reference() is value for reference, value in zip(entry[0], inputs, strict=True)
        ):
            cached: Updates = entry[1]
            return cached
        updates = merge()
        references = [weakref.ref(value) for value in inputs]
        self.put_tensors(key, (references, updates), update_factors(updates))
        return updates


def update_factors(updates: Updates) -> list[Tensor]:
    """Return all factors of the updates of all components."""
    flat = [update for layers in updates.values() for update in layers.values()]
    return [factor for update in flat for factor in (update.up, update.down)]
