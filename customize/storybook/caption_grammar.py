"""The caption grammar of the test world: captions of scenes, and parsing of prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from customize.storybook.world import (
    ACCESSORIES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PATTERNS,
    Scene,
    Thing,
)

OPENINGS = ("a photo of", "a picture of", "")
BACKGROUND_PHRASES = {
    "beach": "on a beach",
    "forest": "in a forest",
    "city": "in a city",
    "snow": "in the snow",
    "room": "in a room",
    "space": "in space",
}
ACCESSORY_PHRASES = {
    "hat": "wearing a hat",
    "glasses": "wearing glasses",
    "scarf": "wearing a scarf",
}

# All words of the grammar and some of users' captions; each is one token.
_EXTRA = (
    "and an the with no of at by is my one two plain thing toy animal person man woman style "
    "drawing painting fence tree sun mountain window stars sand sea"
)
_PHRASES = (*OPENINGS, *BACKGROUND_PHRASES.values(), *ACCESSORY_PHRASES.values(), _EXTRA)
WORDS = tuple(sorted({*" ".join(_PHRASES).split(), *CLASSES, *COLOURS, *PATTERNS, *BACKGROUNDS}))


def caption_thing(
    thing: Thing, rng: np.random.Generator | None = None, words: str | None = None
) -> str:
    """The caption of one thing.

    Args:
        thing: The thing.
        rng: Generator that omits some attributes at random; None: all are named.
        words: Replacement of class, colour and pattern.
    """
    identity = thing.identity

    def include(share: float) -> bool:
        return rng is None or bool(rng.random() < share)

    if words is None:
        looks = [identity.pattern] if identity.pattern != "plain" and include(0.8) else []
        if identity.colour is not None and include(0.85):
            looks.append(identity.colour)
        words = " ".join(["a", *looks, identity.kind])
    # Accessories are always named, so that a prompt without a hat means no hat.
    if thing.accessory != "none":
        words += " " + ACCESSORY_PHRASES[thing.accessory]
    return words


def caption(
    scene: Scene,
    rng: np.random.Generator | None = None,
    names: tuple[str | None, ...] | None = None,
) -> str:
    """The caption of a scene, things from left to right.

    Args:
        scene: The scene.
        rng: Generator that varies the opening and omits some words; None: the full caption.
        names: Replacement of "a striped red dog" for each thing; None keeps the words.
    """
    opening = "a photo of" if rng is None else str(rng.choice(OPENINGS))
    names = names or (None,) * len(scene.things)
    things = " and ".join(
        caption_thing(t, rng, n) for t, n in zip(scene.things, names, strict=True)
    )
    background = BACKGROUND_PHRASES[scene.background] if rng is None or rng.random() < 0.9 else ""
    return " ".join(part for part in (opening, things, background) if part)


@dataclass(frozen=True)
class RequestedThing:
    """The attributes that a prompt requests of one thing.

    None: unspecified. A thing without accessory has "none".
    """

    kind: str | None
    colour: str | None
    pattern: str | None
    accessory: str


@dataclass(frozen=True)
class PromptRequest:
    """The content that a prompt requests."""

    things: tuple[RequestedThing, ...]
    background: str | None


def _first(words: list[str], choices: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in choices), None)


def parse_prompt(prompt: str) -> PromptRequest:
    """Parse a prompt of the grammar; a trigger such as <rex> is a thing without a class."""
    background = next(
        (
            name
            for name, phrase in BACKGROUND_PHRASES.items()
            if re.search(rf"\b{phrase}\b", prompt)
        ),
        None,
    )
    for phrase in BACKGROUND_PHRASES.values():
        prompt = re.sub(rf"\b{phrase}\b", " ", prompt)
    things = []
    for part in re.split(r"\s+and\s+", prompt):  # whole words, not within a trigger
        words = re.findall(r"[a-z]+|<[^>]*>", part.lower())
        things.append(
            RequestedThing(
                kind=_first(words, CLASSES),
                colour=_first(words, COLOURS),
                pattern=_first(words, PATTERNS),
                accessory=_first(words, ACCESSORIES) or "none",
            )
        )
    return PromptRequest(tuple(things), background)
