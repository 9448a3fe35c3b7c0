"""Articles of classes in the place of triggers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.stages.articles import begins_phrase
from customize.text import with_article

BEGINNINGS = (
    *("", "a photo of ", "a photo of <rex> and ", "A Dog BEHIND ", "<rex>, ", "<rex> ", "("),
    *("<rex> hugging ", "a dog hugging ", "<rex> vs ", "next to "),
)
CONTINUATIONS = (
    *("a ", "The ", "my ", "a red ", "a very happy ", "two ", "red ", "oil painting, blue "),
    *("a smiling ", "the sleeping ", "a close-up photo of my "),
)


@pytest.mark.parametrize("text", BEGINNINGS)
def test_a_noun_needs_an_article_where_a_phrase_begins(text):
    assert begins_phrase(text)


@pytest.mark.parametrize("text", CONTINUATIONS)
def test_behind_a_determiner_an_adjective_or_a_number_it_needs_none(text):
    assert not begins_phrase(text)


@given(st.text(max_size=40), st.sampled_from(["a", "an", "the", "my", "two", "red"]))
def test_what_stands_before_a_determiner_does_not_matter(before, word):
    assert not begins_phrase(f"{before} {word} ")


def test_articles_fit_the_noun():
    assert [with_article(noun) for noun in ("dog", "animal")] == ["a dog", "an animal"]
