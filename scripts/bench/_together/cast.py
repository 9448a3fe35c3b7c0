"""The concepts of the benchmark, trained by the demo's recipe, and the scenes that they play in.

Settings of rivals are chosen with other concepts (:data:`TUNING`), seeds and places than those that
the figures are measured with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from _workers import weights_of
from _worlds.storybook_concepts import KINDS

from customize.demo.experiment import NAMES, TRAINING
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.caption_grammar import BACKGROUND_PHRASES
from customize.storybook.example_concepts import ExampleConcept, bundled_concept, make_concept
from customize.training.config import TrainConfig

#: How concepts are trained: "orthogonal", or "lora" as usual.
Kind = Literal["orthogonal", "lora"]
Size = tuple[int, int]
Names = tuple[str, ...]

# Concepts that no row is scored with.
_TUNING_KINDS = {"c06": "rabbit", "c08": "fish", "c13": "rabbit", "c14": "fish"}

WIDE_BASE = assets_folder() / "storybook-wide"
SQUARE, WIDE = (64, 64), (64, 128)
_PLACES = tuple(BACKGROUND_PHRASES.values())


def story(name: str) -> ExampleConcept:
    """A concept of the demo, or one such as "c04" of `merge_identity.py`."""
    if name in NAMES:
        return bundled_concept(name)
    index = int(name[1:])
    return make_concept(name, _TUNING_KINDS.get(name) or KINDS[index], 100 + index)


def class_of(name: str) -> str:
    return story(name).identity.kind


# --- scenes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Scenes of one kind, which are scored together.

    Attributes:
        names: The concepts of each scene, from left to right.
        size: (height, width) in pixels.
        places: Phrases such as "on a beach".
        seeds: Image k of a scene has the seed 1000 * seed + k.
        has_plain: One of the two things is of the class of its concept, without the concept: the
            second thing at even places and the first one at odd ones. All concepts are attached.
    """

    names: tuple[Names, ...]
    size: Size
    places: tuple[str, ...]
    seeds: tuple[int, ...]
    has_plain: bool = False


def ordered(*sets: Names) -> tuple[Names, ...]:
    return tuple(order for names in sets for order in permutations(names))


_MIXED = ordered(
    *(("rex", "tom"), ("tom", "bolt"), ("bolt", "rex")),
    *(("c00", "c04"), ("c05", "c03"), ("c07", "c02")),
)
_SAME = ordered(("c00", "c02"), ("c01", "c05"), ("c03", "c10"), ("c04", "c11"), ("c07", "c12"))
_TRIPLES = ordered(("rex", "tom", "bolt"), ("c04", "c05", "c07"))
#: All of them.
SCORED = tuple(sorted({name for names in (*_MIXED, *_SAME, *_TRIPLES) for name in names}))
_SEEN, _SEEDS = _PLACES[2:], (1, 2, 3)

GROUPS = {
    "mixed": Group(_MIXED, SQUARE, _SEEN, _SEEDS),
    "same": Group(_SAME, SQUARE, _SEEN, _SEEDS),
    "mixed, wide": Group(_MIXED, WIDE, _SEEN, _SEEDS),
    "same, wide": Group(_SAME, WIDE, _SEEN, _SEEDS),
    "triples": Group(_TRIPLES, WIDE, _SEEN, _SEEDS),
    "beside a class": Group(_MIXED, SQUARE, _SEEN, _SEEDS, has_plain=True),
}
QUICK_GROUPS = {
    "mixed": Group(_MIXED[:1], SQUARE, _SEEN[:2], (1,)),
    "same": Group((("c00", "c02"),), SQUARE, _SEEN[:2], (1,)),
    "mixed, wide": Group(_MIXED[:1], WIDE, _SEEN[:2], (1,)),
    "triples": Group(_TRIPLES[:1], WIDE, _SEEN[:2], (1,)),
    "beside a class": Group(_MIXED[:1], SQUARE, _SEEN[:2], (1,), has_plain=True),
}
_TUNING_SEEN, _TUNING_SEEDS = _PLACES[:2], (11, 12)
TUNING_GROUPS = {
    "mixed": Group(ordered(("c06", "c08"), ("c13", "c14")), SQUARE, _TUNING_SEEN, _TUNING_SEEDS),
    "same": Group(ordered(("c06", "c13"), ("c08", "c14")), SQUARE, _TUNING_SEEN, _TUNING_SEEDS),
}


