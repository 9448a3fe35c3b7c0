"""Layer inputs that are recorded faster than by default, and concepts with them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import customize
from customize.concepts.input_statistics import layer_inputs_path, record_layer_inputs
from customize.concepts.io.write_concept import save_concept
from tests.pipeline.making import concept


def record_in_one_step(patch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of recordings in one step; the default takes eight times as long."""
    patch.setitem(inspect.unwrap(record_layer_inputs).__kwdefaults__, "steps", 1)


def recorded_concepts(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """Save a dog rex and a cat tom of disjoint slices with their layer inputs."""
    record_in_one_step(patch)
    folders = []
    for index, (name, class_word) in enumerate({"rex": "dog", "tom": "cat"}.items()):
        made = concept(pipe, name, index=index, class_word=class_word)
        folders.append(save_concept(made, folder / name))
        record = customize.record_inputs(pipe, folders[-1], ["a photo of {}"])
        record.save(layer_inputs_path(folders[-1]))
    return folders
