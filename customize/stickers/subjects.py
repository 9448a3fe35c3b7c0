"""Which subjects and hands a base is trained on, and which are held out.

All of it follows from the metadata by rules, so that it is the same on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from customize.errors import ConfigError, DataError
from customize.stickers.artwork import Artwork, Subject

#: The choices of `training_split`.
CHOICES = ("common", "all")

#: Number of common subjects by group, with those that are held out.
COMMON = {
    "smileys-emotion": 10,
    "animals-nature": 110,
    "food-drink": 80,
    "travel-places": 52,
    "activities": 34,
    "objects": 74,
}
# Views of places, signs, and what looks alike at 32 pixels: clock faces, phases of the moon, paper.
UNCOMMON_SUBGROUPS = frozenset(
    {
        *("place-map", "place-religious", "place-other", "hotel", "time"),
        *("cat-face", "monkey-face", "emotion", "medical", "sound", "other-object"),
        *("mail", "money", "book-paper", "writing", "office"),
    }
)
# Every sixth common subject of a group is held out, and every tenth of the others in one hand.
_HELD_OUT_SUBJECTS, _HELD_OUT_PAIRS = 6, 10


@dataclass(frozen=True)
class Split:
    """What a base is trained on, and what it never sees.

    Attributes:
        training: Subjects.
        held_out: Subjects that are never drawn or named in training: new concepts.
        hands: Names.
        held_out_pairs: (subject id, hand) never drawn, though both are known.
    """

    training: tuple[Subject, ...]
    held_out: tuple[Subject, ...]
    hands: tuple[str, ...]
    held_out_pairs: frozenset[tuple[str, str]]

    def subjects_of(self, hand: str) -> tuple[Subject, ...]:
        """The training subjects that are drawn in a hand."""
        return tuple(s for s in self.training if (s.id, hand) not in self.held_out_pairs)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us")) else word


def head_noun(subject: Subject) -> str:
    """The noun that a subject is about: "cloud" of "cloud with rain", "apple" of "red apple".

    Plurals lose their s, and the face of an animal is about the animal.
    """
    phrase = re.split(r" (?:with|of|on|in|without|behind|and|at|for|over) ", subject.name)[0]
    words = phrase.split()
    if subject.group == "animals-nature" and words[1:] == ["face"]:
        words.pop()
    return _singular(words[-1]) if words else subject.name


def common_subjects(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """The most common subjects that are told apart easily, in their order.

    Of each group those with names of one word, then those of two, as basic things have short names;
    among equals the earliest. Of subjects about the same noun, such as a red and a green apple, the
    first is taken.
    """
    chosen: set[str] = set()
    nouns: set[str] = set()
    counts: Counter[str] = Counter()

    def rank(subject: Subject) -> tuple[int, float]:
        return len(subject.name.removesuffix(" face").split()), subject.version

    for subject in sorted(subjects, key=rank):
        noun = head_noun(subject)
        full = counts[subject.group] >= COMMON.get(subject.group, 0)
        if full or noun in nouns or subject.subgroup in UNCOMMON_SUBGROUPS:
            continue
        chosen.add(subject.id)
        nouns.add(noun)
        counts[subject.group] += 1
    return tuple(subject for subject in subjects if subject.id in chosen)


def _held_out_subjects(common: Sequence[Subject]) -> tuple[Subject, ...]:
    seen: Counter[str] = Counter()
    held_out = []
    for subject in common:
        seen[subject.group] += 1
        if seen[subject.group] % _HELD_OUT_SUBJECTS == _HELD_OUT_SUBJECTS // 2:
            held_out.append(subject)
    return tuple(held_out)


def training_split(artwork: Artwork, choice: str = "common") -> Split:
    """Choose what a base is trained on.

    Args:
        artwork: The artwork.
        choice: "common": some 300 subjects, which two CPU cores learn in a night; "all": all but
            the held-out ones and those about the same nouns. What is held out
            is the same for both.

    Raises:
        ConfigError: The choice is unknown.
        DataError: All hands are held out.
    """
    if choice not in CHOICES:
        raise ConfigError(
            f"unknown choice of subjects {choice!r}", where="subjects", fix="common or all"
        )
    common = common_subjects(artwork.subjects)
    held_out = _held_out_subjects(common)
    hands = tuple(hand.name for hand in artwork.hands if not hand.held_out)
    if not hands:
        raise DataError(
            "all hands of the artwork are held out",
            where=artwork.folder,
            fix="set held_out of a hand to false in metadata.json",
        )
    rest = tuple(subject for subject in common if subject not in held_out)
    pairs = frozenset(
        (subject.id, hands[k // _HELD_OUT_PAIRS % len(hands)])
        for k, subject in enumerate(rest)
        if len(hands) > 1 and k % _HELD_OUT_PAIRS == 0
    )
    nouns = {head_noun(subject) for subject in held_out}
    training = tuple(
        subject
        for subject in (rest if choice == "common" else artwork.subjects)
        if not nouns & {_singular(word) for word in subject.name.split()}
    )
    return Split(training, held_out, hands, pairs)
