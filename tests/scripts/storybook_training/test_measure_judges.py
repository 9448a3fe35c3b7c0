"""Area under the ROC curve and equal-error threshold."""

from __future__ import annotations

import pytest
import torch

from scripts.storybook_training.measure_judges import auc, equal_error_threshold


def test_auc_of_known_cases():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9, 1.0])
    assert auc(low, high) == pytest.approx(1)
    assert auc(high, low) == pytest.approx(0)
    # Of the four pairs, only (0.5, 0.4) is the wrong way round.
    assert auc(torch.tensor([0.1, 0.5]), torch.tensor([0.4, 0.9])) == pytest.approx(0.75)


def test_auc_counts_pairs():
    torch.manual_seed(0)
    positive, negative = torch.rand(40), torch.rand(70) + 0.3
    pairs = (positive[:, None] < negative[None]).float().mean().item()
    assert auc(positive, negative) == pytest.approx(pairs, abs=1e-5)


def test_equal_error_of_known_cases():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9])
    threshold = equal_error_threshold(low, high)
    assert 0.3 <= threshold + 1e-6 < 0.7
    positive, negative = torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.4, 0.7, 0.8, 0.9])
    threshold = equal_error_threshold(positive, negative)
    assert (positive > threshold).float().mean() == (negative <= threshold).float().mean() == 0.25
