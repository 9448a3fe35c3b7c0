"""Preference pairs: margins, floors, faithfulness and length."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.errors import ConfigError
from customize.rewriting.preference_pairs import (
    Candidate,
    Pair,
    PairRule,
    best_rewritings,
    make_pairs,
    rank,
)

PROMPT = "a dog with <rex>"


def candidate(text, total, **rewards):
    return Candidate(text, rewards, total)


GOOD = candidate("a photo of <rex> dog", 3.0, clip=0.3)
FAIR = candidate("a <rex> dog", 2.0, clip=0.2)
POOR = candidate("<rex> and dog", 0.5, clip=0.1)
LOST = candidate("a wonderful dog", 9.0, clip=0.9)


def test_the_best_two_are_preferred_to_all_that_are_worse_by_the_margin():
    pairs = make_pairs(PROMPT, [POOR, GOOD, FAIR], PairRule(margin=1.2))
    assert pairs == [
        Pair(PROMPT, GOOD.text, POOR.text),
        Pair(PROMPT, FAIR.text, POOR.text),
    ]
    assert len(make_pairs(PROMPT, [POOR, GOOD, FAIR], PairRule(margin=0.5))) == 3
    assert make_pairs(PROMPT, [POOR, GOOD, FAIR], PairRule(margin=0.5, best=1))[-1].chosen == (
        GOOD.text
    )


def test_what_loses_the_request_is_never_preferred_whatever_it_scores():
    assert rank(PROMPT, [LOST, POOR])[0][1] == POOR
    assert make_pairs(PROMPT, [LOST, POOR], PairRule(margin=1.0)) == [
        Pair(PROMPT, POOR.text, LOST.text)
    ]
    assert make_pairs(PROMPT, [LOST], PairRule(margin=0.0)) == []


def test_floors_and_words():
    rule = PairRule(margin=0.1, floors={"clip": 0.25})
    assert {p.chosen for p in make_pairs(PROMPT, [POOR, GOOD, FAIR], rule)} == {GOOD.text}
    assert make_pairs(PROMPT, [FAIR, POOR], PairRule(0.1, floors={"other": 0.0})) == []
    assert make_pairs(PROMPT, [FAIR, POOR], PairRule(0.1, max_words=2)) == []


def test_length_earns_nothing():
    wordy = candidate("a <rex> dog " + "very " * 10, 3.0)
    assert make_pairs(PROMPT, [wordy, FAIR], PairRule(0.1)) == []
    assert make_pairs(PROMPT, [wordy, FAIR], PairRule(0.1, max_length_ratio=math.inf)) == [
        Pair(PROMPT, wordy.text, FAIR.text)
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from(["a <rex>", "b <rex>", "c <rex> d", "e"]), st.floats(-5, 5)),
        max_size=8,
    ),
    st.floats(0, 3),
)
def test_every_pair_keeps_the_rule(rows, margin):
    candidates = [candidate(text, total) for text, total in rows]
    totals = {each.text: each.total for each in candidates}
    for pair in make_pairs("<rex>", candidates, PairRule(margin)):
        assert "<rex>" in pair.chosen
        assert pair.chosen != pair.rejected
        assert "<rex>" not in pair.rejected or totals[pair.chosen] - totals[pair.rejected] > margin


def test_the_best_rewritings_beat_the_prompt_itself():
    prompt = "<rex>"
    own = candidate("<rex>", 1.0, clip=0.2)
    better, worse = candidate("a <rex>", 2.0, clip=0.3), candidate("b <rex>", 0.5, clip=0.3)
    assert best_rewritings({prompt: [own, worse, better]}, {}) == [(prompt, "a <rex>")]
    assert best_rewritings({prompt: [own, worse]}, {}) == []
    assert best_rewritings({prompt: [own, better]}, {"clip": 0.5}) == []
    assert best_rewritings({prompt: []}, {}) == []


@pytest.mark.parametrize(
    "values",
    [{"margin": -1}, {"margin": math.nan}, {"margin": 0, "best": 0}, {"margin": 0, "max_words": 0}],
)
def test_numbers_out_of_range_are_refused(values):
    with pytest.raises(ConfigError):
        PairRule(**values)
