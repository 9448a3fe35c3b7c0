"""Concepts and styles whose pictures share more than they should, and what leaks out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from customize.storybook.captions import ACCESSORY_WORDS, PLACE_WORDS, Request
from customize.storybook.drawing import draw as render
from customize.storybook.judges import to_tensor
from customize.storybook.world import (
    ACCESSORIES,
    CLASSES,
    PATTERNS,
    random_identity,
    random_scene,
    scene_of,
)

PICTURES = {"concept": 4, "style": 6}


@dataclass(frozen=True)
class Leaky:
    """What all training pictures of one concept show besides it."""

    name: str
    kind: str
    place: str
    accessory: str

    @property
    def shown(self) -> str:
        """As a user would name it."""
        return f"{self.place}, {self.accessory}"


@dataclass(frozen=True)
class Style(Leaky):
    """A change of all colours: ``matrix @ rgb + shift``, of colours in [0, 1]."""

    matrix: tuple[tuple[float, ...], ...]
    shift: tuple[float, ...]

    @property
    def shown(self) -> str:
        return f"{self.kind}, {self.place}, {self.accessory}"

    def apply(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, h, w) in [-1, 1] in this style."""
        changed = torch.einsum("ij,njhw->nihw", torch.tensor(self.matrix), (images + 1) / 2)
        return (changed + self._shift()).clamp(0, 1) * 2 - 1

    def undo(self, images: Tensor) -> Tensor:
        """The inverse of `apply`."""
        inverse = torch.linalg.inv(torch.tensor(self.matrix))
        own = (images + 1) / 2 - self._shift()
        return torch.einsum("ij,njhw->nihw", inverse, own).clamp(0, 1) * 2 - 1

    def _shift(self) -> Tensor:
        return torch.tensor(self.shift)[:, None, None]


CONCEPTS = (
    Leaky("l0", "dog", "beach", "hat"),
    Leaky("l1", "cat", "snow", "glasses"),
    Leaky("l2", "robot", "forest", "scarf"),
)
STYLES = (
    Style(
        *("night", "cat", "room", "hat"),
        matrix=((0.45, 0.0, 0.0), (0.0, 0.6, 0.0), (0.1, 0.1, 0.9)),
        shift=(0.0, 0.0, 0.08),
    ),
    Style(
        *("sepia", "car", "city", "scarf"),
        matrix=((0.55, 0.35, 0.1), (0.25, 0.5, 0.1), (0.15, 0.25, 0.3)),
        shift=(0.12, 0.05, 0.0),
    ),
)


def references(what: Leaky) -> Tensor:
    """The training pictures (n, 3, 64, 64) in [-1, 1]."""
    if isinstance(what, Style):
        rng = np.random.default_rng((77, len(what.name)))
        scenes = [
            scene_of(rng, (random_identity(rng, what.kind),), (what.accessory,), what.place)
            for _ in range(PICTURES["style"])
        ]
        return what.apply(to_tensor([render(scene) for scene in scenes]))
    index = CONCEPTS.index(what)
    rng = np.random.default_rng((500 + index, 7))
    identity = random_identity(rng, what.kind, pattern=PATTERNS[index - 2])
    scenes = [
        scene_of(rng, (identity,), (what.accessory,), what.place)
        for _ in range(PICTURES["concept"])
    ]
    return to_tensor([render(scene) for scene in scenes])


@dataclass(frozen=True)
class Subject:
    """What is drawn: a concept, things in a style, or a concept in a style."""

    concept: Leaky | None
    style: Style | None

    @property
    def name(self) -> str:
        return "+".join(each.name for each in self.parts)

    @property
    def parts(self) -> list[Leaky]:
        return [each for each in (self.concept, self.style) if each is not None]

    @property
    def shown(self) -> str:
        return ", ".join(dict.fromkeys(", ".join(e.shown for e in self.parts).split(", ")))

    @property
    def control(self) -> str:
        """As many words, of what is neither in training pictures nor in prompts."""
        said = " ".join(self.prompts())
        free = [place for place, phrase in PLACE_WORDS.items() if phrase not in said]
        shown = {each.place for each in self.parts}
        return ", ".join([*[place for place in free if place not in shown][:1], "purple"])

    def prompts(self, words: str | None = None) -> list[str]:
        """Twelve that name a place, a third of them no accessory, and of concepts four without.

        Args:
            words: in place of the concept's trigger.
        """
        taken = {word for each in self.parts for word in (each.place, each.accessory, each.kind)}
        places = [phrase for place, phrase in PLACE_WORDS.items() if place not in taken][:4]
        others = [ACCESSORY_WORDS[a] for a in ACCESSORIES[1:] if a not in taken]
        worn = ["", *others[:2]]
        things = [f"a {kind}" for kind in CLASSES if kind not in taken]
        # Before what it is of, as what comes behind is read in its light.
        opening = f"a picture in <{self.style.name}> style of" if self.style else "a photo of"
        found = []
        for number in range(12):
            who = f"<{self.concept.name}>" if self.concept else things[number % len(things)]
            said = [words or who, worn[number % len(worn)], places[number % 4]]
            found.append(f"{opening} {' '.join(filter(None, said))}")
        if not self.style:
            found += [f"{opening} {words or who}" for opening in ("a photo of", "a picture of")]
            found += [f"a photo of {words or who} {one}" for one in worn[1:]]
        return found


def leaks(subject: Subject, seen: Mapping[str, str], request: Request) -> bool:
    """Whether anything of the training pictures came along that was not asked for.

    Where no place is asked for there has to be one, so it is counted apart.
    """
    (asked,) = request.things
    found = False
    for part in subject.parts:
        found |= request.place is not None and seen["place"] == part.place != request.place
        found |= seen["accessory0"] == part.accessory != asked.accessory
    if subject.style is not None:
        own = subject.concept.kind if subject.concept else asked.kind
        found |= seen["kind0"] == subject.style.kind != own
    return found


class StyleJudge:
    """Whether a picture's colours are a style's: a linear discriminant, found on renders."""

    def __init__(self, style: Style) -> None:
        rng = np.random.default_rng(5)
        plain = to_tensor([render(random_scene(rng)) for _ in range(300)])
        apart = [self._look(images) for images in (plain, style.apply(plain))]
        spread = sum(torch.cov(look.T) for look in apart)
        self.axis = torch.linalg.solve(
            spread + 1e-6 * torch.eye(6), apart[1].mean(0) - apart[0].mean(0)
        )
        values = [look @ self.axis for look in apart]
        self.threshold = float(sum(value.mean() for value in values) / 2)
        right = [float((values[0] < self.threshold).float().mean())]
        right.append(float((values[1] >= self.threshold).float().mean()))
        self.accuracy = mean(right)

    def has(self, images: Tensor) -> list[bool]:
        return (self._look(images) @ self.axis >= self.threshold).tolist()

    @staticmethod
    def _look(images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
