"""The declaration of a format of weight updates: its keys, and how to decode them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from torch import Tensor

from customize.concepts.formats.peft_config import Config
from customize.concepts.formats.tensor_group import TensorGroup
from customize.core.lowrank import LowRank
from customize.errors import ConceptError

#: The rank that the tensors show, or None if they show none -> factor of the update.
Scale = Callable[[int | None], float]
#: Part -> shape of its tensor.
Shapes = Mapping[str, tuple[int, ...]]

_PART_NAMES = {"down": "down-projection", "up": "up-projection", "mid": "core"}


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """The tensors of one layer, and the facts that decoding may depend on.

    Attributes:
        group: The tensors as the file stores them, with their keys.
        parts: Part -> tensor, without alpha: finite, of float32, float16 or bfloat16.
        alpha: The layer's own alpha; None if the file stores none with the layer.
        scale: Rank -> factor, from the layer's alpha or from the file's configuration.
        weight: Returns the base weight without adapters, float32, (out, in) or (out, in, *kernel).
        config: The peft configuration; empty if there is none.
        decode: Decodes other tensors of the same layer, for formats that modify an update.
    """

    group: TensorGroup
    parts: Mapping[str, Tensor]
    alpha: float | None
    scale: Scale
    weight: Callable[[], Tensor]
    config: Config
    decode: Callable[[LayerTensors], LowRank]

    def without(self, parts: AbstractSet[str]) -> LayerTensors:
        """The same without some parts."""
        others = {part: tensor for part, tensor in self.parts.items() if part not in parts}
        return replace(self, parts=others)

    def check_parts(
        self, required: AbstractSet[str], optional: AbstractSet[str] = frozenset()
    ) -> None:
        """Check that all required parts exist, and no others but the optional ones.

        Raises:
            ConceptError: Naming the missing or superfluous parts.
        """
        missing = required - self.parts.keys()
        if missing:
            raise ConceptError(
                f"the layer has {_join_parts(self.group.parts)} and no {_join_parts(missing)}"
            )
        superfluous = self.parts.keys() - required - optional
        if superfluous:
            raise ConceptError(
                f"the layer has {_join_parts(superfluous)} beside {_join_parts(required)}"
            )


def _show_no_shape(shapes: Shapes) -> tuple[int | None, int | None]:
    return None, None


@dataclass(frozen=True, eq=False)
class UpdateFormat:
    """A format of weight updates.

    Attributes:
        name: The name of the method, such as "LoHa".
        key_suffixes: Part -> suffixes of the keys that store it; ``*`` stands for the name of a
            peft adapter. Parts are Python identifiers; no two formats may share a suffix.
        matches: Whether a layer with these parts is of this format.
        decode: Decodes a layer to its update, exact but for one rounding to float32. It must
            refuse parts that it does not use, with :meth:`LayerTensors.check_parts`.
        shape: (out, in) of the update, as far as the tensors with at least two dimensions show it;
            None for a side that they do not show.
        rank_parts: Parts whose first dimension is the rank that alpha is divided by; the first that
            exists counts.
        vector_parts: Parts that may have a single dimension.
        scalar_parts: Parts that may be numbers, of any dtype.
        needs_base_weight: Whether the update depends on the weight that it changes.
    """

    name: str
    key_suffixes: Mapping[str, tuple[str, ...]]
    matches: Callable[[AbstractSet[str]], bool]
    decode: Callable[[LayerTensors], LowRank]
    shape: Callable[[Shapes], tuple[int | None, int | None]] = _show_no_shape
    rank_parts: tuple[str, ...] = ()
    vector_parts: frozenset[str] = field(default=frozenset())
    scalar_parts: frozenset[str] = field(default=frozenset())
    needs_base_weight: bool = False


def scale_update(update: LowRank, factor: float) -> LowRank:
    """Multiply the scale of an update."""
    return LowRank(update.up, update.down, update.scale * factor)


def _join_parts(parts: AbstractSet[str] | Mapping[str, Tensor]) -> str:
    return " and ".join(_PART_NAMES.get(part, part) for part in sorted(parts))
