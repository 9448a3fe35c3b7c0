"""Which encodings the regional denoiser and DECOR take for those of one prompt."""

from __future__ import annotations

import pytest
import torch

from customize.stages.decor.kv_updates import RowMatcher
from customize.stages.prompt_rows import is_same_prompt


def encoding(tokens=7, width=16):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def at_relative_distance(text, distance):
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
    return text + noise * (distance * text.norm() / noise.norm())


@pytest.mark.parametrize(("distance", "is_same"), [(0, True), (0.019, True), (0.021, False)])
def test_encodings_of_one_prompt_differ_by_less_than_two_percent(distance, is_same):
    expected = encoding()
    text = at_relative_distance(expected, distance)
    assert is_same_prompt(text, expected) is is_same
    matcher = RowMatcher([expected], [], {("hat",): []}, 1.0)
    ((strength,), factor) = matcher.row_strengths(text[None], 0)
    assert strength.tolist() == [[0.0 if is_same else 1.0]]  # a protected text is not cleaned
    assert factor.tolist() == [[[1.0]]]


def test_rounding_to_bfloat16_is_tolerated():
    expected = encoding()
    assert is_same_prompt(expected.bfloat16(), expected)
    assert is_same_prompt(expected, expected.bfloat16())


def test_shorter_encodings_are_padded_with_zeros():
    expected = encoding()
    longer = torch.cat([expected, torch.zeros(3, 16)])
    assert is_same_prompt(longer, expected) and is_same_prompt(expected, longer)
    longer[-1] = 1.0
    assert not is_same_prompt(longer, expected) and not is_same_prompt(expected, longer)
    assert not is_same_prompt(expected[:-1], expected)


def test_encodings_of_other_widths_do_not_match():
    assert not is_same_prompt(encoding(width=8), encoding())
