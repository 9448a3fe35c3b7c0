"""Peak memory of a call, measured on the meta device, where nothing is computed."""

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
    """The peak of allocated bytes, besides the model's weights.

    Args:
        model: The model, on the meta device.
        call: Calls the model; must return one tensor for a backward pass.
        backward: Whether a backward pass follows the call.
    """
    weights = {
        tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())
    }
    # Not by a TorchFunctionMode, which checkpoints do not recompute in.
    fused = patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused)
    with fused, torch.set_grad_enabled(backward), _Alive(weights) as alive:
        output = call()
        if backward:
            output.float().square().mean().backward()
    return alive.peak


class _Attention(torch.autograd.Function):
    """The allocations of a fused kernel: output and gradients; it saves its inputs."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention without fused kernels, which torch lacks on the meta device."""
    return _Attention.apply(query, key, value)


class _Alive(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = set(known), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return output

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
