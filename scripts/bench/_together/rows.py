"""The rows of the benchmark: one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ROOT
from torch import Tensor

from _together import drawing
from _together.cast import GROUPS, Kind, Scene
from _together.rivals import (
    attention_regions,
    freefuse,
    lora_composite,
    lora_switch,
    lorashop,
)

# How ours are drawn -> the files of the package that decide on the images.
_TOGETHER = (
    *("core/routing.py", "pipeline/rank_channels.py"),
    *(
        f"stages/{name}.py"
        for name in (
            *("areas", "articles", "attention_maps", "concept_routing", "concept_words"),
            *("prompt_rows", "routed_attentions", "routed_call", "together"),
        )
    ),
)
_REGIONS = (
    "core/region_weights.py",
    *(f"stages/{name}.py" for name in ("areas", "multidiffusion", "prompt_rows", "regions")),
)
_PACKAGE_FILES: dict[Callable[..., Tensor], Sequence[str]] = {
    drawing.draw: (),
    drawing.draw_words: _TOGETHER,
    drawing.draw_boxes: _TOGETHER,
    drawing.draw_regions: _REGIONS,
}

Draw = Callable[..., Tensor]
DrawAlone = Callable[[Any, Mapping[str, Path], Scene], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """A way of drawing.

    Attributes:
        draw: See :mod:`_together.rivals`.
        kind: How the concepts are trained.
        merge: How they are attached.
        is_rival: Whether it draws from words alone, and is not ours.
        groups: The groups that it is scored on.
    """

    draw: Draw
    kind: Kind = "orthogonal"
    merge: str = "sum"
    is_rival: bool = False
    groups: Sequence[str] = tuple(GROUPS)

    @property
    def sources(self) -> list[Path]:
        """The files that its images depend on."""
        own = Path(inspect.getfile(self.draw))
        if own.parent.name == "rivals":
            return [own, own.parents[1] / "gates.py"]
        return [ROOT / "customize" / file for file in _PACKAGE_FILES[self.draw]]


@dataclass(frozen=True)
class AloneRow:
    """A ceiling or a floor, drawn with one concept at a time or with none."""

    draw: DrawAlone
    kind: Kind = "orthogonal"
    groups: Sequence[str] = tuple(group for group in GROUPS if group != "beside a class")
    merge: str = ""
    is_rival: bool = False
    sources: Sequence[Path] = ()


WORDS, ALONE, BASE = "ours from words, fusion", "each alone beside classes", "base model, classes"
LORA = ", ordinary LoRAs"
WORDS_LORA = "ours from words" + LORA
# Ours in other ways, and methods that do worse than a plain sum, are scored in square images only.
_WIDE, _SQUARE = ("mixed, wide", "same, wide", "triples"), ("mixed", "same")

ROWS: dict[str, Row | AloneRow] = {
    WORDS: Row(drawing.draw_words, merge="fusion"),
    "ours from words, sum": Row(drawing.draw_words, groups=_SQUARE),
    "ours in boxes, fusion": Row(drawing.draw_boxes, merge="fusion", groups=_SQUARE),
    "plain, fusion": Row(drawing.draw, merge="fusion", is_rival=True),
    "plain, sum": Row(drawing.draw, is_rival=True),
    "FreeFuse": Row(freefuse.draw, is_rival=True),
    "LoRAShop": Row(lorashop.draw, is_rival=True),
    "LoRA Composite": Row(lora_composite.draw, is_rival=True, groups=_SQUARE),
    "LoRA Switch": Row(lora_switch.draw, is_rival=True, groups=_SQUARE),
    "regions= in boxes, fusion": Row(drawing.draw_regions, merge="fusion"),
    "regions in cross-attention, fusion": Row(
        attention_regions.draw, merge="fusion", groups=_SQUARE
    ),
    ALONE: AloneRow(drawing.beside_classes),
    "each alone in its box": AloneRow(drawing.in_boxes, groups=_WIDE),
    "plain, sum" + LORA: Row(drawing.draw, "lora", is_rival=True, groups=_SQUARE),
    "FreeFuse" + LORA: Row(freefuse.draw, "lora", is_rival=True, groups=_SQUARE),
    "LoRAShop" + LORA: Row(lorashop.draw, "lora", is_rival=True, groups=_SQUARE),
    "LoRA Composite" + LORA: Row(lora_composite.draw, "lora", is_rival=True, groups=_SQUARE),
    "LoRA Switch" + LORA: Row(lora_switch.draw, "lora", is_rival=True, groups=_SQUARE),
    WORDS_LORA: Row(drawing.draw_words, "lora", groups=_SQUARE),
    ALONE + LORA: AloneRow(drawing.beside_classes, "lora", _SQUARE),
    BASE: AloneRow(drawing.no_concepts, groups=("beside a class",)),
}
