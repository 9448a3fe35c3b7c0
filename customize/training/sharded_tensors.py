"""Tensors whose rows are sharded over processes, as those of FSDP2, among plain ones.

All processes must call these functions for the same tensors in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has only a part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor in all processes; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU of the first process, and an empty one in the others.

    A plain tensor is returned as it is.
    """
    return keep_in_first(full_tensor(tensor)) if is_sharded(tensor) else tensor


def keep_in_first(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in the first process, and an empty one in the others."""
    return tensor.cpu() if torch.distributed.get_rank() == 0 else tensor.new_empty(0)


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a copy of a whole tensor on the device of another one, sharded as that one is.

    Args:
        tensor: The same values in all processes. One of another shape, such as a count, stays
            whole.
        other: The other tensor.
    """
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor.to(other.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    # Each process has the values, so none sends them. What this returns is a view of all of them.
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()
