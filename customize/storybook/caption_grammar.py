"""The caption grammar of the miniature world: a caption for a scene, and what a prompt asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from customize.storybook.world import ACCESSORIES, CLASSES, COLOURS, PATTERNS, PLACES, Scene, Thing

OPENINGS = ("a photo of", "a picture of", "")
PLACE_PHRASES = {
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

# Every word of the grammar, and some that users' captions bring: each is one token.
_EXTRA = (
    "and an the with no of at by is my one two plain thing toy animal person man woman style "
    "drawing painting fence tree sun mountain window stars sand sea"
)
_PHRASES = (*OPENINGS, *PLACE_PHRASES.values(), *ACCESSORY_PHRASES.values(), _EXTRA)
WORDS = tuple(sorted({*" ".join(_PHRASES).split(), *CLASSES, *COLOURS, *PATTERNS, *PLACES}))


def caption_thing(
    thing: Thing, rng: np.random.Generator | None = None, words: str | None = None
) -> str:
    """Name one thing; with `rng` some attributes stay unsaid. `words` replaces class and looks."""
    who = thing.identity

    def say(share: float) -> bool:
        return rng is None or bool(rng.random() < share)

    if words is None:
        looks = [who.pattern] if who.pattern != "plain" and say(0.8) else []
        if who.colour is not None and say(0.85):
            looks.append(who.colour)
        words = " ".join(["a", *looks, who.kind])
    # An accessory in the picture is always said, else "no hat asked" would teach "perhaps a hat".
    if thing.accessory != "none":
        words += " " + ACCESSORY_PHRASES[thing.accessory]
    return words


def caption(
    scene: Scene,
    rng: np.random.Generator | None = None,
    names: tuple[str | None, ...] | None = None,
) -> str:
    """Caption a scene, things from left to right.

    Args:
        rng: vary the opening and leave some words out; None says everything.
        names: words for each thing in place of "a striped red dog"; None keeps the words.
    """
    opening = "a photo of" if rng is None else str(rng.choice(OPENINGS))
    names = names or (None,) * len(scene.things)
    things = " and ".join(
        caption_thing(t, rng, n) for t, n in zip(scene.things, names, strict=True)
    )
    place = PLACE_PHRASES[scene.place] if rng is None or rng.random() < 0.9 else ""
    return " ".join(part for part in (opening, things, place) if part)


@dataclass(frozen=True)
class RequestedThing:
    """What a prompt asks of one thing; None where it says nothing, but no accessory is "none"."""

    kind: str | None
    colour: str | None
    pattern: str | None
    accessory: str


@dataclass(frozen=True)
class PromptRequest:
    """What a prompt asks of the whole picture."""

    things: tuple[RequestedThing, ...]
    place: str | None


def _first(words: list[str], choices: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in choices), None)


def parse_prompt(prompt: str) -> PromptRequest:
    """Read a prompt of the grammar back; a trigger such as <rex> is a thing of unknown class."""
    place = next(
        (name for name, phrase in PLACE_PHRASES.items() if re.search(rf"\b{phrase}\b", prompt)),
        None,
    )
    for phrase in PLACE_PHRASES.values():
        prompt = re.sub(rf"\b{phrase}\b", " ", prompt)
    things = []
    for part in re.split(r"\s+and\s+", prompt):  # not inside a trigger
        words = re.findall(r"[a-z]+|<[^>]*>", part.lower())
        things.append(
            RequestedThing(
                kind=_first(words, CLASSES),
                colour=_first(words, COLOURS),
                pattern=_first(words, PATTERNS),
                accessory=_first(words, ACCESSORIES) or "none",
            )
        )
    return PromptRequest(tuple(things), place)
