"""Values in memory, the least recently used of which go first when they take too much of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)


class LRUCache(Generic[K]):
    """A cache whose values together have at most so many bytes.

    Attributes:
        limit: the most bytes that are kept.
        size: bytes that are kept now.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[K, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[K]:
        """The keys, those of the least recently used first."""
        return iter(self._kept)

    def get(self, key: K) -> Any:
        """The value, which is now the most recently used; None where there is none."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: K, value: Any, size: int) -> None:
        """Keep a value of so many bytes, in the place of an older one of its key.

        Others go until it fits. One that is larger than the limit by itself is not kept.
        """
        self.drop(key)
        if size > self.limit:
            return
        while self.size + size > self.limit:
            self.drop(next(iter(self._kept)))
        self._kept[key] = value, size
        self.size += size

    def drop(self, key: K) -> None:
        """Forget a key, if it is there."""
        if key in self._kept:
            self.size -= self._kept.pop(key)[1]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory that tensors hold; what several share counts once."""
    held = [tensor.untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in held}.values())
