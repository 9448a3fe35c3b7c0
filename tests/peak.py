"""How many bytes a call allocates at most, on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(model: nn.Module, call: Callable[[], Any], backward: bool = False) -> int:
    """The most that is alive at a time beside the model's own weights.

    Args:
        call: answers one tensor if it is to be followed by its backward pass.
    """
    own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    # Not by a TorchFunctionMode, which checkpoints do not recompute in.
    fused = patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused)
    with fused, torch.set_grad_enabled(backward), _Alive(own) as alive:
        answer = call()
        if backward:
            answer.float().square().mean().backward()
    return alive.peak


class _Attention(torch.autograd.Function):
    """What a fused kernel allocates: its answer, and gradients; it saves what it was given."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = torch.empty_like(query)
        context.save_for_backward(query, key, value, answer)
        return answer

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """On meta torch has no fused kernels for attention."""
    return _Attention.apply(query, key, value)


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
