"""Attention by one backend: what it needs, how far off it is, how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from customize.families.family import MaskKind

#: The largest error that a backend may have: of the worst query, over the root mean square.
#: A few roundings; a mask, a scale or a key that is left out costs far more.
ERROR_BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
#: The same for backends that quantize queries and keys to 8 bits on purpose. "auto" takes none.
QUANTIZED_BOUND = 0.1
QUANTIZED_PREFIX = "sage"

#: How much faster than torch's own another must be to be taken: less is noise.
SPEED_MARGIN = 0.95

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Requirements:
    """What a backend needs, where that is known without trying it.

    Attributes:
        package: what pip installs; empty for what torch has.
        half: whether it takes float16 and bfloat16 alone.
        width: the greatest width of a head; 0 for any.
    """

    package: str = ""
    half_precision_only: bool = True
    width: int = 256


#: Backends that need a CUDA device. Of those that are not here, trying tells.
REQUIREMENTS = {
    "xformers": Requirements("xformers", half_precision_only=False, width=0),
    "flash": Requirements("flash-attn"),
    "flash_varlen": Requirements("flash-attn"),
    "_flash_3": Requirements("flash-attn-3, built from the source of flash-attn"),
    "_flash_varlen_3": Requirements("flash-attn-3, built from the source of flash-attn"),
    "sage": Requirements("sageattention", width=128),
    "sage_varlen": Requirements("sageattention", width=128),
    "_native_cudnn": Requirements(),
}


class HeadShape(NamedTuple):
    """The shape of one attention: how many heads, and how wide each is."""

    number: int
    width: int


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(width)) v, in float64 on the CPU.

    Args:
        query, key, value: (batch, tokens, heads, width), the dispatcher's order.
        mask: (batch, 1, 1, keys), True for keys that count.

    Returns:
        (batch, queries, heads, width).
    """
    q, k, v = (each.cpu().double().transpose(1, 2) for each in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.cpu(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The greatest error of any query and head, over the root mean square of what was expected.

    Args:
        found, expected: (batch, queries, heads, width).
    """
    off = (found.cpu().double() - expected).square().mean(-1).sqrt().amax()
    worst = float(off / expected.square().mean().sqrt())
    return worst if math.isfinite(worst) else math.inf


def run_attention(
    backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """One attention by one backend; arguments as :func:`reference_attention` takes them.

    Raises:
        RuntimeError: the backend's package is missing; and whatever the backend raises.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        attention_backend,
        dispatch_attention_fn,
    )

    with attention_backend(backend):  # it asks whether the package is there
        name = AttentionBackendName(backend)
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=name)


@torch.no_grad()
def measure_error(
    backend: str, heads: HeadShape, device: torch.device, dtype: torch.dtype, kind: MaskKind | None
) -> float:
    """The error of one call with these heads: 96 queries, 77 keys, a batch of two.

    Args:
        kind: how the last 13 keys of the second are masked, as a shorter prompt's are.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, tokens, *heads, generator=generator).to(dtype) for tokens in (96, 77, 77)
    )
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
    mask[1, ..., -13:] = False
    given: dict[MaskKind | None, Tensor | None] = {
        None: None,
        "boolean": mask,
        # As LTX-2 has it, one for each head.
        "added": ((~mask).to(dtype) * -10000.0).expand(-1, heads.number, -1, -1),
    }
    there = None if (chosen := given[kind]) is None else chosen.to(device)
    found = run_attention(backend, query.to(device), key.to(device), value.to(device), there)
    return relative_error(
        found, reference_attention(query, key, value, None if kind is None else mask)
    )


@torch.no_grad()
def time_attention(
    backend: str,
    heads: HeadShape,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    repeats: int,
) -> list[float]:
    """How long a self-attention of one sequence takes, ``repeats`` times after two that warm up."""
    shape = (1, tokens, *heads)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run_attention(backend, query, key, value)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return taken[2:]


def select_fastest(times: Mapping[str, float]) -> str:
    """The fastest backend; torch's own unless another is faster by :data:`SPEED_MARGIN`."""
    best = min(times, key=lambda name: times[name])
    own = times.get("native", math.inf)
    return best if times[best] < SPEED_MARGIN * own else "native"


def find_unmet_requirement(
    name: str, heads: HeadShape, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a backend cannot be used, as far as that is known without trying; None if it may be."""
    needs = REQUIREMENTS.get(name)
    if needs is None:
        return None
    if device.type != "cuda":
        return f"the attention backend {name} needs a CUDA device, and the model is on {device}"
    if needs.half_precision_only and dtype not in _HALF:
        return f"the attention backend {name} needs float16 or bfloat16, and the model is {dtype}"
    if needs.width and heads.width > needs.width:
        return (
            f"the attention backend {name} takes heads of at most {needs.width} numbers, and "
            f"these have {heads.width}"
        )
    return None
