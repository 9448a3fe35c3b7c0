"""The caption grammar of stickers: captions of scenes, and the words of all captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

import customize.text
from customize.stickers.artwork import Subject
from customize.stickers.subjects import Split
from customize.stickers.world import GROUND_COLOURS, HEIGHT, TEXTURES, Scene, Sticker

OPENINGS = ("a sticker of", "a picture of", "")
SIZE_WORDS = ("small", "large")
#: Sizes in pixels up to which a sticker is small, and from which it is large.
SMALL, LARGE = 30, 44
#: (column, row), each -1, 0 or 1 -> where in the picture it is.
PLACES = {
    (-1, -1): "at the top left",
    (0, -1): "at the top",
    (1, -1): "at the top right",
    (-1, 0): "on the left",
    (0, 0): "in the middle",
    (1, 0): "on the right",
    (-1, 1): "at the bottom left",
    (0, 1): "at the bottom",
    (1, 1): "at the bottom right",
}
#: Relation of the first to the second -> that of the second to the first.
RELATIONS = {"to the left of": "to the right of", "above": "below"}
#: Start of the subgroup -> the class of its subjects.
CLASS_WORDS = {
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal": "animal",
    "plant-flower": "flower",
    "plant": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-sweet": "dessert",
    "food": "food",
    "drink": "drink",
    "dishware": "dish",
    "place": "place",
    "transport": "vehicle",
    "sky-weather": "weather",
    "sport": "sport",
    "game": "game",
    "clothing": "clothing",
    "music": "music",
    "musical-instrument": "instrument",
    "tool": "tool",
    "face": "face",
}

# Words of users' captions besides those of scenes.
_EXTRA = (
    "and an the with no of at by is my one two three thing style toy drawing photo person emoji"
)


def _words(texts: Iterable[str]) -> set[str]:
    """Words as CLIP's tokenizer splits them: digits are words of their own."""
    return {word for text in texts for word in re.findall(r"[a-z]+|[0-9]", text)}


#: Words that captions have besides those of subjects and hands, and some of users' captions.
GRAMMAR_WORDS = _words(
    (
        *(*OPENINGS, *SIZE_WORDS, *PLACES.values(), *RELATIONS, *RELATIONS.values()),
        *(*GROUND_COLOURS, *TEXTURES, *CLASS_WORDS.values(), "a an on background"),
        "and the with no of at by is my one two three thing style toy drawing photo person emoji",
    )
)
# Every fourth word that only synonyms have is held out.
_HELD_OUT_WORDS = 4


@dataclass(frozen=True, eq=False)
class Wording:
    """The words for subjects.

    Attributes:
        names: Subject id -> the name and its synonyms.
        keywords: Subject id -> words that go with it and with another subject.
        classes: Subject id -> its class word, where no subject has this name.
        hands: Hands that captions name.
        held_out: Words that captions never have: of the names of held-out subjects, and some of
            the synonyms and all of the keywords of one training subject.
    """

    names: dict[str, tuple[str, ...]]
    keywords: dict[str, tuple[str, ...]]
    classes: dict[str, str]
    hands: tuple[str, ...]
    held_out: frozenset[str]

    def words(self) -> tuple[str, ...]:
        """All words of captions, sorted."""
        texts = (
            *(text for texts in self.names.values() for text in texts),
            *(text for texts in self.keywords.values() for text in texts),
            *self.hands,
        )
        return tuple(sorted(GRAMMAR_WORDS | _words(texts)))


def training_wording(split: Split) -> Wording:
    """The words of training captions.

    A synonym is used if it is of one subject only, a keyword if it is of several, and both if they
    have no held-out word.
    """
    everything = (*split.training, *split.held_out)
    owners = Counter(text for s in everything for text in {s.name, *s.synonyms, *_whole_animal(s)})
    keyword_owners = Counter(text for subject in split.training for text in subject.keywords)
    known = GRAMMAR_WORDS | _words(subject.name for subject in split.training)

    synonyms = {
        s.id: [t for t in dict.fromkeys((*_whole_animal(s), *s.synonyms)) if owners[t] == 1]
        for s in split.training
    }
    rare = sorted(_words(text for texts in synonyms.values() for text in texts) - known)
    held_out = {
        *rare[::_HELD_OUT_WORDS],
        *_words(text for s in split.held_out for text in (s.name, *s.synonyms)),
    } - known

    def allowed(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for text in texts if not held_out & _words([text]))

    names = {s.id: (s.name, *allowed(synonyms[s.id])) for s in split.training}
    keywords = {
        s.id: allowed(text for text in s.keywords if keyword_owners[text] > 1)
        for s in split.training
    }
    named = {text for texts in names.values() for text in texts}
    classes = {s.id: word for s in split.training if (word := class_word(s)) and word not in named}
    used = _words(text for texts in (*names.values(), *keywords.values()) for text in texts)
    unused = _words(text for s in split.training for text in s.keywords) - used - known
    return Wording(names, keywords, classes, split.hands, frozenset(held_out | unused))


