"""A hand that the base has never seen, learned from six stickers, and applied to other subjects.

The hand is OpenMoji's, which is held out. Captions name the subjects: "a sticker of a <h0> tiger
face on a blue background". Subject: the largest sticker is nearest to a picture of the asked
subject, of all subjects of training in the four hands. Hand: of the four pictures of the asked
subject, it is nearest to OpenMoji's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from _claims.claim import Bench, Claim, Rates, Training, share
from customize.demo.experiment import TRAINING
from customize.image_folder import write_images
from customize.stickers.artwork import Subject
from customize.stickers.caption_grammar import with_article
from customize.stickers.prototypes import Prototypes, compute_prototypes
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.world import GROUND_COLOURS, HEIGHT, Scene, Sticker, random_ground

HAND = "openmoji"
PLAIN, KNOWN, LEARNED = "no hand named", "noto named (a hand of training)", "learned from six"
STICKERS, SETS, _SUBJECTS, _SEEDS, _SEED = 6, 3, 24, (41,), 95_000


@cache
def subjects_of(bench: Bench) -> tuple[tuple[Subject, ...], tuple[tuple[Subject, ...], ...]]:
    """The subjects that are drawn, and those of each set of stickers, all different."""
    order = np.random.default_rng(_SEED).permutation(len(bench.split.training)).tolist()
    shuffled = [bench.split.training[k] for k in order]
    sets = tuple(
        tuple(shuffled[_SUBJECTS + k * STICKERS :][:STICKERS])
        for k in range(1 if bench.quick else SETS)
    )
    return tuple(shuffled[: 6 if bench.quick else _SUBJECTS]), sets


def prompts_of(subjects: Sequence[Subject], hand: str) -> list[str]:
    colours = list(GROUND_COLOURS)
    return [
        f"a sticker of {with_article(f'{hand} {subject.name}'.strip())} on"
        f" {with_article(colours[k % len(colours)])} background"
        for k, subject in enumerate(subjects)
    ]


def training(bench: Bench, number: int) -> Training:
    config = bench.config(f"h{number}", "style", **TRAINING | {"preserve": {}})
    shown = subjects_of(bench)[1][number]

    def write(folder: Path) -> None:
        rng = np.random.default_rng((_SEED, number))
        images = []
        for subject, colour in zip(shown, GROUND_COLOURS, strict=False):
            size = int(rng.integers(36, 54))
            left, top = (int(x) for x in rng.integers(HEIGHT - size + 1, size=2))
            ground = random_ground(rng, colour, "plain")
            scene = Scene((Sticker(subject, HAND, left, top, size),), ground)
            images.append(draw_scene(scene, bench.artwork))
        write_images(folder, images, prompts_of(shown, config.trigger))

    return Training(config, write)


def trainings(bench: Bench) -> list[Training]:
    return [training(bench, number) for number in range(len(subjects_of(bench)[1]))]


@cache
def prototypes(bench: Bench) -> Prototypes:
    """Of all subjects of training in four hands."""
    by_id = {subject.id: subject for subject in bench.split.training}
    known = bench.trained_subjects
    others = [by_id[name] for name in known.subjects]
    return known.joined(compute_prototypes(bench.judges.stickers, bench.artwork, [HAND], others))


def score(bench: Bench, way: str) -> tuple[Rates, Tensor]:
    subjects, sets = subjects_of(bench)
    hand = "noto" if way == KNOWN else HAND
    drawn = []
    for seed in _SEEDS:
        if way == LEARNED:
            for number in range(len(sets)):
                config = training(bench, number).config
                with bench.attached(config.output):
                    drawn.append(bench.draw(prompts_of(subjects, config.trigger), seed))
        else:
            drawn.append(bench.draw(prompts_of(subjects, "noto" if way == KNOWN else ""), seed))
    known = prototypes(bench)
    hits: dict[str, list[bool]] = {"hand": [], "subject": [], "both": []}
    for images in drawn:
        for subject, (boxes, vectors) in zip(subjects, bench.see(images), strict=True):
            largest = max(range(len(boxes)), key=lambda k: boxes[k].size) if boxes else None
            is_hand = is_subject = False
            if largest is not None:
                vector = vectors[largest][None]
                alike = known.similarity(vector)[0, known.subjects.index(subject.id)]
                is_hand = known.hands[int(alike.argmax())] == hand
                is_subject = known.recognise(vector)[0][0] == subject.id
            hits["hand"].append(is_hand)
            hits["subject"].append(is_subject)
            hits["both"].append(is_hand and is_subject)
    return {key: share(values) for key, values in hits.items()}, torch.cat(drawn)


def figures(rates: Mapping[str, Rates]) -> dict[str, float]:
    return {
        "style_hand": rates[LEARNED]["hand"],
        "style_hand_and_subject": rates[LEARNED]["both"],
        "style_hand_without": rates[PLAIN]["hand"],
        "style_hand_of_training": rates[KNOWN]["hand"],
    }


CLAIM = Claim(trainings, (PLAIN, KNOWN, LEARNED), score, figures)
