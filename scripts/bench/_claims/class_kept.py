"""What a base can still do with a class, and with everything else, once it has learned a drawing.

Drawings of `worlds.py` are learned by the demo's recipe for own pictures, with its preservation and
without any. Composition: share of images that show the asked subject beside the drawing, relative
to the base's with the class word; none of these subjects is named in what is preserved. Subjects:
share of plain images of subjects of training that are recognised with the drawing attached.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
import worlds
from _worlds import drawings, sticker_concepts, subjects
from _worlds.drawings import DRAWINGS, Drawing
from torch import Tensor

from _claims.claim import Bench, Claim, Rates, Training
from customize.demo.own_drawing import TRAINING
from customize.evaluation.storybook_rates import drift
from customize.stickers.caption_grammar import with_article

BASE, NOTHING, PRESERVED = "base, class word", "no preservation", "contexts preserved (default)"
NAMES = ("star-creature", "teapot", "snail", "rocket")
COMPANIONS = ("strawberry", "penguin", "automobile", "octopus", "sunflower", "pizza")
GROUNDS = ("pink", "blue", "grey", "yellow", "green", "white")
_SEED, _PHOTO_SEED, _SUBJECTS = 21, 5, 40


def chosen(bench: Bench) -> list[Drawing]:
    known = {drawing.name: drawing for drawing in DRAWINGS}
    return [known[name] for name in NAMES[: 1 if bench.quick else None]]


def training(bench: Bench, drawing: Drawing, way: str) -> Training:
    if way == PRESERVED:  # as worlds.py has learned it
        args = argparse.Namespace(**vars(bench.args))
        args.folder = bench.args.worlds / worlds.depends_on(args)
        config = worlds.config_of(args, drawing)
    else:
        settings = TRAINING | {"preserve": {}}
        del settings["preserve_phrases"]
        config = bench.config(drawing.name, drawing.class_word, **settings)
    return Training(config, lambda folder: drawings.write_photos(drawing, folder, _PHOTO_SEED))


def trainings(bench: Bench) -> list[Training]:
    return [training(bench, d, way) for d in chosen(bench) for way in (NOTHING, PRESERVED)]


def beside(thing: str) -> list[str]:
    """Prompts for a thing to the left or the right of a subject."""
    return [
        f"a sticker of {thing} {where} {with_article(companion)} on {with_article(ground)}"
        " background"
        for companion, ground in zip(COMPANIONS, GROUNDS, strict=True)
        for where in ("to the left of", "to the right of")
    ]


def score_drawing(
    bench: Bench, drawing: Drawing, way: str
) -> tuple[dict[str, list[float]], Tensor]:
    """The scores of each image, and images with a companion."""
    requests = subjects.requests(bench.split, 8 if bench.quick else _SUBJECTS, 1)
    words = with_article(drawing.class_word)
    plain = [
        sticker_concepts.prompt_of(drawing.class_word, scene) for scene in sticker_concepts.SCENES
    ]
    before = bench.draw(plain, _SEED)

    def draw(thing: str) -> tuple[Tensor, ...]:
        return (
            sticker_concepts.draw(bench.pipe, thing, _SEED, len(sticker_concepts.SCENES)),
            bench.draw(beside(words if thing == drawing.class_word else thing), _SEED),
            bench.draw(plain, _SEED),
            bench.draw([request.prompt for request in requests], _SEED),
        )

    if way == BASE:
        alone, composed, after, known = draw(drawing.class_word)
    else:
        config = training(bench, drawing, way).config
        with bench.attached(config.output):
            alone, composed, after, known = draw(config.trigger)
    photos = [photo.image for photo in drawings.photos(drawing, _PHOTO_SEED)]
    rates = sticker_concepts.rate_images(bench.judges, alone, photos)
    asked = [bench.subject_id(name) for name in COMPANIONS for _ in range(2)]
    shown = [
        len(boxes) == 2 and any(s == wanted for s, _ in bench.trained_subjects.recognise(vectors))
        for (boxes, vectors), wanted in zip(bench.see(composed), asked, strict=True)
    ]
    rated = subjects.rates(bench.judges, known, requests, bench.split)
    return {
        "identity": [rates.identity],
        "prompt": [rates.prompt],
        "composition": [float(hit) for hit in shown],
        "class drift": [drift(before, after)],
        "subjects": [rated["subject"]],
    }, composed[:8]


def score(bench: Bench, way: str) -> tuple[Rates, Tensor]:
    found = [score_drawing(bench, drawing, way) for drawing in chosen(bench)]
    rates = {
        key: sum(value for scores, _ in found for value in scores[key])
        / sum(len(scores[key]) for scores, _ in found)
        for key in found[0][0]
    }
    return rates, torch.cat([images for _, images in found])


def figures(rates: Mapping[str, Rates]) -> dict[str, float]:
    base = rates[BASE]
    result = {"class_identity_loss": rates[NOTHING]["identity"] - rates[PRESERVED]["identity"]}
    for name, way in (("none", NOTHING), ("default", PRESERVED)):
        for key in ("composition", "subjects"):
            kept = rates[way][key] / base[key] if base[key] else 0.0
            result[f"class_{name}_{key}_of_base"] = kept
        result[f"class_{name}_drift"] = rates[way]["class drift"]
    return result


CLAIM = Claim(trainings, (BASE, NOTHING, PRESERVED), score, figures)
