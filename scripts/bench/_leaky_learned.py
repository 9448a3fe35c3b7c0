"""Learning concepts and styles whose pictures share more than they should."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _leaky
from _leaky import Leaky, Style, StyleOfMany, references
from _scorer import open_quietly
from _workers import folder_name
from PIL import Image

from customize import record_inputs
from customize.concepts.input_statistics import layer_inputs_path
from customize.demo import TRAINING

NAMED, KEPT = "captions that name it", "contexts preserved"
SETTINGS: dict[str, Any] = TRAINING | {"checkpoint_every": 0, "layerwise_tokens": False}
UNKEPT: dict[str, Any] = {"preserve": {}}  # as others learn, so that there is something to avoid


def ways_to_learn(what: Leaky) -> tuple[str, ...]:
    """Besides as all is."""
    return (NAMED,) if isinstance(what, StyleOfMany) else (NAMED, KEPT)


def config_of(args: argparse.Namespace, what: Leaky, how: str = "") -> Any:
    """How something is learned; `how` may be NAMED, by captions that say what else its pictures
    show, or KEPT, with the trainer's default, by which alone a style of many is learned: a concept
    beside it is not recognised else."""
    from customize.training.config import TrainConfig

    many = isinstance(what, StyleOfMany)
    how = how if how in ways_to_learn(what) else ""
    caption = what.caption_that_names if how == NAMED else what.caption
    own = folder_name(f"{what.name} {how}".strip())
    return TrainConfig(
        base=str(args.base),
        images=args.folder / "pictures" / (own if many else what.name),
        # Side by side, as what is shared by all of a base is recorded once for a folder.
        output=args.folder / "learned" / own,
        name=what.name,
        class_word="style" if isinstance(what, Style) else what.kind,
        caption=None if many else caption,
        slice=_slice_of(what),
        record_inputs=False,
        **SETTINGS
        | ({} if many or how == KEPT else UNKEPT)
        | {"steps": args.steps * (2 if many else 1)},
    )


def _slice_of(what: Leaky) -> int:
    """One in which what is drawn as it is shows the styles; in 9, pillars were not learned."""
    for styles in (_leaky.STYLES, _leaky.STYLES_OF_MANY):
        if what in styles:
            return 8 + 3 * styles.index(what)
    return _leaky.CONCEPTS.index(what) % 8


def learn(args: argparse.Namespace, job: str) -> None:
    """Learn what goes by this name, "name/how", and record what its layers read where it is to be
    merged; what is finished is kept."""
    from customize.training.recipe import train

    name, _, how = job.partition("/")
    (what,) = (e for e in (*_leaky.CONCEPTS, *_leaky.ALL_STYLES) if e.name == name)
    config = config_of(args, what, how)
    write(what, config.images, what.caption_that_names if how == NAMED else what.caption)
    began = time.time()
    train(config, progress=False)
    record = layer_inputs_path(config.output)
    if (how or isinstance(what, StyleOfMany)) and not record.exists():
        record_inputs(open_quietly(args.base), config.output).save(record)
    print(f"learned {job} in {time.time() - began:.0f} s", flush=True)


def write(what: Leaky, folder: Path, caption: str) -> None:
    """Leave the training pictures in a folder, with captions where each has its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(references(what)):
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if isinstance(what, StyleOfMany):
            text = caption.replace(_leaky.KIND, what.kinds[number]).format(f"<{what.name}>")
            (folder / f"{number}.txt").write_text(text + "\n")
