"""Prompts as users of the test world write them, and what each of them asks for.

The base knows the captions of :mod:`customize.storybook.caption_grammar` alone. Users write short
prompts, misspell words, change their order, use words that the base never saw, ask at length, and
exclude things. Each prompt comes with its request, by which its picture is judged, and with the
caption that a writer who knows the grammar would give.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from customize.storybook.caption_grammar import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    PromptRequest,
    RequestedThing,
)
from customize.storybook.world import ACCESSORIES, BACKGROUNDS, CLASSES, COLOURS, PATTERNS
from customize.text import with_article

#: Word of the grammar -> words for it that the base never saw. The last one of each is held out:
#: no training of a rewriter uses it.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "dog": ("puppy", "doggy", "hound"),
    "cat": ("kitty", "kitten", "feline"),
    "rabbit": ("bunny", "bunny rabbit", "hare"),
    "bird": ("birdie", "sparrow", "songbird"),
    "fish": ("fishy", "trout", "minnow"),
    "car": ("automobile", "vehicle", "motorcar"),
    "cup": ("mug", "teacup", "beaker"),
    "robot": ("android", "droid", "automaton"),
    "red": ("crimson", "scarlet", "ruby"),
    "yellow": ("golden", "lemon", "amber"),
    "green": ("emerald", "lime", "mossy"),
    "blue": ("azure", "navy", "sapphire"),
    "purple": ("violet", "lilac", "mauve"),
    "white": ("ivory", "chalky", "milky"),
    "striped": ("stripy", "streaky", "banded"),
    "spotted": ("dotted", "speckled", "dappled"),
    "plain": ("unpatterned", "patternless", "unmarked"),
    "hat": ("cap", "beanie", "bonnet"),
    "glasses": ("spectacles", "eyeglasses", "specs"),
    "scarf": ("muffler", "shawl", "neckerchief"),
    "beach": ("seaside", "shore", "coast"),
    "forest": ("woods", "woodland", "grove"),
    "city": ("town", "downtown", "metropolis"),
    "snow": ("snowfield", "winter", "blizzard"),
    "room": ("bedroom", "living room", "parlour"),
    "space": ("outer space", "cosmos", "galaxy"),
}
HELD_OUT_WORDS = frozenset(words[-1] for words in SYNONYMS.values())

#: How a user introduces a place, by the word that stands for it.
_PLACES = {
    "beach": ("on a beach", "on the beach", "at the beach"),
    "forest": ("in a forest", "in the forest"),
    "city": ("in a city", "in the city"),
    "snow": ("in the snow", "in snow"),
    "room": ("in a room", "inside a room"),
    "space": ("in space",),
    "winter": ("in winter",),
    "downtown": ("downtown",),
    "outer space": ("in outer space",),
    "seaside": ("at the seaside",),
    "shore": ("at the shore", "on the shore"),
    "coast": ("at the coast", "on the coast"),
}

KINDS = ("short", "misspelt", "odd order", "unseen words", "long-winded", "trigger and negation")


@dataclass(frozen=True)
class UserPrompt:
    """What a user writes and asks for.

    Attributes:
        kind: One of :data:`KINDS`.
        text: The prompt.
        request: What it asks for; a thing of class None has the trigger.
        excluded: Attributes that must not show, such as ``{"pattern": "spotted"}``, of the first
            thing.
        caption: The caption that a writer who knows the grammar would give.
        trigger: Trigger of the first thing; empty for none.
    """

    kind: str
    text: str
    request: PromptRequest
    excluded: Mapping[str, str]
    caption: str
    trigger: str = ""


def is_held_out(request: PromptRequest) -> bool:
    """Whether no training of a rewriter has this combination; so it is for one in eight."""
    return zlib.crc32(repr(dataclasses.astuple(request)).encode()) % 8 == 0


def random_request(
    rng: np.random.Generator, two: float = 0.2, held_out: bool = False
) -> PromptRequest:
    """A random request.

    Args:
        rng: Random number generator.
        two: Probability of two things.
        held_out: Whether the combination is a held-out one, or one of the others.
    """
    request = _any_request(rng, two)
    while is_held_out(request) != held_out:
        request = _any_request(rng, two)
    return request


def _any_request(rng: np.random.Generator, two: float) -> PromptRequest:
    count = 2 if rng.random() < two else 1
    kinds = rng.choice(CLASSES, size=count, replace=False)

    def pick(share: float, choices: Sequence[str]) -> str | None:
        return str(rng.choice(choices)) if rng.random() < share else None

    things = tuple(
        RequestedThing(
            kind=str(kind),
            colour=pick(0.6, COLOURS),
            pattern=pick(0.3, PATTERNS[1:]),
            accessory=pick(0.5, ACCESSORIES[1:]) or "none",
        )
        for kind in kinds
    )
    return PromptRequest(things, pick(0.85, BACKGROUNDS))


def write_caption(request: PromptRequest, trigger: str = "", plain: Sequence[int] = ()) -> str:
    """The caption of a request in the grammar.

    Args:
        request: The request.
        trigger: Word of the first thing in place of its class, colour and pattern.
        plain: Indices of things that are called plain.
    """
    parts = []
    for index, thing in enumerate(request.things):
        looks = [thing.pattern or ("plain" if index in plain else ""), thing.colour]
        words = " ".join(["a", *(look for look in looks if look), str(thing.kind)])
        if index == 0 and trigger:
            words = trigger
        wearing = "" if thing.accessory == "none" else " " + ACCESSORY_PHRASES[thing.accessory]
        parts.append(words + wearing)
    place = f" {BACKGROUND_PHRASES[request.background]}" if request.background else ""
    return f"a photo of {' and '.join(parts)}{place}"


def write_user_prompt(
    rng: np.random.Generator,
    kind: str,
    held_out: bool = False,
    request: PromptRequest | None = None,
    trigger: str = "",
) -> UserPrompt:
    """A random prompt of a kind.

    Args:
        rng: Random number generator.
        kind: One of :data:`KINDS`.
        held_out: Whether unseen words and the combination are held-out ones, or the others.
        request: What the prompt asks for; None: a random request.
        trigger: Trigger for prompts with one; empty: prompts of that kind only exclude something.
    """
    request = request or random_request(rng, 0.0 if kind == KINDS[-1] else 0.2, held_out)
    if kind == KINDS[-1]:
        return _with_negation(rng, held_out, request, trigger)
    text = _WRITERS[kind](rng, request, held_out)
    return UserPrompt(kind, text, request, {}, write_caption(request))


def _word(rng: np.random.Generator, word: str, held_out: bool) -> str:
    words = SYNONYMS[word]
    return words[-1] if held_out else str(rng.choice(words[:-1]))


def _place(rng: np.random.Generator, word: str) -> str:
    default = (f"in a {word}", f"in the {word}")
    return str(rng.choice(_PLACES.get(word, default)))


def _describe(thing: RequestedThing, translate: Callable[[str], str]) -> str:
    looks = [thing.pattern, thing.colour, thing.kind]
    return with_article(" ".join(translate(look) for look in looks if look))


def _wearing(thing: RequestedThing, translate: Callable[[str], str] = str) -> str:
    if thing.accessory == "none":
        return ""
    word = translate(thing.accessory)
    return f" wearing {word if word.endswith('s') else with_article(word)}"


def _sentence(
    rng: np.random.Generator, request: PromptRequest, translate: Callable[[str], str] = str
) -> str:
    things = " and ".join(_describe(t, translate) + _wearing(t, translate) for t in request.things)
    place = f" {_place(rng, translate(request.background))}" if request.background else ""
    return f"{rng.choice(('', 'a photo of ', 'a picture of '))}{things}{place}"


def _short(rng: np.random.Generator, request: PromptRequest, held_out: bool) -> str:
    parts = [
        " ".join(
            word
            for word in (
                thing.colour,
                thing.pattern,
                thing.kind,
                "" if thing.accessory == "none" else thing.accessory,
            )
            if word
        )
        for thing in request.things
    ]
    joined = str(rng.choice((" ", ", ")))
    return joined.join(
        [*(" and ".join(parts),), *([request.background] if request.background else [])]
    )


def misspell(rng: np.random.Generator, word: str) -> str:
    """A word with one mistake: a letter lost, doubled, changed, or swapped with the next one."""
    if len(word) < 3:
        return word
    k = int(rng.integers(1, len(word) - 1))
    kind = rng.integers(4)
    if kind == 0:
        return word[:k] + word[k + 1 :]
    if kind == 1:
        return word[: k + 1] + word[k:]
    if kind == 2:
        return word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    near = {"a": "s", "e": "r", "i": "o", "o": "p", "u": "y", "t": "r", "s": "d", "n": "m"}
    return word[:k] + near.get(word[k], "e") + word[k + 1 :]


def _misspelt(rng: np.random.Generator, request: PromptRequest, held_out: bool) -> str:
    words = _sentence(rng, request).split()
    long = [k for k, word in enumerate(words) if len(word) >= 3]
    count = min(len(long), int(rng.integers(1, 4)))
    for k in rng.choice(long, size=count, replace=False):
        words[k] = misspell(rng, words[k])
    return " ".join(words)


def _odd_order(rng: np.random.Generator, request: PromptRequest, held_out: bool) -> str:
    parts = [_place(rng, request.background)] if request.background else []
    if len(request.things) == 1:
        thing = request.things[0]
        style = int(rng.integers(3))
        if thing.accessory != "none":
            parts.append(_wearing(thing).strip())
        looks = [look for look in (thing.colour, thing.pattern) if look]
        if style == 0:
            parts += [with_article(str(thing.kind)), *looks]
        elif style == 1:
            parts.append(
                with_article(" ".join([str(thing.kind), *(["in"] if looks else []), *looks]))
            )
        else:
            which = f" that is {' and '.join(looks)}" if looks else ""
            parts.append(with_article(str(thing.kind)) + which)
        order = [int(k) for k in rng.permutation(len(parts))] if style != 0 else range(len(parts))
        return str(rng.choice((", ", "; "))).join(parts[k] for k in order)
    # The order of two things is where they are, so it stays.
    things = " and ".join(_describe(t, str) + _wearing(t) for t in request.things)
    return ", ".join([*parts, things])


def _unseen(rng: np.random.Generator, request: PromptRequest, held_out: bool) -> str:
    used = 0

    def translate(word: str) -> str:
        nonlocal used
        if rng.random() < 0.7:
            used += 1
            return _word(rng, word, held_out)
        return word

    while True:
        text = _sentence(rng, request, translate)
        if used:
            return text


_BEGINNINGS = (
    "I would really love to see a picture in which there is",
    "please draw me a nice photo, if you can, that shows",
    "so I was thinking about an image where you can see",
    "could you make a beautiful picture for my grandmother with",
    "what I have in mind is a high quality photo of",
)
_ENDINGS = (
    "thank you so much",
    "that would make me very happy",
    "and please make it as good as you can",
    "I hope that is not too much to ask",
    "",
)


def _long_winded(rng: np.random.Generator, request: PromptRequest, held_out: bool) -> str:
    parts = []
    for number, thing in enumerate(request.things):
        name = str(thing.kind)
        text = with_article(name) if number == 0 else f"and next to it {with_article(name)}"
        looks = [look for look in (thing.colour, thing.pattern) if look]
        if looks:
            text += f", and the {name} should be {' and '.join(looks)}"
        if thing.accessory != "none":
            wearing = _wearing(thing).removeprefix(" wearing ")
            text += f", and of course it has to wear {wearing}"
        parts.append(text)
    if request.background:
        where = _place(rng, request.background)
        parts.append(f"and all of this should happen {where}")
    return ", ".join(
        part
        for part in (f"{rng.choice(_BEGINNINGS)} {', '.join(parts)}", str(rng.choice(_ENDINGS)))
        if part
    )


def _with_negation(
    rng: np.random.Generator, held_out: bool, request: PromptRequest, trigger: str
) -> UserPrompt:
    """A prompt that excludes something, and half of them with a trigger where there is one."""
    thing = request.things[0]

    def translate(word: str) -> str:
        return _word(rng, word, held_out) if rng.random() < 0.4 else word

    if trigger:
        thing = dataclasses.replace(thing, kind=None, colour=None, pattern=None)
        subject = trigger
    elif rng.random() < 0.5 and thing.pattern is None:
        pattern = str(rng.choice(PATTERNS[1:]))
        negation = str(rng.choice(("is not", "isn't")))
        subject = f"{_describe(thing, translate)} that {negation} {pattern}"
        request = PromptRequest((thing,), request.background)
        place = f", {_place(rng, translate(request.background))}" if request.background else ""
        return UserPrompt(
            KINDS[-1],
            subject + _wearing(thing, translate) + place,
            request,
            {"pattern": pattern},
            write_caption(request, plain=[0]),
        )
    else:
        subject = _describe(thing, translate)
    request = PromptRequest((thing,), request.background)
    unwanted = str(rng.choice([word for word in ACCESSORIES[1:] if word != thing.accessory]))
    name = translate(unwanted)
    without = str(rng.choice(("without", "no", "with no")))
    if without == "without" and not name.endswith("s"):
        name = with_article(name)
    place = f" {_place(rng, translate(request.background))}" if request.background else ""
    text = f"a photo of {subject}{_wearing(thing, translate)}{place}, {without} {name}"
    return UserPrompt(
        KINDS[-1],
        text,
        request,
        {"accessory": unwanted},
        write_caption(request, trigger),
        trigger,
    )


_WRITERS: dict[str, Callable[[np.random.Generator, PromptRequest, bool], str]] = {
    "short": _short,
    "misspelt": _misspelt,
    "odd order": _odd_order,
    "unseen words": _unseen,
    "long-winded": _long_winded,
}
