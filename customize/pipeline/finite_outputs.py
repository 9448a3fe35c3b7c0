"""Telling that pictures are not finite, and which concept is the likely reason.

NaN in what the autoencoder gives becomes black when it is made a picture. That cast is the one
place that every pipeline's pictures go through, and numpy reports it; tensors are looked at
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customize.concepts.merge.component_weights import layer_weight
from customize.concepts.types import Lora
from customize.pipeline.sources import get_family
from customize.pipeline.state import AttachedConcept, get_state
from customize.pipeline.user_warnings import warn_user

# What of a modular pipeline's state is drawn.
_DRAWN = ("images", "videos", "frames", "latents")


def check_finite_output(pipe: Any, call: Callable[[], Any]) -> Any:
    """What a call of the pipeline gives; warns where it is not finite and concepts are attached."""
    invalid: list[str] = []

    def note(kind: str, flag: int) -> None:
        invalid.append(kind)

    with np.errstate(invalid="call", call=note):
        found = call()
    if not invalid and all(map(_is_finite, _arrays(found))):
        return found
    attached = get_state(get_family(pipe)).attached
    if attached:
        name, weight = _loudest(attached)
        warn_user(
            f"what is drawn is not finite (NaN or infinite), which looks black: of the attached "
            f"concepts {name} changes the model most, with weight {weight:g}. If the base alone "
            "draws well, give it a smaller weight, or load the pipeline in bfloat16 or float32"
        )
    return found


def _loudest(attached: Mapping[str, AttachedConcept]) -> tuple[str, Any]:
    """The concept with the largest weighted update of a layer, and its weight."""

    def size(each: AttachedConcept) -> float:
        sizes = [
            abs(layer_weight(each.weight, component, module) * update.scale)
            * float(update.up.double().norm() * update.down.double().norm())
            for component, own in each.concept.updates.items()
            for module, update in own.items()
        ]
        vectors = each.concept.vector_updates if isinstance(each.concept, Lora) else {}
        sizes += [
            abs(layer_weight(each.weight, component, name.rpartition(".")[0]))
            * float(vector.values.double().norm())
            for component, changes in vectors.items()
            for name, vector in changes.items()
        ]
        return max(sizes, default=0.0)

    name, found = max(attached.items(), key=lambda pair: size(pair[1]))
    return name, found.weight


def _arrays(found: Any) -> Iterator[Any]:
    """The tensors and arrays of what a call gave."""
    values = getattr(found, "values", None)
    if isinstance(found, Tensor | np.ndarray):
        yield found
    elif isinstance(values, dict):  # the state of a modular pipeline
        for key in _DRAWN:
            yield from _arrays(values.get(key))
    elif isinstance(found, Mapping):
        for each in found.values():
            yield from _arrays(each)
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _arrays(each)


def _is_finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    return not np.issubdtype(values.dtype, np.floating) or bool(np.isfinite(values).all())
