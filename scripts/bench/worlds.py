"""Does the base of stickers draw what it is asked for, and learn drawings that it has never seen?

*Subjects*: 200 of the subjects that it was trained on, in each of the hands of training, are drawn
by prompts such as "a sticker of a noto tiger face on a blue background". An image is right if its
largest sticker is nearest to a picture of the subject, of all subjects of training; *of all*: of
the 1,586 subjects that the judges know.

*Drawings*: ten drawings by code, such as a user makes by hand (`_worlds/drawings.py`), are learned
from five pictures each by the settings of `customize demo --images`, and drawn in eight scenes with
three seeds. Identity is the share of images in which the judges recognise the drawing; *of its
class*: of images of the base's class word instead, which shows how often that is chance.

Concepts of held-out subjects are merged by `merge_identity.py --world stickers`.

Learned drawings and scores are stored in `--folder`, named by the base and the settings, so an
interrupted run resumes. The artwork is installed by `make stickers`.

    python scripts/bench/worlds.py --json scripts/bench/results/worlds.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import _common
import _workers
import torch
from _scorer import open_quietly
from _worlds import drawings, sticker_concepts, subjects
from _worlds.bench_world import WORLDS
from _worlds.drawings import DRAWINGS, Drawing

from customize.api.pipeline_methods import load_custom, unload_custom
from customize.demo.own_drawing import TRAINING
from customize.image_tensors import tensor_to_images
from customize.stickers.judges import StickerJudges
from customize.training.config import TrainConfig

SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
QUICK_STEPS, QUICK_SUBJECTS, QUICK_DRAWINGS = 40, 20, 1
_PHOTO_SEED = 5


def config_of(args: argparse.Namespace, drawing: Drawing) -> TrainConfig:
    """The settings of the demo for a user's own pictures."""
    return TrainConfig(
        base=str(args.base),
        images=args.folder / "pictures" / drawing.name,
        output=args.folder / drawing.name,
        name=drawing.name,
        class_word=drawing.class_word,
        **training(args),
    )


def training(args: argparse.Namespace) -> dict[str, Any]:
    return TRAINING | ({"steps": QUICK_STEPS, "checkpoint_every": 0} if args.quick else {})


def depends_on(args: argparse.Namespace) -> str:
    """A digest of the base, the settings and the code that draws pictures."""
    digest = hashlib.sha256(repr(training(args)).encode())
    files = [Path(drawings.__file__), Path(sticker_concepts.__file__)]
    for path in [*files, *_workers.weights_of(args.base)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def learn(args: argparse.Namespace, name: str) -> None:
    """Learn a drawing; a finished one is kept."""
    from customize.training.recipe import train

    (drawing,) = (each for each in DRAWINGS if each.name == name)
    config = config_of(args, drawing)
    drawings.write_photos(drawing, config.images, _PHOTO_SEED)
    train(config, progress=False)
    print(f"learned {name}", flush=True)


def score_drawing(args: argparse.Namespace, drawing: Drawing) -> dict[str, Any]:
    """The scores of one learned drawing; stored ones are kept."""
    path = args.folder / f"{drawing.name}{'-quick' * args.quick}.json"
    if not path.exists():
        _workers.keep(path, _score_drawing(args, drawing, path.with_suffix(".png")))
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def _score_drawing(args: argparse.Namespace, drawing: Drawing, sheet: Path) -> dict[str, Any]:
    pipe, judges = open_pipe(args), load_judges(args)
    config = config_of(args, drawing)
    pictures = [photo.image for photo in drawings.photos(drawing, _PHOTO_SEED)]
    seeds = QUICK_SEEDS if args.quick else SEEDS
    scenes = len(sticker_concepts.SCENES)

    def draw(words: str) -> list[torch.Tensor]:
        return [sticker_concepts.draw(pipe, words, seed, scenes) for seed in seeds]

    def rate(drawn: list[torch.Tensor]) -> list[dict[str, float]]:
        return [asdict(sticker_concepts.rate_images(judges, each, pictures)) for each in drawn]

    plain = rate(draw(drawing.class_word))
    load_custom(pipe, config.output)
    drawn = draw(config.trigger)
    unload_custom(pipe)
    rates = rate(drawn)
    save_sheet(pictures, drawn[0], sheet)
    return {
        "part": "drawing",
        "name": drawing.name,
        **{key: mean(rate[key] for rate in rates) for key in ("identity", "prompt", "distance")},
        "of its class": mean(rate["identity"] for rate in plain),
        "images": scenes * len(seeds),
    }


def save_sheet(pictures: Sequence[Any], drawn: torch.Tensor, path: Path) -> None:
    """Save the pictures of a drawing, and below them what was drawn by its trigger."""
    from PIL import Image

    images, gap = tensor_to_images(drawn), 2
    side = images[0].width + gap
    sheet = Image.new("RGB", (side * max(len(pictures), len(images)), 2 * side), "white")
    for row, line in enumerate((pictures, images)):
        for column, image in enumerate(line):
            sheet.paste(image, (column * side, row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def score_subjects(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the base draws of its subjects, in all hands and in each."""
    _, split = sticker_concepts.installed()
    pipe, judges = open_pipe(args), load_judges(args)
    count, hands = (QUICK_SUBJECTS, 1) if args.quick else (subjects.COUNT, len(split.hands))
    wanted = subjects.requests(split, count, hands)
    images = subjects.draw(pipe, wanted)
    rows = []
    for hand in ("", *split.hands):
        chosen = [k for k, each in enumerate(wanted) if hand in ("", each.hand)]
        if chosen:
            part = [wanted[k] for k in chosen]
            rates = subjects.rates(judges, images[chosen], part, split)
            rows.append({"part": "subjects", "name": hand or "all hands"} | rates)
            rows[-1]["images"] = len(chosen)
    return rows


def open_pipe(args: argparse.Namespace) -> Any:
    pipe = open_quietly(args.base)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def load_judges(args: argparse.Namespace) -> StickerJudges:
    judges: StickerJudges = WORLDS["stickers"].load_judges(args.judges)
    return judges


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    args.folder = args.folder / depends_on(args)
    shown = DRAWINGS[: QUICK_DRAWINGS if args.quick else len(DRAWINGS)]
    missing = [d.name for d in shown if not (config_of(args, d).output / "concept.json").exists()]
    if missing:
        _workers.share_out(args, "learn", missing)
    rows = [*score_subjects(args), *(score_drawing(args, drawing) for drawing in shown)]
    return rows, figures_of(rows)


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    drawn = [row for row in rows if row["part"] == "drawing"]
    figures = {
        "own_drawing_identity": mean(row["identity"] for row in drawn),
        "own_drawing_prompt": mean(row["prompt"] for row in drawn),
        "own_drawing_identity_of_its_class": mean(row["of its class"] for row in drawn),
    }
    for row in rows:
        if row["part"] == "subjects" and row["name"] == "all hands":
            figures["stickers_base_subject_accuracy"] = row["subject"]
            figures["stickers_base_hand_accuracy"] = row["hand"]
            figures["stickers_base_ground_accuracy"] = row["ground"]
    return figures


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/worlds", "learn")
    parser.set_defaults(base=WORLDS["stickers"].base, judges=WORLDS["stickers"].judges)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.learn is None:
        _common.report("worlds", args, *run(args))
    for name in args.learn or ():
        learn(args, name)


if __name__ == "__main__":
    main()
