"""Warning of outputs that are not finite, with the concept that is the likely cause.

NaN in the autoencoder's output becomes black when it is cast to an image. Every pipeline's images
go through that cast, and numpy reports it; returned tensors are checked themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customize.concepts.merge.component_weights import layer_weight
from customize.concepts.types import Lora
from customize.pipeline.state import AttachedConcept, get_state
from customize.user_warnings import warn_user

# Values of a modular pipeline's state that are outputs.
_OUTPUTS = ("images", "videos", "frames", "latents")


def check_finite_output(pipe: Any, call: Callable[[], Any]) -> Any:
    """Run a call of a pipeline; warn if its output is not finite and concepts are attached."""
    invalid: list[str] = []

    def note(kind: str, flag: int) -> None:
        invalid.append(kind)

    with np.errstate(invalid="call", call=note):
        output = call()
    if not invalid and all(map(_is_finite, _iterate_arrays(output))):
        return output
    state = get_state(pipe)
    if state is not None and state.attached:
        name, weight = _find_largest(state.attached)
        warn_user(
            f"what is drawn is not finite (NaN or infinite), which looks black: of the attached "
            f"concepts {name} changes the model most, with weight {weight:g}. If the base alone "
            "draws well, give it a smaller weight, or load the pipeline in bfloat16 or float32"
        )
    return output


def _find_largest(attached: Mapping[str, AttachedConcept]) -> tuple[str, Any]:
    """Return name and weight of the concept with the largest weighted update of a layer."""

    def measure(item: AttachedConcept) -> float:
        norms = [
            abs(layer_weight(item.weight, component, module) * update.scale)
            * float(update.up.double().norm() * update.down.double().norm())
            for component, updates in item.concept.updates.items()
            for module, update in updates.items()
        ]
        vector_updates = item.concept.vector_updates if isinstance(item.concept, Lora) else {}
        norms += [
            abs(layer_weight(item.weight, component, name.rpartition(".")[0]))
            * float(vector.values.double().norm())
            for component, vectors in vector_updates.items()
            for name, vector in vectors.items()
        ]
        return max(norms, default=0.0)

    name, largest = max(attached.items(), key=lambda pair: measure(pair[1]))
    return name, largest.weight


def _iterate_arrays(output: Any) -> Iterator[Any]:
    """Iterate over the tensors and arrays of a call's output."""
    values = getattr(output, "values", None)
    if isinstance(output, Tensor | np.ndarray):
        yield output
    elif isinstance(values, dict):  # the state of a modular pipeline
        for key in _OUTPUTS:
            yield from _iterate_arrays(values.get(key))
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _iterate_arrays(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _iterate_arrays(value)


def _is_finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    return not np.issubdtype(values.dtype, np.floating) or bool(np.isfinite(values).all())
