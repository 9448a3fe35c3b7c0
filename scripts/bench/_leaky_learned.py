"""Training of the concepts and styles of `_leaky.py`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _leaky
from _leaky import Leaky, Style, StyleOfMany, references
from _scorer import open_quietly
from _workers import folder_name

from customize import record_inputs
from customize.concepts.input_statistics import layer_inputs_path
from customize.demo.experiment import TRAINING
from customize.image_tensors import tensor_to_images

NAMED, KEPT = "captions that name it", "contexts preserved"
SETTINGS: dict[str, Any] = TRAINING | {"checkpoint_every": 0, "layerwise_tokens": False}
UNKEPT: dict[str, Any] = {"preserve": {}}  # as others learn, so that there is something to avoid


def ways_to_learn(subject: Leaky) -> tuple[str, ...]:
    """The training variants besides the default."""
    return (NAMED,) if isinstance(subject, StyleOfMany) else (NAMED, KEPT)


def config_of(args: argparse.Namespace, subject: Leaky, how: str = "") -> Any:
    """The settings of a training.

    Args:
        args: of the command line.
        subject: concept or style.
        how: NAMED, with captions that name the other content, or KEPT, with the default
            preservation, with which alone styles of many are trained: concepts beside them are not
            recognised otherwise.
    """
    from customize.training.config import TrainConfig

    many = isinstance(subject, StyleOfMany)
    how = how if how in ways_to_learn(subject) else ""
    caption = subject.caption_that_names if how == NAMED else subject.caption
    folder = folder_name(f"{subject.name} {how}".strip())
    return TrainConfig(
        base=str(args.base),
        images=args.folder / "pictures" / (folder if many else subject.name),
        # Side by side, as what is shared by all of a base is recorded once for a folder.
        output=args.folder / "learned" / folder,
        name=subject.name,
        class_word="style" if isinstance(subject, Style) else subject.kind,
        caption=None if many else caption,
        slice=_slice_of(subject),
        record_inputs=False,
        **SETTINGS
        | ({} if many or how == KEPT else UNKEPT)
        | {"steps": args.steps * (2 if many else 1)},
    )


def _slice_of(subject: Leaky) -> int:
    """A slice in which the base shows the style; in slice 9 the style "pillars" was not learned."""
    for styles in (_leaky.STYLES, _leaky.STYLES_OF_MANY):
        if subject in styles:
            return 8 + 3 * styles.index(subject)
    return _leaky.CONCEPTS.index(subject) % 8


def learn(args: argparse.Namespace, job: str) -> None:
    """Train "name/how" and record its layer inputs if it is merged; skip finished ones."""
    from customize.training.recipe import train

    name, _, how = job.partition("/")
    (subject,) = (e for e in (*_leaky.CONCEPTS, *_leaky.ALL_STYLES) if e.name == name)
    config = config_of(args, subject, how)
    write(subject, config.images, subject.caption_that_names if how == NAMED else subject.caption)
    started = time.time()
    train(config, progress=False)
    record = layer_inputs_path(config.output)
    if (how or isinstance(subject, StyleOfMany)) and not record.exists():
        record_inputs(open_quietly(args.base), config.output).save(record)
    print(f"learned {job} in {time.time() - started:.0f} s", flush=True)


def write(subject: Leaky, folder: Path, caption: str) -> None:
    """Write the training images to a folder, with captions if each has its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(tensor_to_images(references(subject))):
        image.save(folder / f"{number}.png")
        if isinstance(subject, StyleOfMany):
            text = caption.replace(_leaky.KIND, subject.kinds[number]).format(f"<{subject.name}>")
            (folder / f"{number}.txt").write_text(text + "\n")
