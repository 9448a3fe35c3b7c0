"""The demo with a user's own pictures: learn what they show on the bundled base of stickers.

A concept that the folder already contains is loaded instead of trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from customize.demo import experiment
from customize.demo.figures import draw_captioned_rows
from customize.demo.finished_concept import train_or_load
from customize.demo.snippet import loading_snippet
from customize.errors import DataError, storage_error
from customize.image_tensors import tensor_to_images
from customize.storybook.bundled_assets import stickers_folder
from customize.text import one_line, plural

if TYPE_CHECKING:
    from torch import Tensor

# Relative to the clone, as in the README's lines.
BASE_NAME = "assets/stickers"
#: What kind of thing is learned, if the user does not say so.
CLASS_WORD = "animal"
MAX_IMAGES = 20

# A shape that the base has never seen needs more capacity and larger steps than a concept of the
# storybook. On two drawings that no benchmark has, rank 16 at 5e-3 came nearer than rank 32 at
# 3e-3, and as near as at 8e-3.
TRAINING: dict[str, Any] = experiment.TRAINING | {
    "rank": 16,
    "num_tokens": 4,
    "steps": 800,
    "learning_rate": 5e-3,
    "caption": "a sticker of {}",
    "samples": False,  # the sheet shows the result
    # What the base can do with a class, and pictures may not show.
    "preserve_phrases": (
        "a sticker of a large {}",
        "a sticker of a small {}",
        "a sticker of {} on the left",
        "a sticker of {} on the right",
        "a sticker of {} at the top",
        "a sticker of {} at the bottom",
        "a sticker of {} on a yellow background",
        "a sticker of {} on a striped blue background",
        "a sticker of {} to the left of a banana",
        "a sticker of {} to the right of a rose",
    ),
}

#: The prompts of the sheet, with {} for the trigger.
PROMPTS = (
    "a sticker of a large {} in the middle on a blue background",
    "a sticker of a small {} in the middle on a pink background",
    "a sticker of {} on the left on a yellow background",
    "a sticker of {} on the right on a green background",
    "a sticker of {} at the bottom on a striped red background",
    "a sticker of a large {} on a dotted purple background",
    "a sticker of a large {} on a checked orange background",
    "a sticker of {} to the left of a banana on a turquoise background",
    "a sticker of {} to the right of a rose on a white background",
    "a sticker of {} above a bicycle on a grey background",
)
# Guidance at which the base's own samples are drawn.
SEED, GUIDANCE = 1, 4.0
_COLUMNS = 5
_MAX_NAME_LENGTH = 32


def run_own_drawing(
    images: str | Path,
    folder: str | Path = "demo",
    name: str | None = None,
    class_word: str | None = None,
) -> Path:
    """Learn what pictures show, draw it in new scenes, and return the sheet of both.

    Args:
        images: Folder of 1 to 20 pictures of one drawing or thing, with or without captions.
        folder: Receives the concept, `concepts/NAME`, and the sheet, `own.png`.
        name: Of the concept; None: the name of the folder of pictures.
        class_word: What kind of thing it is, in a word of the base's captions; None: an animal.

    Raises:
        CustomizeError: The bundled base of stickers is missing.
        ConfigError: The name or the class word is invalid.
        DataError: There are no pictures or too many, or one or its caption is unusable.
        SettingsError: The folder contains a concept of this name from other pictures or settings.
        StorageError: The folder cannot be written.
    """
    from diffusers import DiffusionPipeline
    from rich.console import Console

    from customize.api.pipeline_methods import load_custom
    from customize.evaluation.storybook_rates import draw_prompts
    from customize.training.config import TrainConfig

    images, folder, console = Path(images), Path(folder), Console(highlight=False, markup=False)
    base = stickers_folder()
    pictures = read_pictures(images)
    name = concept_name(images) if name is None else name
    class_word = CLASS_WORD if class_word is None else class_word
    config = TrainConfig(
        base=BASE_NAME,
        images=images,
        output=folder / "concepts" / name,
        name=name,
        class_word=class_word,
        **TRAINING,
    )
    source = f"{plural(len(pictures), 'image')} of the class {one_line(class_word)}"
    console.print(f"1/2 learning {config.trigger} from {source}")
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    fix = "choose another --name or --output, or delete that folder"
    load_custom(pipe, train_or_load(config, pipe.components, fix))
    console.print(f"2/2 drawing {config.trigger}")
    prompts = [prompt.replace("{}", config.trigger) for prompt in PROMPTS]
    sheet = draw_sheet(pictures, prompts, draw_prompts(pipe, prompts, SEED, guidance=GUIDANCE))
    path = save_sheet(sheet, folder / "own.png")
    console.print(f"\nImage: {path}\n\nTo use the concept in Python:\n", soft_wrap=True)
    prompt = f"a sticker of a large {config.trigger}"
    snippet = loading_snippet(BASE_NAME, [config.output], prompt, f"{name}.png")
    console.print(snippet, soft_wrap=True)
    return path


def concept_name(images: Path) -> str:
    """The name of a folder as that of a concept: "My star!" becomes "my-star".

    A folder whose name has no Latin letter or digit gives "own".
    """
    name = re.sub(r"[^a-z0-9_]+", "-", images.resolve().name.lower())
    return name.strip("-_")[:_MAX_NAME_LENGTH].rstrip("-_") or "own"


def read_pictures(images: Path) -> list[Image.Image]:
    """Read the pictures of a folder: RGB, upright, of any size.

    Raises:
        DataError: There are no pictures or too many, or one is unreadable.
    """
    from customize.image_folder import scan_folder
    from customize.training.data.dataset import read_image

    paths = scan_folder(images).images
    if len(paths) > MAX_IMAGES:
        raise DataError(
            f"there are {len(paths)} images in the folder, more than the {MAX_IMAGES} that the "
            "demo learns from",
            where=images,
            fix="put a few pictures of one drawing or thing into a folder of their own",
        )
    return [read_image(path) for path in paths]


def draw_sheet(
    pictures: Sequence[Image.Image], prompts: Sequence[str], drawn: Tensor
) -> Image.Image:
    """The pictures to learn from in the first row, and the drawn ones with their prompts below.

    Args:
        pictures: RGB; the first five are shown, cropped to squares as training does.
        prompts: One for each drawn picture.
        drawn: (prompts, 3, height, width) in [-1, 1].
    """
    from customize.training.data.dataset import crop_and_resize

    first = pictures[:_COLUMNS]
    sides = [min(picture.size) for picture in first]
    squares = [
        crop_and_resize(picture, (side, side), Image.Resampling.LANCZOS)
        for picture, side in zip(first, sides, strict=True)
    ]
    cells = [*zip(tensor_to_images(drawn), prompts, strict=True)]
    return draw_captioned_rows(
        [
            [(square, "your picture") for square in squares],
            *(cells[k : k + _COLUMNS] for k in range(0, len(cells), _COLUMNS)),
        ]
    )


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Save a sheet, in a folder that is created if it is missing, and return its path.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise storage_error(error, path, "the sheet", "name another folder") from error
    return path
