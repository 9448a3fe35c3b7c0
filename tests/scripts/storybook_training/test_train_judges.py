"""Training of the judges: files."""

from __future__ import annotations

import json

import torch

from customize.storybook.judges import Judges, load_judges
from scripts.storybook_training.measure_judges import measure_judges
from scripts.storybook_training.train_judges import (
    save_judges,
    train_attributes,
    train_identity,
    train_judges,
)
from tests.storybook.making import random_judges


def test_training_measures_saves_and_loads_the_same_judges(tmp_path):
    trained = Judges(
        train_attributes(tmp_path, None, pictures=24, steps=2),
        train_identity(tmp_path, None, identities=16, steps=2),
        threshold=0.5,
    )
    figures = measure_judges(trained, None, pictures=30, identities=16)
    assert all(0 <= value <= 2 for value in figures.values())
    assert {"clean_accuracy", "rough_accuracy", "identity_auc", "threshold"} <= figures.keys()
    save_judges(trained, tmp_path / "judges", figures)
    assert json.loads((tmp_path / "judges/judges.json").read_text())["held_out"] == figures
    loaded = load_judges(tmp_path / "judges")
    assert loaded.threshold == 0.5
    for before, after in (
        (trained.attributes, loaded.attributes),
        (trained.identity, loaded.identity),
    ):
        assert not after.training
        halves = {
            k: v.half().to(v.dtype) if v.is_floating_point() else v
            for k, v in before.state_dict().items()
        }
        assert halves.keys() == after.state_dict().keys()
        assert all(torch.equal(value, halves[name]) for name, value in after.state_dict().items())


def test_finished_judges_are_not_trained_again(tmp_path):
    save_judges(random_judges(), tmp_path, {"identity_auc": 0.75})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train_judges(tmp_path, None) == {"identity_auc": 0.75}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
