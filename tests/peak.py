"""How many bytes a call allocates at most, on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(model: nn.Module, call: Callable[[], Any]) -> int:
    """The most that is alive at a time beside the model's own weights."""
    own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    with torch.no_grad(), _Fused(), _Alive(own) as alive:
        call()
    return alive.peak


class _Fused(TorchFunctionMode):
    """Attention allocates its answer alone, as fused kernels do; on meta torch has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return function(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = set(known), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return answer

    def _note(self, storage: Any) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += count

        def gone() -> None:
            self.known.discard(key)
            self.now -= count

        weakref.finalize(storage, gone)
