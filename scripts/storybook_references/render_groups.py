"""Groups of drawn images, each of one identity, for the training of the miniature.

The scenes of the benchmarks (:data:`customize.evaluation.storybook_rates.SCENES`) and the
identities of concepts and benchmarks, which have other seeds, are not among them.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customize.atomic import write_atomic
from customize.evaluation.storybook_rates import SCENES
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import ACCESSORIES, BACKGROUNDS, Identity, compose_scene
from customize.storybook.world import random_identity as draw_identity

SEED = 22_001
IMAGES = 8
#: Background and accessory of an image: all but those that the benchmarks ask for.
COMBINATIONS = [(b, a) for b in BACKGROUNDS for a in ACCESSORIES if (b, a) not in SCENES]


@dataclass(frozen=True, eq=False)
class Groups:
    """Drawn groups.

    Attributes:
        pixels: (groups, images, 64, 64, 3), uint8.
        identities: Identity of each group.
        accessories: Accessory of each image of each group.
        backgrounds: Background of each image of each group.
    """

    pixels: np.ndarray[Any, Any]
    identities: list[Identity]
    accessories: list[list[str]]
    backgrounds: list[list[str]]


def make_group(index: int) -> tuple[Identity, list[tuple[str, str]], np.ndarray[Any, Any]]:
    """Draw a group: its identity, background and accessory of each image, and the images."""
    rng = np.random.default_rng((SEED, index))
    identity = draw_identity(rng)
    kinds = [COMBINATIONS[k] for k in rng.choice(len(COMBINATIONS), IMAGES, replace=False)]
    images = [
        np.asarray(draw_scene(compose_scene(rng, (identity,), (accessory,), background)))
        for background, accessory in kinds
    ]
    return identity, kinds, np.stack(images)


def render_groups(folder: Path, count: int, workers: int = 2) -> Groups:
    """Draw groups into a folder, or read those that are there."""
    path, facts = folder / "pixels.npy", folder / "groups.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (count, IMAGES, 64, 64, 3))
        rows = []
        with ProcessPoolExecutor(workers) as pool:
            groups = pool.map(make_group, range(count), chunksize=64)
            for index, (identity, kinds, images) in enumerate(groups):
                pixels[index] = images
                rows.append({"identity": vars(identity), "kinds": kinds})
        pixels.flush()
        write_atomic(facts, json.dumps(rows).encode())
    rows = json.loads(facts.read_text())
    identities = [
        Identity(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["identity"].items()})
        for row in rows
    ]
    return Groups(
        np.load(path, mmap_mode="r"),
        identities,
        [[accessory for _, accessory in row["kinds"]] for row in rows],
        [[background for background, _ in row["kinds"]] for row in rows],
    )


def patches(pixels: np.ndarray[Any, Any]) -> Tensor:
    """Cut images to patches as the image processor does.

    Args:
        pixels: (images, 64, 64, 3), uint8.

    Returns:
        (images * 64, 192), float32, in [-1, 1].
    """
    images = torch.tensor(np.array(pixels)).permute(0, 3, 1, 2)
    cut = images.reshape(-1, 3, 4, 2, 8, 4, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut.reshape(-1, 192).float() / 127.5 - 1.0
