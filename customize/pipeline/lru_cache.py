"""A cache with a limit in bytes, which evicts the least recently used values first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)


class LRUCache(Generic[K]):
    """A cache whose values together take at most ``limit`` bytes.

    Attributes:
        limit: Maximum size of all values, in bytes.
        size: Present size of all values, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._entries: OrderedDict[K, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, the least recently used first."""
        return iter(self._entries)

    def get(self, key: K) -> Any:
        """Return a value and mark it as the most recently used; None for an unknown key."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: K, value: Any, size: int) -> None:
        """Cache a value, in place of an older one with its key.

        Other values are evicted until it fits. A value larger than the limit is not cached.

        Args:
            key: Key of the value.
            value: The value.
            size: Size of the value in bytes.
        """
        self.drop(key)
        if size > self.limit:
            return
        while self.size + size > self.limit:
            self.drop(next(iter(self._entries)))
        self._entries[key] = value, size
        self.size += size

    def drop(self, key: K) -> None:
        """Remove a value, if the cache has one with this key."""
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of tensors in bytes; storage that several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
