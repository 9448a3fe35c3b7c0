"""Training data of attributes: a target that takes some attributes from named references.

The other attributes of a target are drawn at random, so a model that copies more than it was asked
for is wrong on average.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from customize.atomic import write_atomic
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import Identity, compose_scene
from customize.storybook.world import random_identity as draw_identity

from .mllm import ATTRIBUTES
from .render_groups import COMBINATIONS

SEED = 22_002
MAX_SOURCES = 3


@dataclass(frozen=True, eq=False)
class AttributeGroups:
    """Targets with their sources.

    Attributes:
        pixels: (targets, 1 + MAX_SOURCES, 64, 64, 3), uint8: the target, then its sources.
        attributes: For each target the attribute that each source gives.
        captions: Caption of each target without what the sources give.
    """

    pixels: np.ndarray[Any, Any]
    attributes: list[list[str]]
    captions: list[str]


def transfer(target: Identity, source: Identity, attribute: str) -> Identity:
    """Return a target with an attribute of a source; accessory and background are not of it."""
    parts = {
        "colour": ("body", "accent", "mark", "eye"),
        "pattern": ("pattern", "mark_seed"),
        "shape": ("width", "height", "head", "ear", "eye_size"),
    }.get(attribute, ())
    return dataclasses.replace(target, **{part: getattr(source, part) for part in parts})


def make_attribute_group(index: int) -> tuple[list[str], str, np.ndarray[Any, Any]]:
    """Draw a target with its sources: their attributes, the caption, and the images."""
    from .captions import class_caption

    rng = np.random.default_rng((SEED, index))
    count = int(rng.integers(1, MAX_SOURCES + 1))
    names = [str(name) for name in rng.choice(ATTRIBUTES, count, replace=False)]
    identity = draw_identity(rng)
    given = [draw_identity(rng, identity.kind if name == "shape" else None) for name in names]
    for name, source in zip(names, given, strict=True):
        identity = transfer(identity, source, name)
    while True:  # until the target's scene is none that the benchmarks ask for
        background, accessory = _scene(rng)
        scenes = [_scene(rng) for _ in names]
        if "background" in names:
            background = scenes[names.index("background")][0]
        if "accessory" in names:
            accessory = scenes[names.index("accessory")][1]
        if (background, accessory) in COMBINATIONS:
            break
    sources = [
        compose_scene(rng, (source,), (scene[1],), scene[0])
        for source, scene in zip(given, scenes, strict=True)
    ]
    caption = class_caption(
        identity.kind,
        None if "accessory" in names else accessory,
        None if "background" in names else background,
    )
    target = compose_scene(rng, (identity,), (accessory,), background)
    images = [np.asarray(draw_scene(scene)) for scene in (target, *sources)]
    images += [np.zeros_like(images[0])] * (MAX_SOURCES - count)
    return names, caption, np.stack(images)


def _scene(rng: np.random.Generator) -> tuple[str, str]:
    """A random background and accessory."""
    return COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]


def render_attribute_groups(folder: Path, count: int, workers: int = 2) -> AttributeGroups:
    """Draw targets and sources into a folder, or read those that are there."""
    path, facts = folder / "attribute_pixels.npy", folder / "attribute_groups.json"
    if not facts.exists():
        shape = (count, 1 + MAX_SOURCES, 64, 64, 3)
        pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        rows = []
        with ProcessPoolExecutor(workers) as pool:
            groups = pool.map(make_attribute_group, range(count), chunksize=64)
            for index, (names, caption, images) in enumerate(groups):
                pixels[index] = images
                rows.append({"attributes": names, "caption": caption})
        pixels.flush()
        write_atomic(facts, json.dumps(rows).encode())
    rows = json.loads(facts.read_text())
    return AttributeGroups(
        np.load(path, mmap_mode="r"),
        [row["attributes"] for row in rows],
        [row["caption"] for row in rows],
    )
