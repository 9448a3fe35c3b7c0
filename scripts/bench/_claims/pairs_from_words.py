"""Two held-out subjects, learned apart, in one picture by a prompt that names both.

An image is right if the first concept is recognised in the left half and the second one in the
right half. The concepts are
those of `merge_identity.py --world stickers`. "Each alone" draws one concept at a time beside a
plain thing of the other's class; "subjects of training" are those that the base knows, which have
to be recognised among all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import merge_identity
import torch
from _merges import AVOIDING, PLAIN
from _together import drawing
from _together.rivals import freefuse, lorashop
from _together.rows import Draw
from _worlds.sticker_concepts import GUIDANCE, concept
from torch import Tensor

from _claims.claim import Bench, Claim, Rates, Training, share
from customize.demo.experiment import TRAINING
from customize.image_tensors import images_to_tensor
from customize.stickers.caption_grammar import with_article
from customize.stickers.world import HEIGHT

Pair = tuple[int, int]
Shows = Callable[[Tensor], list[bool]]

PAIRS: dict[str, tuple[Pair, ...]] = {
    "two classes": ((0, 1), (2, 9), (10, 11)),
    "one class": ((0, 2), (1, 5), (3, 10)),
}
GROUNDS = ("blue", "yellow", "pink", "green", "orange", "grey")
SEEDS = (1, 2)
ALONE, KNOWN = "each alone", "subjects of training"
_KNOWN = (("tiger face", "banana"), ("automobile", "octopus"), ("strawberry", "penguin"))


@dataclass(frozen=True)
class Way:
    """How pairs are drawn.

    Attributes:
        draw: See :mod:`_together.rivals`.
        kind: How concepts are trained.
        merge: How they are attached.
    """

    draw: Draw
    kind: str = AVOIDING
    merge: str = "sum"


WORDS, WORDS_LORA = "together=, fusion", "together=, ordinary LoRAs"
WAYS = {
    WORDS: Way(drawing.draw_words, merge="fusion"),
    "merged, fusion": Way(drawing.draw, merge="fusion"),
    "merged, sum": Way(drawing.draw),
    "FreeFuse": Way(freefuse.draw),
    "LoRAShop": Way(lorashop.draw),
    WORDS_LORA: Way(drawing.draw_words, PLAIN),
    "merged, ordinary LoRAs": Way(drawing.draw, PLAIN),
    "FreeFuse, ordinary LoRAs": Way(freefuse.draw, PLAIN),
    "LoRAShop, ordinary LoRAs": Way(lorashop.draw, PLAIN),
}


def merging_arguments(bench: Bench) -> argparse.Namespace:
    """The arguments of `merge_identity.py --world stickers`."""
    args = argparse.Namespace(**vars(bench.args))
    args.world, args.folder = "stickers", bench.args.merging
    args.steps = merge_identity.QUICK_STEPS if bench.quick else TRAINING["steps"]
    args.folder = merge_identity.concepts_folder(args)
    return args


def trainings(bench: Bench) -> list[Training]:
    args = merging_arguments(bench)
    indices = sorted({index for pair in pairs(bench) for index in pair})
    return [
        Training(merge_identity.config_of(args, kind, index), concept(index).write)
        for kind in (AVOIDING, PLAIN)
        for index in indices
    ]


def pairs(bench: Bench) -> list[Pair]:
    return [pair for group in groups(bench).values() for pair in group]


def groups(bench: Bench) -> dict[str, tuple[Pair, ...]]:
    """The pairs of each group, in both orders."""
    return {
        name: tuple(order for pair in group for order in (pair, pair[::-1]))[
            : 1 if bench.quick else None
        ]
        for name, group in PAIRS.items()
    }


def folder(bench: Bench, kind: str, index: int) -> Path:
    return merge_identity.config_of(merging_arguments(bench), kind, index).output


def prompts_of(things: Sequence[str]) -> list[str]:
    return [
        f"a sticker of {things[0]} to the left of {things[1]} on {with_article(colour)} background"
        for colour in GROUNDS
    ]


def draw(bench: Bench, how: Draw, things: Sequence[str], seed: int) -> Tensor:
    # The rivals call `drawing.draw` as well, whose default is the storybook's.
    drawing.GUIDANCE = GUIDANCE
    numbers = [1000 * seed + k for k in range(len(GROUNDS))]
    return how(bench.pipe, tuple(things), prompts_of(things), numbers, (HEIGHT, HEIGHT))


def in_half(bench: Bench, images: Tensor, place: int, shows: Shows) -> list[bool]:
    """Whether each image shows a thing in the left half (place 0) or the right one (1).

    Args:
        bench: With the judges.
        images: (n, 3, 64, 64) in [-1, 1].
        place: 0 or 1.
        shows: Embeddings (stickers, 64) -> whether each is of the thing.
    """
    return [
        any(
            right and (box.centre[0] > HEIGHT / 2) == place
            for box, right in zip(boxes, shows(vectors), strict=True)
        )
        for boxes, vectors in bench.see(images)
    ]


def shows_concept(bench: Bench, index: int) -> Shows:
    """Recognises a concept by its distance to the prototype of its pictures."""
    prototype = bench.judges.prototype(images_to_tensor(concept(index).images()))
    return lambda vectors: (1 - vectors @ prototype <= bench.judges.threshold).tolist()


def shows_subject(bench: Bench, name: str) -> Shows:
    """Recognises a subject of training as the nearest of all."""
    wanted = bench.subject_id(name)
    return lambda vectors: [
        subject == wanted for subject, _ in bench.trained_subjects.recognise(vectors)
    ]


def draw_pair(bench: Bench, way: str, pair: Pair, seed: int) -> tuple[Tensor, Tensor]:
    """The images that are to show the first and the second concept: the same but for each alone."""
    triggers = [concept(index).trigger for index in pair]
    if way == ALONE:
        views = []
        for place, index in enumerate(pair):
            things = [with_article(concept(other).class_word) for other in pair]
            things[place] = triggers[place]
            with bench.attached(folder(bench, AVOIDING, index)):
                views.append(draw(bench, drawing.draw, things, seed))
        return views[0], views[1]
    how = WAYS[way]
    with bench.attached(*(folder(bench, how.kind, i) for i in pair), merge=how.merge):
        images = draw(bench, how.draw, triggers, seed)
    return images, images


def score_known(bench: Bench, seeds: Sequence[int]) -> tuple[Rates, Tensor]:
    """Pairs of subjects that the base was trained on."""
    hits, samples = [], []
    for names in _KNOWN:
        for seed in seeds:
            images = draw(bench, drawing.draw, [with_article(name) for name in names], seed)
            samples.append(images[:2])
            shown = [
                in_half(bench, images, k, shows_subject(bench, n)) for k, n in enumerate(names)
            ]
            hits += list(zip(*shown, strict=True))
    return {"two classes": share([all(hit) for hit in hits])} | halves(hits), torch.cat(samples)


def halves(hits: Sequence[Sequence[bool]]) -> Rates:
    return {name: share([hit[k] for hit in hits]) for k, name in enumerate(("left", "right"))}


def score(bench: Bench, way: str) -> tuple[Rates, Tensor]:
    seeds = SEEDS[: 1 if bench.quick else None]
    if way == KNOWN:
        return score_known(bench, seeds)
    rates: Rates = {}
    every: list[tuple[bool, ...]] = []
    samples = []
    for group, members in groups(bench).items():
        hits: list[tuple[bool, ...]] = []
        for pair in members:
            judges = [shows_concept(bench, index) for index in pair]
            for seed in seeds:
                views = draw_pair(bench, way, pair, seed)
                samples.append(views[0][:1])
                shown = [in_half(bench, views[k], k, judges[k]) for k in (0, 1)]
                hits += list(zip(*shown, strict=True))
        rates[group] = share([all(hit) for hit in hits])
        every += hits
    return rates | halves(every), torch.cat(samples)


def figures(rates: Mapping[str, Rates]) -> dict[str, float]:
    result = {}
    for group in PAIRS:
        key = group.replace(" ", "_")
        result[f"words_both_right_{key}"] = rates[WORDS][group]
        result[f"alone_both_right_{key}"] = rates[ALONE][group]
        for name, ours in (("", WORDS), ("_lora", WORDS_LORA)):
            kind = WAYS[ours].kind
            rivals = [rates[way][group] for way, how in WAYS.items() if how.kind == kind]
            rivals.remove(rates[ours][group])
            result[f"words_margin_over_best_rival{name}_{key}"] = rates[ours][group] - max(rivals)
    return result


CLAIM = Claim(trainings, (*WAYS, ALONE, KNOWN), score, figures)
