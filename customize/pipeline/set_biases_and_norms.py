"""Biases and norms that concepts change: set in the model itself, and restored bit for bit.

No peft adapter carries them, and as vectors they are small beside a model. Unlike updates of
matrices they are in the model's own parameters with ``fuse=False`` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from customize.concepts.base_weight import base_layer
from customize.concepts.merge.component_weights import layer_weight
from customize.concepts.types import Lora, VectorUpdate
from customize.core.lowrank import all_finite
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.pipeline import dtype_casts
from customize.pipeline.state import AttachedConcept, VectorOriginals

_WIDE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NARROW_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

#: (component, parameter name) -> (weight, update) pairs whose sum is added to the parameter.
VectorSums = Mapping[tuple[str, str], Sequence[tuple[float, VectorUpdate]]]


def sum_vectors(attached: Mapping[str, AttachedConcept], method: str) -> VectorSums:
    """Return what attached concepts add to biases and norms: their weighted sum.

    Args:
        attached: Concept name -> concept.
        method: Merge method; "average" divides the sum by the number of concepts.
    """
    count = len(attached) if method == "average" else 1
    sums: dict[tuple[str, str], list[tuple[float, VectorUpdate]]] = {}
    for item in attached.values():
        if not isinstance(item.concept, Lora):
            continue
        for component, vectors in item.concept.vector_updates.items():
            for name, vector in vectors.items():
                weight = layer_weight(item.weight, component, name.rpartition(".")[0]) / count
                if weight:
                    sums.setdefault((component, name), []).append((weight, vector))
    return sums


def check_vectors(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> None:
    """Refuse parameters that cannot be set; nothing changes.

    Args:
        models: component -> model.
        sums: Sums to be added to the parameters.
        originals: Parameters that are set already are not checked again.

    Raises:
        ConceptError: A parameter does not exist, or has another width.
        PipelineError: A parameter is quantized, stored in 8 bits, or shared by two modules.
    """
    new = {key: vectors for key, vectors in sums.items() if key not in originals}
    users: dict[int, int] = {}
    for model in models.values() if new else ():
        for module in model.modules():
            for parameter in module._parameters.values():
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for key, vectors in new.items():
        where = ".".join(key)
        layer, name = _find_owner(models, key)
        parameter = layer._parameters.get(name)
        widths = {len(vector.values) for _, vector in vectors}
        width = _output_width(layer) if parameter is None else parameter.numel()
        if widths != {width} or (parameter is None and name != "bias"):
            raise ConceptError(
                f"a change of {max(widths)} numbers does not fit a parameter of {width}",
                where=where,
                fix="load the file into a pipeline of the base that it was made for",
            )
        if parameter is None:
            continue
        is_plain = type(parameter) is nn.Parameter and parameter.dtype in _WIDE_DTYPES
        if not is_plain or users[id(parameter)] > 1:
            reason = "shared by two modules" if is_plain else f"held as {parameter.dtype}"
            raise PipelineError(
                f"a bias or norm that the file changes cannot be set here: it is {reason}",
                where=where,
                fix="load a base that is not quantized or cast, or leave such parts out: "
                'ignore=["bias", "norm"]',
            )


@torch.no_grad()
def check_set_vectors(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> VectorOriginals:
    """Refuse if a parameter is not what :func:`set_vectors` set it to.

    Args:
        models: component -> model.
        sums: Sums that are in the parameters at present.
        originals: Parameters before they were set.

    Returns:
        The originals, with the casts that their modules went through
        (:func:`customize.pipeline.fuse_weights.check_fused_weights`).

    Raises:
        PipelineError: Names the first such parameter.
    """
    cast_originals: VectorOriginals = {}
    for key, original in originals.items():
        layer, name = _find_owner(models, key)
        parameter = layer._parameters.get(name)
        casts: dtype_casts.Casts = ()
        if original is not None:
            casts = dtype_casts.get_casts(layer, original.dtype, ".".join(key), name)
        is_unchanged = False
        if parameter is not None and parameter.dtype in (*_WIDE_DTYPES, *_NARROW_DTYPES):
            expected = _add(original, sums[key]).to(parameter.device)
            dtypes = [*casts, parameter.dtype, *([] if original is None else [original.dtype])]
            kinds = [torch.finfo(dtype) for dtype in dtypes]
            step = max(kind.eps for kind in kinds)
            tolerance = 2 * step * expected.abs() + 1e-6 * expected.abs().mean()
            tolerance += 2 * max(kind.smallest_normal * kind.eps for kind in kinds)
            is_unchanged = bool(((parameter.float() - expected).abs() <= tolerance).all())
        if not is_unchanged:
            raise PipelineError(
                "a bias or norm with concepts in it was changed by someone else since",
                where=".".join(key),
                fix="undo that first, or load the pipeline anew",
            )
        cast_originals[key] = None if original is None else dtype_casts.apply_casts(original, casts)
    return cast_originals


@torch.no_grad()
def set_vectors(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> None:
    """Set every changed parameter to ``original + sum``, and every other one to its original.

    Args:
        models: component -> model.
        sums: Sums to be added to the parameters.
        originals: Result of :func:`check_set_vectors`; changed along with the parameters.

    Raises:
        ConfigError: A sum leaves the range of the parameter's dtype.
    """
    for key in [key for key in originals if key not in sums]:
        layer, name = _find_owner(models, key)
        original = originals.pop(key)
        if original is None:
            layer.register_parameter(name, None)
        else:
            layer._parameters[name].copy_(original)
            dtype_casts.stop_recording(layer, name)
    for key, vectors in sums.items():
        layer, name = _find_owner(models, key)
        parameter = layer._parameters[name]
        if key not in originals:
            originals[key] = None if parameter is None else parameter.detach().to("cpu", copy=True)
        original = originals[key]
        total = _add(original, vectors)
        if original is None:
            weight = layer.weight
            dtype = weight.dtype
            if dtype not in _WIDE_DTYPES:
                dtype = _compute_dtype(models[key[0]])
            bias = nn.Parameter(total.to(weight.device, dtype), requires_grad=False)
            layer.register_parameter(name, bias)
        else:
            parameter.copy_(total.reshape(parameter.shape))
            dtype_casts.start_recording(layer, original.dtype, name)
        if not all_finite(layer._parameters[name]):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of "
                f"{layer._parameters[name].dtype}",
                where=".".join(key),
                fix="give smaller weights",
            )


def _add(original: Tensor | None, vectors: Sequence[tuple[float, VectorUpdate]]) -> Tensor:
    """Return the sum of an original and its updates, (n,), float32 or wider, on the CPU."""
    base = torch.zeros(()) if original is None else original.flatten()
    base = base.to(torch.promote_types(base.dtype, torch.float32))
    total = base
    for weight, vector in vectors:
        values = vector.values.to(base.dtype)
        total = total + weight * (values - base if vector.is_replacement else values)
    return total


def _find_owner(models: Mapping[str, nn.Module], key: tuple[str, str]) -> tuple[Any, str]:
    """Return the module of a parameter, inside any adapter, and the parameter's name in it."""
    component, path = key
    module, _, name = path.rpartition(".")
    if component not in models:
        raise ConceptError(
            f"the model has no {component} whose biases or norms could be changed",
            fix="use a pipeline with all its parts",
        )
    try:
        return base_layer(models[component].get_submodule(module)), name
    except AttributeError as error:
        raise ConceptError(
            f"the model has no {path}",
            where=component,
            fix="load the file into a pipeline of the base that it was made for",
        ) from error


def _output_width(layer: Any) -> int:
    """Return the number of outputs of a layer without a bias."""
    for name in ("out_features", "out_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.weight.numel())


def _compute_dtype(model: Any) -> torch.dtype:
    dtypes: Iterator[torch.dtype] = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype in _WIDE_DTYPES), torch.float32)
