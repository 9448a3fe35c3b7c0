"""Biases and norms that concepts change: set in the model itself, and set back bit for bit.

No adapter of peft carries them, and as vectors they cost nothing beside a model. Unlike the updates
of matrices they are in the model's own parameters also with ``fuse=False``.
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

_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: (component, parameter) -> what is added to it: (weight, change) pairs.
VectorSums = Mapping[tuple[str, str], Sequence[tuple[float, VectorUpdate]]]


def sum_vectors(attached: Mapping[str, AttachedConcept], method: str) -> VectorSums:
    """What attached concepts change together: the weighted sum, of "average" the mean."""
    count = len(attached) if method == "average" else 1
    found: dict[tuple[str, str], list[tuple[float, VectorUpdate]]] = {}
    for each in attached.values():
        if not isinstance(each.concept, Lora):
            continue
        for component, own in each.concept.vector_updates.items():
            for name, vector in own.items():
                weight = layer_weight(each.weight, component, name.rpartition(".")[0]) / count
                if weight:
                    found.setdefault((component, name), []).append((weight, vector))
    return found


def check_vectors(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> None:
    """Refuse what cannot be set; nothing changes.

    Raises:
        ConceptError: a parameter is not here, or of another width.
        PipelineError: it is quantized, stored in 8 bits, or shared by two modules.
    """
    new = {place: vectors for place, vectors in sums.items() if place not in originals}
    users: dict[int, int] = {}
    for model in models.values() if new else ():
        for module in model.modules():
            for parameter in module._parameters.values():
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for place, vectors in new.items():
        where = ".".join(place)
        layer, name = _owner(models, place)
        parameter = layer._parameters.get(name)
        widths = {len(vector.values) for _, vector in vectors}
        width = _width(layer) if parameter is None else parameter.numel()
        if widths != {width} or (parameter is None and name != "bias"):
            raise ConceptError(
                f"a change of {max(widths)} numbers does not fit a parameter of {width}",
                where=where,
                fix="load the file into a pipeline of the base that it was made for",
            )
        if parameter is None:
            continue
        plain = type(parameter) is nn.Parameter and parameter.dtype in _WIDE
        if not plain or users[id(parameter)] > 1:
            why = "shared by two modules" if plain else f"held as {parameter.dtype}"
            raise PipelineError(
                f"a bias or norm that the file changes cannot be set here: it is {why}",
                where=where,
                fix="load a base that is not quantized or cast, or leave such parts out: "
                'ignore=["bias", "norm"]',
            )


@torch.no_grad()
def check_unchanged(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> dict[tuple[str, str], Tensor | None]:
    """The originals, cast as their modules were since; see :func:`customize.pipeline.fuse_weights`.

    Raises:
        PipelineError: a parameter is not what :func:`set_vectors` made it.
    """
    found: dict[tuple[str, str], Tensor | None] = {}
    for place, original in originals.items():
        layer, name = _owner(models, place)
        now = layer._parameters.get(name)
        casts: dtype_casts.Casts = ()
        if original is not None:
            casts = dtype_casts.get_casts(layer, original.dtype, ".".join(place), name)
        same = now is not None and now.dtype in (*_WIDE, torch.float8_e4m3fn, torch.float8_e5m2)
        if same:
            assert now is not None
            expected = _sum(original, sums[place]).to(now.device)
            types = [*casts, now.dtype, *([] if original is None else [original.dtype])]
            kinds = [torch.finfo(each) for each in types]
            step = max(kind.eps for kind in kinds)
            allowed = 2 * step * expected.abs() + 1e-6 * expected.abs().mean()
            allowed += 2 * max(kind.smallest_normal * kind.eps for kind in kinds)
            same = bool(((now.float() - expected).abs() <= allowed).all())
        if not same:
            raise PipelineError(
                "a bias or norm with concepts in it was changed by someone else since",
                where=".".join(place),
                fix="undo that first, or load the pipeline anew",
            )
        found[place] = None if original is None else dtype_casts.apply_casts(original, casts)
    return found


@torch.no_grad()
def set_vectors(
    models: Mapping[str, nn.Module], sums: VectorSums, originals: VectorOriginals
) -> None:
    """Make every changed parameter ``original + sum``, and every other one its original again.

    Args:
        originals: what is changed now, of :func:`check_unchanged`; None where a layer had no bias.
            Entries come and go as parameters are changed.

    Raises:
        ConfigError: a sum is too large for the parameter's type.
    """
    for place in [place for place in originals if place not in sums]:
        layer, name = _owner(models, place)
        original = originals.pop(place)
        if original is None:
            layer.register_parameter(name, None)
        else:
            layer._parameters[name].copy_(original)
            dtype_casts.stop_recording(layer, name)
    for place, vectors in sums.items():
        layer, name = _owner(models, place)
        parameter = layer._parameters[name]
        if place not in originals:
            originals[place] = (
                None if parameter is None else parameter.detach().to("cpu", copy=True)
            )
        original = originals[place]
        total = _sum(original, vectors)
        if original is None:
            like = layer.weight
            dtype = like.dtype if like.dtype in _WIDE else _computing(models[place[0]])
            made = total.to(like.device, dtype)
            layer.register_parameter(name, nn.Parameter(made, requires_grad=False))
        else:
            parameter.copy_(total.reshape(parameter.shape))
            dtype_casts.start_recording(layer, original.dtype, name)
        if not all_finite(layer._parameters[name]):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of "
                f"{layer._parameters[name].dtype}",
                where=".".join(place),
                fix="give smaller weights",
            )


def _sum(original: Tensor | None, vectors: Sequence[tuple[float, VectorUpdate]]) -> Tensor:
    """Of an original and its changes, in float32 or wider, on the CPU."""
    base = torch.zeros(()) if original is None else original.flatten()
    base = base.to(torch.promote_types(base.dtype, torch.float32))
    total = base
    for weight, vector in vectors:
        change = vector.values.to(base.dtype)
        total = total + weight * (change - base if vector.is_replacement else change)
    return total


def _owner(models: Mapping[str, nn.Module], place: tuple[str, str]) -> tuple[Any, str]:
    """The module below any adapter that has a parameter, and its name there."""
    component, path = place
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


def _width(layer: Any) -> int:
    """The outputs of a layer without a bias."""
    for name in ("out_features", "out_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.weight.numel())


def _computing(model: Any) -> torch.dtype:
    dtypes: Iterator[torch.dtype] = (p.dtype for p in model.parameters())
    return next((dtype for dtype in dtypes if dtype in _WIDE), torch.float32)
