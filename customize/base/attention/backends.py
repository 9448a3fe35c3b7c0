"""Attention backends: their requirements, error and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from customize.families.family import MaskKind

#: Maximum relative error of a backend, see :func:`relative_error`. It allows for rounding; an
#: ignored mask, scale or key has a far larger error.
ERROR_BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
#: The same for backends that quantize queries and keys to 8 bits, which "auto" never chooses.
QUANTIZED_BOUND = 0.1
QUANTIZED_PREFIX = "sage"

#: Maximum time relative to torch's attention of a backend to be chosen; less gain is noise.
SPEED_MARGIN = 0.95

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Requirements:
    """Known requirements of a backend.

    Attributes:
        package: Name for pip; empty for backends in torch.
        half_precision_only: Whether only float16 and bfloat16 are supported.
        max_head_width: Maximum width of a head; 0 for any.
    """

    package: str = ""
    half_precision_only: bool = True
    max_head_width: int = 256


#: Backends that need a CUDA device. Others are tested by a call.
REQUIREMENTS = {
    "xformers": Requirements("xformers", half_precision_only=False, max_head_width=0),
    "flash": Requirements("flash-attn"),
    "flash_varlen": Requirements("flash-attn"),
    "_flash_3": Requirements("flash-attn-3, built from the source of flash-attn"),
    "_flash_varlen_3": Requirements("flash-attn-3, built from the source of flash-attn"),
    "sage": Requirements("sageattention", max_head_width=128),
    "sage_varlen": Requirements("sageattention", max_head_width=128),
    "_native_cudnn": Requirements(),
}


class HeadShape(NamedTuple):
    """Number and width of the heads of an attention layer."""

    number: int
    width: int


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax(q k^T / sqrt(width)) v in float64 on the CPU.

    Args:
        query: (batch, queries, heads, width), as for diffusers' dispatcher.
        key: (batch, keys, heads, width).
        value: (batch, keys, heads, width).
        mask: (batch, 1, 1, keys), boolean, True for keys that are attended to; None: all.

    Returns:
        (batch, queries, heads, width), float64.
    """
    q, k, v = (tensor.cpu().double().transpose(1, 2) for tensor in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.cpu(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest RMS error of a query and head, relative to the RMS of the expected values.

    Args:
        actual: (batch, queries, heads, width).
        expected: The same shape, float64.

    Returns:
        A number from 0; infinity if the actual values are not finite.
    """
    largest = (actual.cpu().double() - expected).square().mean(-1).sqrt().amax()
    relative = float(largest / expected.square().mean().sqrt())
    return relative if math.isfinite(relative) else math.inf


def run_attention(
    backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute attention by a backend; tensors as for :func:`reference_attention`.

    Raises:
        RuntimeError: The backend's package is missing. Backends may raise other errors.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        attention_backend,
        dispatch_attention_fn,
    )

    with attention_backend(backend):  # checks that the package is installed
        name = AttentionBackendName(backend)
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=name)


@torch.no_grad()
def measure_error(
    backend: str, heads: HeadShape, device: torch.device, dtype: torch.dtype, kind: MaskKind | None
) -> float:
    """Measure the relative error of a call with 96 queries, 77 keys and a batch of two.

    Args:
        backend: Name of the backend.
        heads: Number and width of the heads.
        device: The device.
        dtype: The dtype of queries, keys and values.
        kind: The kind of mask on the last 13 keys of the second sequence, as for padded prompts.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, tokens, *heads, generator=generator).to(dtype) for tokens in (96, 77, 77)
    )
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
    mask[1, ..., -13:] = False
    masks: dict[MaskKind | None, Tensor | None] = {
        None: None,
        "boolean": mask,
        # One per head, as in LTX-2.
        "added": ((~mask).to(dtype) * -10000.0).expand(-1, heads.number, -1, -1),
    }
    device_mask = None if (chosen := masks[kind]) is None else chosen.to(device)
    actual = run_attention(backend, query.to(device), key.to(device), value.to(device), device_mask)
    expected = reference_attention(query, key, value, None if kind is None else mask)
    return relative_error(actual, expected)


@torch.no_grad()
def time_attention(
    backend: str,
    heads: HeadShape,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    repeats: int,
) -> list[float]:
    """Return the seconds of ``repeats`` self-attention calls, after two calls to warm up."""
    shape = (1, tokens, *heads)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run_attention(backend, query, key, value)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[2:]


def select_fastest(times: Mapping[str, float]) -> str:
    """Return the fastest backend; "native" unless another is faster by :data:`SPEED_MARGIN`.

    Args:
        times: Backend -> seconds.
    """
    best = min(times, key=lambda name: times[name])
    native = times.get("native", math.inf)
    return best if times[best] < SPEED_MARGIN * native else "native"


def find_unmet_requirement(
    name: str, heads: HeadShape, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why a backend cannot be used, or None if no known requirement is unmet."""
    needs = REQUIREMENTS.get(name)
    if needs is None:
        return None
    if device.type != "cuda":
        return f"the attention backend {name} needs a CUDA device, and the model is on {device}"
    if needs.half_precision_only and dtype not in _HALF:
        return f"the attention backend {name} needs float16 or bfloat16, and the model is {dtype}"
    if needs.max_head_width and heads.width > needs.max_head_width:
        return (
            f"the attention backend {name} supports heads of at most width "
            f"{needs.max_head_width}, and the model has width {heads.width}"
        )
    return None
