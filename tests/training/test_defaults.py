"""Training with the default settings; other tests disable the slow ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.read_concept import load_concept
from customize.concepts.slices.shared_directions import find_direction_files
from customize.training.config import TrainConfig
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import make_pictures, same, tensors

ROOT = Path(__file__).parents[2]
REQUIRED = {"base", "images", "name", "class_word", "output"}


def check_default_outputs(config: TrainConfig, losses: list[float]) -> dict[str, Any]:
    """Assert that everything that the defaults request is trained and written.

    Returns:
        The training facts of the concept.
    """
    assert config.model_fields_set - {"trigger", "steps"} == REQUIRED
    assert len(losses) == config.steps and all(map(math.isfinite, losses))
    concept = load_concept(config.output)
    for updates in concept.updates.values():
        for update in updates.values():
            assert update.rank == 8
            assert bool(torch.isfinite(update.up).all()) and update.up.abs().max() > 0
    assert concept.info.method == "orthogonal" and concept.info.slices
    assert all(len(rows) == 2 for rows in concept.embeddings.values())

    assert len(find_direction_files(config.output.parent)) == 1
    recording = LayerInputs.load(layer_inputs_path(config.output))
    layers = {component: set(updates) for component, updates in concept.updates.items()}
    for factors in (recording.concept, recording.generic):
        assert {component: set(rows) for component, rows in factors.items()} == layers

    facts = concept.info.training
    settings = facts["settings"]
    assert settings["preserve"] == {"context_output": 0.5}
    assert settings["num_shared_directions"] == 16 and settings["shared_directions"]
    samples = sorted(path.name for path in (config.output / "samples").iterdir())
    steps = [f"step-{step:06d}.png" for step in facts["samples"]["steps"]]
    assert samples == ["base.png", *steps] and facts["samples"]["steps"][-1] == config.steps
    return facts


def test_the_defaults_train_a_small_model(tmp_path: Path) -> None:
    """Only required settings, and few steps, because 800 would take a minute."""
    tiny_sd().save_pretrained(tmp_path / "base")
    config = TrainConfig(
        base=str(tmp_path / "base"),
        images=make_pictures(tmp_path / "images"),
        name="rex",
        class_word="dog",
        output=tmp_path / "out",
        steps=7,  # two of them have the preservation loss
    )
    losses: list[float] = []
    trained = train(config, progress=False, on_step=lambda _, loss: losses.append(float(loss)))
    check_default_outputs(config, losses)
    assert same(tensors(trained), tensors(load_concept(config.output)))


@pytest.mark.slow
def test_the_defaults_learn_a_concept_on_the_bundled_base(tmp_path: Path) -> None:
    config = TrainConfig(
        base=str(ROOT / "assets/storybook"),
        images=ROOT / "assets/concepts/rex",
        name="rex",
        class_word="dog",
        output=tmp_path / "out",
    )
    losses: list[float] = []
    train(config, progress=False, on_step=lambda _, loss: losses.append(float(loss)))
    facts = check_default_outputs(config, losses)
    assert config.steps == 800
    fixed = facts["fixed_loss"]
    assert fixed["learned"] < 0.9 * fixed["base"]
