"""A cache bounded in bytes, against a plain model of it."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from customize.pipeline.lru_cache import LRUCache, tensor_bytes

LIMIT = 10
keys = st.sampled_from("abcdef")


class Model(RuleBasedStateMachine):
    """The same by a list of (key, value, size), the most recently used last."""

    def __init__(self):
        super().__init__()
        self.cache = LRUCache(LIMIT)
        self.model = []

    @rule(key=keys, value=st.integers(), size=st.integers(0, LIMIT + 3))
    def put(self, key, value, size):
        self.cache.put(key, value, size)
        self.model = [entry for entry in self.model if entry[0] != key]
        if size <= LIMIT:
            self.model.append((key, value, size))
        while sum(entry[2] for entry in self.model) > LIMIT:
            del self.model[0]

    @rule(key=keys)
    def get(self, key):
        match = next((entry for entry in self.model if entry[0] == key), None)
        assert self.cache.get(key) == (None if match is None else match[1])
        if match is not None:
            self.model.remove(match)
            self.model.append(match)

    @rule(key=keys)
    def drop(self, key):
        self.cache.drop(key)
        self.model = [entry for entry in self.model if entry[0] != key]

    @invariant()
    def is_the_model(self):
        assert list(self.cache) == [entry[0] for entry in self.model]
        assert len(self.cache) == len(self.model)
        assert self.cache.size == sum(entry[2] for entry in self.model) <= LIMIT


TestByteCache = Model.TestCase


@given(st.lists(st.integers(0, 50), max_size=5))
def test_shared_storage_counts_once(sizes):
    tensors = [torch.zeros(size) for size in sizes]
    views = [tensor[: len(tensor) // 2] for tensor in tensors]
    assert tensor_bytes([*tensors, *views, *tensors]) == 4 * sum(sizes)
