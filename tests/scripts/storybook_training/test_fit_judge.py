"""The training loop of judges: resuming, files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from scripts.storybook_training.fit_judge import fit_judge, read_figures, write_judges


def fit_small(folder, steps, fail_at=None, bf16=False):
    """Fit a small network with running statistics, as the judges have; gives all its tensors."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    count = 0

    def loss_of(generator):
        nonlocal count
        count += 1
        if count == fail_at:
            raise KeyboardInterrupt
        return model(torch.randn(8, 4, generator=generator)).square().mean()

    folder.mkdir(exist_ok=True)
    fit_judge("net", folder, model, loss_of, steps, 1e-2, seed=5, every=2, bf16=bf16)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_training_equals_uninterrupted_training(tmp_path, bf16):
    expected = fit_small(tmp_path / "whole", 7, bf16=bf16)
    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path / "cut", 7, fail_at=6, bf16=bf16)
    actual = fit_small(tmp_path / "cut", 7, bf16=bf16)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_judges_are_written_in_float16_with_their_figures(tmp_path):
    tensors = {"weight": torch.ones(2), "count": torch.tensor(3)}
    assert read_figures(tmp_path) is None
    write_judges(tmp_path / "judges", {"net": tensors}, {"held_out": {"auc": 0.5}, "threshold": 1})
    written = load_file(tmp_path / "judges/net.safetensors")
    assert written["weight"].dtype == torch.float16
    assert written["count"].dtype == torch.int64
    assert json.loads((tmp_path / "judges/judges.json").read_text())["threshold"] == 1
    assert read_figures(tmp_path / "judges") == {"auc": 0.5}
