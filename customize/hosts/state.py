"""What is attached to a pipeline: kept by its denoiser, shown as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from customize.concepts.adapter import Adapter
from customize.concepts.concept import Concept
from customize.families import Family
from customize.hosts.fusing import Originals

_KEY = "_customize"


@dataclass(frozen=True, eq=False)
class Attached:
    """One attached concept.

    Attributes:
        weight: its factor in the weighted sum.
        fused: whether it is in the base weights, and not in the adapter.
    """

    concept: Concept
    weight: float
    fused: bool

    @property
    def name(self) -> str:
        return self.concept.info.name


@dataclass(eq=False)
class Holder:
    """All that must be known to change or undo what was done to the models.

    Attributes:
        attached: concept name -> concept, in the order of loading.
        adapters: what sits beside the base weights, one for each model.
        originals: of the fused weights.
        tokens: (token dictionary's key, trigger) -> all its entries, as they were added.
        hooks: handles of what serves tokens with an embedding for each layer.
    """

    attached: dict[str, Attached] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list)
    originals: Originals = field(default_factory=dict)
    tokens: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)


def find(family: Family) -> Holder:
    """The holder of a model; a new, empty one where nothing is attached.

    It lives with the denoiser and not with the pipeline, because pipelines made from the same
    components share the denoiser, and so what is attached to it.
    """
    return vars(family.denoiser).get(_KEY) or Holder()


def keep(family: Family, holder: Holder) -> None:
    """Leave the holder with the denoiser, or take it away where nothing is attached any more."""
    if holder.attached:
        setattr(family.denoiser, _KEY, holder)
    else:
        vars(family.denoiser).pop(_KEY, None)


@dataclass(frozen=True)
class Row:
    """One line of :class:`Customization`."""

    name: str
    trigger: str
    class_word: str
    weight: float
    rank: int
    slices: str
    mode: str


@dataclass(frozen=True, repr=False)
class Customization:
    """What is attached to a pipeline, at the time of asking.

    Attributes:
        rows: one for each concept, in the order of loading.
        place: family, and device and dtype of the denoiser.
    """

    rows: tuple[Row, ...]
    place: str

    def __repr__(self) -> str:
        if not self.rows:
            return "no concepts attached"
        titles = ("name", "trigger", "class", "weight", "rank", "slices", "mode")
        lines = [titles]
        for row in self.rows:
            numbers = (f"{row.weight:g}", str(row.rank))
            lines.append((row.name, row.trigger, row.class_word, *numbers, row.slices, row.mode))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        count = f"{len(self.rows)} concept" + ("s" if len(self.rows) > 1 else "")
        return "\n".join([f"{count} on {self.place}", texts[0], rule, *texts[1:]])