def _whole_animal(subject: Subject) -> tuple[str, ...]:
    """The animal that a face stands for where no other subject is the whole animal."""
    face = subject.group == "animals-nature" and subject.name.endswith(" face")
    return (subject.name.removesuffix(" face"),) if face else ()


def class_word(subject: Subject) -> str | None:
    """The class of a subject, such as "bird"; None if there is none for its subgroup."""
    fits = [start for start in CLASS_WORDS if f"{subject.subgroup}-".startswith(f"{start}-")]
    return CLASS_WORDS[max(fits, key=len)] if fits else None


def with_article(words: str) -> str:
    """Words with "a" or "an", but for plurals."""
    if words.endswith("s") and not words.endswith(("ss", "us")):
        return words
    return customize.text.with_article(words)


def size_word(sticker: Sticker) -> str | None:
    """Whether a sticker is "small" or "large"; None between."""
    if sticker.size <= SMALL:
        return "small"
    return "large" if sticker.size >= LARGE else None


def place(sticker: Sticker, width: int) -> str:
    """Where in a picture a sticker is: left, right, top or bottom by 10 % off the centre."""
    x, y = sticker.centre
    column, row = (int(share > 0.6) - int(share < 0.4) for share in (x / width, y / HEIGHT))
    return PLACES[column, row]


def relation(first: Sticker, second: Sticker) -> str | None:
    """How the first of two stickers, the left one, is to the second; None if it is oblique."""
    dx, dy = (b - a for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) >= 1.5 * abs(dy):
        return "to the left of"
    if abs(dy) >= 1.5 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def caption_ground(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The ground, such as "on a striped blue background".

    Args:
        scene: The scene.
        rng: Generator that omits the texture at random; None: all is named.
    """
    ground = scene.ground
    words = [] if ground.texture == "plain" else [ground.texture]
    if rng is not None and rng.random() > 0.8:
        words = []
    return "on " + with_article(" ".join([*words, ground.colour, "background"]))


def caption_sticker(
    sticker: Sticker,
    wording: Wording,
    rng: np.random.Generator | None = None,
    name: str | None = None,
) -> str:
    """Size, hand and name of one sticker, such as "a large noto tiger face".

    Args:
        sticker: The sticker.
        wording: The words for subjects.
        rng: Generator that omits words, and says a synonym or the class instead of the name; None:
            all is named.
        name: Replacement of the hand and the name.
    """

    def include(share: float) -> bool:
        return rng is None or bool(rng.random() < share)

    size = size_word(sticker)
    words = [size] if size and include(0.5) else []
    if name is not None:
        return with_article(" ".join([*words, name])) if words else name
    names = wording.names.get(sticker.subject.id, (sticker.subject.name,))
    noun = names[0]
    if rng is not None:
        draw = rng.random()
        if draw < 0.3:
            noun = names[int(rng.integers(len(names)))]
        elif draw < 0.36:
            noun = wording.classes.get(sticker.subject.id, noun)
    if include(0.6):
        words.append(sticker.hand)
    return with_article(" ".join([*words, noun]))


def caption(
    scene: Scene,
    wording: Wording,
    rng: np.random.Generator | None = None,
    names: tuple[str | None, ...] | None = None,
) -> str:
    """The caption of a scene.

    Stickers are named from left to right, or by how one is to the other.

    Args:
        scene: The scene.
        wording: The words for subjects.
        rng: Generator that varies the wording and omits some words; None: the full caption.
        names: Replacement of hand and name of each sticker of the scene; None keeps the words.
    """
    stickers = scene.stickers
    replaced = names or (None,) * len(stickers)
    texts = [caption_sticker(s, wording, rng, n) for s, n in zip(stickers, replaced, strict=True)]
    order = sorted(range(len(stickers)), key=lambda k: stickers[k].centre)

    def include(share: float) -> bool:
        return rng is None or bool(rng.random() < share)

    related = relation(*(stickers[k] for k in order)) if len(order) == 2 else None
    if related is not None and include(0.6):
        first, second = (texts[k] for k in order)
        if rng is not None and rng.random() < 0.5:
            first, second, related = second, first, _inverse(related)
        content = f"{first} {related} {second}"
    else:
        parts = [
            f"{texts[k]} {place(stickers[k], scene.width)}" if include(0.5) else texts[k]
            for k in order
        ]
        content = " and ".join(parts)
    opening = OPENINGS[0] if rng is None else str(rng.choice(OPENINGS))
    ground = caption_ground(scene, rng) if include(0.9) else ""
    text = " ".join(part for part in (opening, content, ground) if part)
    keywords = wording.keywords.get(stickers[0].subject.id, ()) if len(stickers) == 1 else ()
    if rng is not None and names is None and keywords and rng.random() < 0.06:
        chosen = rng.permutation(len(keywords))[:2]
        text += " , " + " , ".join(keywords[k] for k in chosen)
    return text


def _inverse(relation: str) -> str:
    both = RELATIONS | {second: first for first, second in RELATIONS.items()}
    return both[relation]
