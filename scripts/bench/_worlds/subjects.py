"""Does a base of stickers draw what its prompts name?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from customize.evaluation.storybook_rates import draw_prompts
from customize.stickers import caption_grammar
from customize.stickers.artwork import Subject
from customize.stickers.judges import StickerJudges
from customize.stickers.prototypes import Prototypes
from customize.stickers.subjects import Split
from customize.stickers.world import GROUND_COLOURS

from .sticker_concepts import GUIDANCE

#: Of all subjects of a base of common ones, taken at equal distances.
COUNT = 200
_SEED = 71


@dataclass(frozen=True)
class Request:
    """One sticker in the middle of a plain ground.

    Attributes:
        subject: What it shows.
        hand: Whose drawing it is.
        colour: Of the ground.
        number: Place in the list of requests, on which the seed of the image depends.
    """

    subject: Subject
    hand: str
    colour: str
    number: int

    @property
    def prompt(self) -> str:
        thing = caption_grammar.with_article(f"{self.hand} {self.subject.name}")
        return f"a sticker of {thing} on {caption_grammar.with_article(self.colour)} background"


def requests(split: Split, count: int, hands: int) -> list[Request]:
    """Requests for subjects at equal distances in their list.

    Args:
        split: What the base was trained on.
        count: Number of subjects.
        hands: Number of hands for each, of those in which training draws it.
    """
    count = min(count, len(split.training))
    chosen = [split.training[k * len(split.training) // count] for k in range(count)]
    colours = list(GROUND_COLOURS)
    result: list[Request] = []
    for k, subject in enumerate(chosen):
        drawn = [h for h in split.hands if (subject.id, h) not in split.held_out_pairs]
        for j in range(min(hands, len(drawn))):
            number = len(result)
            hand, colour = drawn[(k + j) % len(drawn)], colours[number % len(colours)]
            result.append(Request(subject, hand, colour, number))
    return result


def draw(pipe: Any, wanted: Sequence[Request]) -> Tensor:
    """Draw requests as (n, 3, 64, 64) in [-1, 1]."""
    return draw_prompts(pipe, [each.prompt for each in wanted], _SEED, guidance=GUIDANCE)


def rates(
    judges: StickerJudges, images: Tensor, wanted: Sequence[Request], split: Split
) -> dict[str, float]:
    """Shares of images that show what is requested.

    Args:
        judges: Of stickers.
        images: (n, 3, 64, 64) in [-1, 1].
        wanted: One for each image.
        split: Among whose training subjects a subject is recognised.

    Returns:
        "sticker" (one is found), "subject" (the largest sticker is nearest to a picture of it, of
        all training subjects), "subject of all" (of all that the judges know), "hand", "ground".
    """
    found = judges.find_stickers(images)
    largest = [[max(boxes, key=lambda box: box.size)] if boxes else [] for boxes in found]
    vectors = iter(judges.embed(images, largest))
    known = trained_prototypes(judges, split)
    hits: dict[str, list[bool]] = {}
    for request, boxes, (colour, _) in zip(
        wanted, largest, judges.read_grounds(images), strict=True
    ):
        vector = next(vectors)[None] if boxes else None
        seen = known.recognise(vector)[0] if vector is not None else None
        of_all = judges.prototypes.recognise(vector)[0] if vector is not None else None
        for key, hit in {
            "sticker": vector is not None,
            "subject": seen is not None and seen[0] == request.subject.id,
            "subject of all": of_all is not None and of_all[0] == request.subject.id,
            "hand": seen is not None and seen[1] == request.hand,
            "ground": colour == request.colour,
        }.items():
            hits.setdefault(key, []).append(hit)
    return {key: sum(values) / len(values) for key, values in hits.items()}


def trained_prototypes(judges: StickerJudges, split: Split) -> Prototypes:
    """The judges' prototypes of the subjects that a base was trained on."""
    known, trained = judges.prototypes, {subject.id for subject in split.training}
    rows = [k for k, subject in enumerate(known.subjects) if subject in trained]
    names = tuple(known.subjects[k] for k in rows)
    return Prototypes(names, known.hands, known.vectors[rows])
