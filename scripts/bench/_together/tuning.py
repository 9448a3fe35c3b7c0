"""The choice of other methods' settings, on concepts, seeds and places of their own.

From a method's own settings, one after another is varied, and the best value is kept. The quality
is the share of concepts that are recognised in their part, which varies less than that of images in
which all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from _together import cast, drawing
from _together.rivals import freefuse, lora_composite, lora_switch, lorashop
from _together.scores import Hit, Scorer, mean_of

_BLOCKS = tuple(
    f"{block}.transformer_blocks.0"
    for block in (
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "down_blocks.1.attentions.0",
    )
)


@dataclass(frozen=True)
class Method:
    """What is tried of a method.

    Attributes:
        draw: Its function.
        start: The settings to begin with: the method's own.
        values: Setting -> the values to try, in the order of the search.
    """

    draw: Callable[..., Tensor]
    start: dict[str, Any]
    values: dict[str, Sequence[Any]]

    def call(self, pipe: Any, scene: cast.Scene, settings: dict[str, Any]) -> Tensor:
        return self.draw(pipe, *scene.call, **settings)


def _freefuse(*scene: Any, **settings: Any) -> Tensor:
    return freefuse.draw(*scene, settings=freefuse.Settings(**settings))


def _lorashop(*scene: Any, **settings: Any) -> Tensor:
    return lorashop.draw(*scene, settings=lorashop.Settings(**settings))


METHODS = {
    "FreeFuse": Method(
        _freefuse,
        {"block": _BLOCKS[0], "step": 8, "bias": 1.0, "has_loras": False, "anchors": 0.1},
        {
            "block": _BLOCKS,
            "bias": (0.0, 1.0, 2.0, 4.0),
            "step": (3, 5, 8),
            "has_loras": (False, True),
            "anchors": (0.1, 0.3),
        },
    ),
    "LoRAShop": Method(
        _lorashop,
        {"block": _BLOCKS[1], "found_at": 0.94, "act_from": 0.9, "threshold": 0.7},
        {
            "threshold": (0.7, 0.4, 0.1),
            "act_from": (0.9, 0.94, 0.8),
            "block": _BLOCKS,
            "found_at": (0.94, 0.9, 0.85),
        },
    ),
    "plain, sum": Method(drawing.draw, {}, {}),  # for comparison
    "LoRA Composite": Method(lora_composite.draw, {"strength": 1.0}, {"strength": (1.0, 1.4, 2.0)}),
    "LoRA Switch": Method(
        lora_switch.draw,
        {"turn": 2, "strength": 1.0},
        {"strength": (1.0, 1.4, 2.0), "turn": (1, 2, 3, 5)},
    ),
}


def tune(
    method: str, pipe: Any, scorer: Scorer, folders: Callable[[Sequence[str]], Sequence[Path]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each tried setting; the last one is the chosen one.

    Args:
        method: Of :data:`METHODS`.
        pipe: The pipeline, without concepts.
        scorer: The judges.
        folders: Names of concepts -> their folders.
    """
    tried: dict[tuple[Any, ...], dict[str, Any]] = {}

    def quality(settings: dict[str, Any]) -> float:
        key = tuple(settings.values())
        if key not in tried:
            row = _measure(METHODS[method], pipe, scorer, folders, settings)
            tried[key] = {"method": method, **settings, **row}
        return float(tried[key]["recognised"])

    chosen = dict(METHODS[method].start)
    quality(chosen)
    yield tried[tuple(chosen.values())]
    for name, values in METHODS[method].values.items():
        for value in values:
            is_new = tuple((chosen | {name: value}).values()) not in tried
            quality(chosen | {name: value})
            if is_new:
                yield tried[tuple((chosen | {name: value}).values())]
        chosen[name] = max(values, key=lambda value: quality(chosen | {name: value}))
    yield tried[tuple(chosen.values())] | {"chosen": "yes"}


def _measure(
    method: Method,
    pipe: Any,
    scorer: Scorer,
    folders: Callable[[Sequence[str]], Sequence[Path]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    hits: list[Hit] = []
    for title, group in cast.TUNING_GROUPS.items():
        of_group: list[Hit] = []
        for names in group.names:
            pipe.load_custom(*folders(names), merge="sum")
            for scene in (s for seed in group.seeds for s in cast.scenes(group, names, seed)):
                images = method.call(pipe, scene, settings)
                of_group += scorer.hits(scene, [images] * len(names))
            pipe.unload_custom()
        row[title] = mean_of(of_group, "all")
        hits += of_group
    parts = (mean_of(hits, part) or 0.0 for part in ("part 0", "part 1"))
    return row | {"recognised": mean(parts), "pictures": len(hits)}
