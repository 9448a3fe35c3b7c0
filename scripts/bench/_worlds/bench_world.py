"""The worlds that concepts of the benchmarks are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from customize.evaluation.storybook_rates import Rates
from customize.stickers.judges import load_sticker_judges
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.judges import load_judges

from . import sticker_concepts, storybook_concepts


class BenchConcept(Protocol):
    """A concept of a world: five pictures that are drawn by code."""

    @property
    def name(self) -> str: ...
    @property
    def trigger(self) -> str: ...
    @property
    def class_word(self) -> str: ...
    def write(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class BenchWorld:
    """What a benchmark needs of a world.

    Attributes:
        base: The bundled base.
        judges: The bundled judges.
        concept: Number, from 0 to 12 -> concept. 0 and 2, 1 and 5, and 3 and 10 are of one class.
        load_judges: Folder -> judges.
        rate: (pipeline with the concept, judges, concept, seed, number of scenes) -> scores of
            drawn images.
        training: Settings of trainings besides the demo's.
        sources: The files that scores depend on.
    """

    base: Path
    judges: Path
    concept: Callable[[int], BenchConcept]
    load_judges: Callable[[Path], Any]
    rate: Callable[[Any, Any, Any, int, int], Rates]
    training: dict[str, Any]
    sources: Sequence[Path]


_FILES = Path(__file__).parent

WORLDS = {
    "storybook": BenchWorld(
        assets_folder() / "storybook",
        assets_folder() / "judges",
        storybook_concepts.concept,
        load_judges,
        storybook_concepts.rate,
        {},
        [storybook_concepts.RATES_FILE],
    ),
    "stickers": BenchWorld(
        assets_folder() / "stickers",
        assets_folder() / "stickers" / "judges",
        sticker_concepts.concept,
        load_sticker_judges,
        sticker_concepts.rate,
        {"caption": "a sticker of {}"},
        [storybook_concepts.RATES_FILE, _FILES / "sticker_concepts.py"],
    ),
}
