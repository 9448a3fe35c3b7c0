"""The positions that preservation losses on texts compare."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customize.core.preservation.positions import (
    POOLINGS,
    common_positions,
    gather_positions,
    normalize_rows,
)

BEGIN, END = 98, 99


def test_rows_without_counting_positions_stay_zero():
    assert normalize_rows(torch.tensor([[False, False], [True, True]])).tolist() == [
        [0, 0],
        [0.5, 0.5],
    ]


WORDS = st.lists(st.integers(0, 9), max_size=6)


@given(before=WORDS, learned=WORDS, base=WORDS, after=WORDS)
def test_common_positions_pair_equal_ids_once(before, learned, base, after):
    a = [BEGIN, *before, *learned, *after, END]
    b = [BEGIN, *before, *base, *after, END]
    first, second = common_positions(a, b)
    assert [a[i] for i in first] == [b[i] for i in second]
    assert first == sorted(set(first)) and second == sorted(set(second))
    # Never less than what is known to be common.
    assert len(first) >= min(len(before) + len(after) + 2, len(a), len(b))
    # In order, and without a gap but the one in the middle.
    for positions, length in ((first, len(a)), (second, len(b))):
        gaps = [y - x for x, y in pairwise(positions) if y - x != 1]
        assert len(gaps) <= 1 and positions[0] == 0 and positions[-1] == length - 1


def test_common_positions_of_texts_of_different_lengths():
    photo, of, a, dog, on, beach, rex, rex_1, rex_2 = range(1, 10)
    learned = [BEGIN, photo, of, rex, rex_1, rex_2, on, beach, END]
    base = [BEGIN, photo, of, a, dog, on, beach, END]
    assert common_positions(learned, base) == ([0, 1, 2, 6, 7, 8], [0, 1, 2, 5, 6, 7])


def test_poolings_differ_where_an_id_is_above_the_end():
    new = END + 1
    positions = {name: pool([BEGIN, 3, new, 4, END, END], END) for name, pool in POOLINGS.items()}
    assert positions == {"end": 4, "published": 2}
    positions = {name: pool([BEGIN, 3, 4, END, END], END) for name, pool in POOLINGS.items()}
    assert positions == {"end": 3, "published": 3}
    with pytest.raises(ValueError):
        POOLINGS["end"]([BEGIN, 3], END)


def test_gather_positions_selects_per_row():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    selected = gather_positions(hidden, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(selected[0], hidden[0, [3, 0]]) and torch.equal(
        selected[1], hidden[1, [1, 1]]
    )


def test_texts_without_a_common_start_share_their_end_alone():
    assert common_positions([1, 2, 5], [3, 2, 5]) == ([1, 2], [1, 2])
    assert common_positions([1], [2]) == ([], [])
