"""Recording the dtype casts that a layer goes through, by a small buffer that is cast with it.

A fused weight that was cast to half precision and back, as ``from_pipe`` may do it, has rounded
values; the copy of the original on the CPU has not. The weight does not show whether that happened,
since its values may be representable in half precision by chance. So a fused layer carries a buffer
of known values. ``.to``, ``.half`` and layerwise casting act on it as on the weight, and its values
afterwards show which casts the weight went through. The buffer is not persistent: no state dict
contains it.
"""

from __future__ import annotations

import functools
from itertools import chain, product

import torch
from torch import Tensor, nn

from customize.errors import PipelineError

_BUFFER = "_customize_casts_"
_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

#: The dtypes that a tensor was cast to, in order.
Casts = tuple[torch.dtype, ...]


def start_recording(layer: nn.Module, dtype: torch.dtype, parameter: str = "weight") -> None:
    """Start to record the casts of a layer's parameter.

    Args:
        layer: Layer, which gets a buffer.
        dtype: dtype of the parameter.
        parameter: Name of the parameter.
    """
    device = next(layer.parameters()).device
    layer.register_buffer(
        _BUFFER + parameter, _values(dtype).to(device, copy=True), persistent=False
    )


def stop_recording(layer: nn.Module, parameter: str = "weight") -> None:
    """Stop to record, and restore the layer's attributes."""
    layer._buffers.pop(_BUFFER + parameter, None)
    layer._non_persistent_buffers_set.discard(_BUFFER + parameter)


def get_casts(layer: nn.Module, dtype: torch.dtype, where: str, parameter: str = "weight") -> Casts:
    """Return the casts of a parameter since :func:`start_recording`.

    Args:
        layer: Layer that is recorded.
        dtype: dtype at the start.
        where: Name of the layer, for errors.
        parameter: Name of the parameter.

    Returns:
        The shortest sequence of casts that has the same effect on every value.

    Raises:
        PipelineError: The layer was replaced since, or converted in another way.
    """
    buffer = layer._buffers.get(_BUFFER + parameter)
    if buffer is not None:
        now = buffer.detach().cpu()
        if now.dtype == dtype and torch.equal(now, _values(dtype)):
            return ()
        for casts, values in _outcomes(dtype):
            if values.dtype == now.dtype and torch.equal(_bits(values), _bits(now)):
                return casts
    raise PipelineError(
        "a layer with fused concepts was replaced or converted by someone else since",
        where=where,
        fix="undo that first, or load the pipeline anew",
    )


def apply_casts(values: Tensor, casts: Casts) -> Tensor:
    """Return the values after these casts."""
    return functools.reduce(lambda tensor, dtype: tensor.to(dtype), casts, values)


@functools.cache
def _values(dtype: torch.dtype) -> Tensor:
    """Return numbers, (n,), on which different sequences of casts have different effects.

    Some are close to the middle between two numbers of a narrower dtype, where rounding twice and
    rounding once differ; others cover the range, from subnormal numbers to overflow.
    """
    generator = torch.Generator().manual_seed(0)
    digits = 1 + torch.rand(256, generator=generator, dtype=torch.float64)
    exponents = torch.linspace(-30, 20, 256, dtype=torch.float64).round()
    steps = torch.arange(8, dtype=torch.float64)
    near = [
        1 + steps * 2.0**-bits + 2.0 ** -(bits + 1) + sign * 2.0**-small
        for bits in (2, 3, 7, 10)  # of the mantissas of the narrow types
        for small in (6, 9, 12, 15, 18, 22)
        if small > bits + 1
        for sign in (-1.0, 1.0)
    ]
    # The same for a middle that only a rounding to a dtype in between reaches.
    near += [
        1
        + steps * 2.0**-bits
        + 2.0 ** -(bits + 1)
        + sign * (2.0 ** -(more + 1) + turn * 2.0**-small)
        for bits, more in ((2, 3), (2, 7), (2, 10), (3, 7), (3, 10), (7, 10))
        for small in (9, 11, 12, 14, 18, 22)
        if small > more + 1
        for sign in (-1.0, 1.0)
        for turn in (-1.0, 0.0, 1.0)
    ]
    return torch.cat([digits * 2**exponents, *near]).to(dtype)


@functools.cache
def _outcomes(dtype: torch.dtype) -> list[tuple[Casts, Tensor]]:
    """Return the distinct effects of all sequences of up to four casts, the shortest first."""
    outcomes: dict[tuple[torch.dtype, bytes], tuple[Casts, Tensor]] = {}
    sequences = (product((*_DTYPES, torch.float64), repeat=length) for length in (1, 2, 3, 4))
    for casts in chain.from_iterable(sequences):
        values = apply_casts(_values(dtype), casts)
        key = (values.dtype, _bits(values).numpy().tobytes())
        outcomes.setdefault(key, (casts, values))
    return list(outcomes.values())


def _bits(values: Tensor) -> Tensor:
    """View values as integers, so that NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])