@dataclass(frozen=True)
class Scene:
    """Images of the same things in several places.

    Attributes:
        names: The concepts, from left to right.
        things: The words for each thing in the prompts: a trigger, or a class such as "a cat".
        places: Of each image, such as "on a beach".
        numbers: The seed of each image.
        size: (height, width) in pixels.
    """

    names: Names
    things: tuple[str, ...]
    places: tuple[str, ...]
    numbers: tuple[int, ...]
    size: Size

    @property
    def call(self) -> tuple[Any, ...]:
        """What a method draws by: things, prompts, numbers and size."""
        return self.things, self.prompts, self.numbers, self.size

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(self.things, place) for place in self.places]


def prompt_of(things: tuple[str, ...], place: str) -> str:
    return f"a photo of {' and '.join(things)} {place}"


def scenes(group: Group, names: Names, seed: int) -> list[Scene]:
    """The scenes of a group with these concepts: one, or two where one thing is plain."""
    triggers = tuple(story(name).trigger for name in names)
    versions = [triggers]
    if group.has_plain:
        classes = tuple(f"a {class_of(name)}" for name in names)
        versions = [(triggers[0], classes[1]), (classes[0], triggers[1])]
    result = []
    for first, things in enumerate(versions):
        chosen = range(first, len(group.places), len(versions))
        places = tuple(group.places[k] for k in chosen)
        numbers = tuple(1000 * seed + k for k in chosen)
        result.append(Scene(names, things, places, numbers, group.size))
    return result


# --- training ---------------------------------------------------------------------------------

#: The file of a concept's weights.
WEIGHTS = "pytorch_lora_weights.safetensors"
#: The files that all scores depend on, besides the scenes.
SOURCES = tuple(Path(__file__).with_name(name) for name in ("drawing.py", "scores.py"))


def recipe(steps: int | None) -> dict[str, Any]:
    """The demo's settings, or with fewer steps."""
    return TRAINING if steps is None else TRAINING | {"steps": steps, "checkpoint_every": 0}


@cache
def _digest(base: Path, steps: int | None) -> str:
    digest = hashlib.sha256(json.dumps(recipe(steps), sort_keys=True).encode())
    for path in weights_of(base):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def folder_of(folder: Path, base: Path, kind: Kind, name: str, steps: int | None = None) -> Path:
    """The folder of a trained concept; it is named by the recipe and the base."""
    return folder / _digest(base, steps) / kind / name


def learn(
    folder: Path,
    base: Path,
    kind: Kind,
    name: str,
    components: Mapping[str, Any],
    steps: int | None = None,
) -> None:
    """Train a concept as the demo does; a finished one is kept.

    Args:
        folder: Of the benchmark.
        base: The base model.
        kind: How it is trained.
        name: Of the concept.
        components: Of the base pipeline.
        steps: Training steps; None: the demo's.
    """
    from customize.training.recipe import train

    output = folder_of(folder, base, kind, name, steps)
    orthogonal = kind == "orthogonal"
    pictures = folder / "pictures" / name
    story(name).write(pictures)
    config = TrainConfig(
        base=f"assets/{base.name}" if base.parent == assets_folder() else str(base),
        images=pictures,
        output=output,
        name=name,
        class_word=class_of(name),
        # Distinct in every scene; the trained layers have room for 13.
        slice=(NAMES.index(name) if name in NAMES else int(name[1:]) % len(KINDS))
        if orthogonal
        else None,
        method=kind,
        record_inputs=orthogonal,
        **recipe(steps) | ({} if orthogonal else {"preserve": {}}),
    )
    train(config, components, progress=False)
