"""Class pictures for learning: what the base draws of its whole world."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from customize.errors import StorageError
from customize.evaluation import storybook
from customize.storybook.captions import caption
from customize.storybook.world import random_scene
from customize.training.base import weights_of
from customize.training.checkpoint import write_whole

COUNT = 96
#: With as many of them as of the concept's own in a step.
SETTINGS = {"prior_weight": 1.0, "prior_count": COUNT, "batch_size": 3}


def draw_world(folder: Path, pipe: Any) -> Path:
    """Draw the base's whole world into a folder within `folder`, captions beside, and return that.

    These are the class pictures of every concept. Those that are there stay: the folder is named
    by the base's weights.

    Raises:
        StorageError: a picture can't be written.
    """

    weights = repr(sorted(weights_of("", pipe.components).items()))
    folder = folder / hashlib.sha256(weights.encode()).hexdigest()[:8]
    rng = np.random.default_rng(0)
    captions = [caption(random_scene(rng), rng) for _ in range(COUNT)]
    paths = [folder / f"{number:03d}.png" for number in range(len(captions))]
    if all(path.is_file() for path in paths):
        return folder
    with tqdm(total=len(captions), desc="drawing class pictures", unit="picture") as bar:
        pictures = storybook.draw_groups(pipe, {"all": captions}, 100, bar.update)["all"]
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text, array in zip(paths, captions, arrays, strict=True):
            path.with_suffix(".txt").write_text(text + "\n")
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            write_whole(path, buffer.getvalue())
    except OSError as error:
        raise StorageError(
            f"class pictures can't be written: {error.strerror}",
            where=folder,
            fix="free some space or name another folder",
        ) from error
    return folder
