"""The tensors of one layer in an adapter file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TensorGroup:
    """All tensors of one layer, as the file names it.

    Attributes:
        path: The common start of the keys, which names the layer.
        parts: Part, such as "down" or "alpha" -> tensor.
        keys: Part -> the whole key.
    """

    path: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = (f"{part} {tuple(tensor.shape)}" for part, tensor in self.parts.items())
        return f"TensorGroup({self.path}: {', '.join(shapes)})"


def join_names(names: Iterable[str], most: int = 10) -> str:
    """Join sorted names with commas, with a count in place of those beyond ``most``."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
