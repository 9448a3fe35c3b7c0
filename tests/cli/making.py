"""Shared by tests of the command line: results of a command, folders, images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from customize.concepts.input_statistics import LayerInputs, digest_updates
from customize.concepts.io.write_concept import save_concept
from customize.concepts.types import Concept
from tests.pipeline.making import concept
from tests.tiny import tiny_sd


@dataclass(frozen=True)
class World:
    """Folders of a pipeline and of two concepts trained on it."""

    base: str
    rex: str
    tom: str


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def save_world(root: Path) -> World:
    """Save a tiny pipeline and two concepts with disjoint slices."""
    pipe = tiny_sd()
    pipe.save_pretrained(root / "base")
    for index, name in enumerate(("rex", "tom")):
        save_concept(concept(pipe, name, index=index), root / name)
    return World(str(root / "base"), str(root / "rex"), str(root / "tom"))


def refused(result: Result, *words: str) -> None:
    """Assert exit code 2, an empty stdout, and one line on stderr with these words."""
    assert result.code == 2, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


def photos(folder: Path, count: int = 2, side: int = 40) -> Path:
    """A folder of distinct noise images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def record_of(made: Concept) -> LayerInputs:
    """Save layer inputs of this concept, of a layer that no model has."""
    rows = {"unet": {"x": torch.ones(1, 2)}}
    return LayerInputs(digest_updates(made.updates), rows, rows)
