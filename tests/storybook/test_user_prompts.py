"""Prompts of users of the storybook, and the captions that ask for the same."""

from __future__ import annotations

import numpy as np
import pytest

from customize.rewriting.required_terms import find_problems, required_terms
from customize.storybook.caption_grammar import WORDS, parse_prompt
from customize.storybook.user_prompts import (
    HELD_OUT_WORDS,
    KINDS,
    SYNONYMS,
    misspell,
    random_request,
    write_caption,
    write_user_prompt,
)


def prompts(kind, count=60, **settings):
    return [write_user_prompt(np.random.default_rng(k), kind, **settings) for k in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_caption_asks_for_what_the_prompt_asks(kind):
    for prompt in prompts(kind):
        asked = parse_prompt(prompt.caption)
        assert asked.background == prompt.request.background
        for thing, wanted in zip(asked.things, prompt.request.things, strict=True):
            assert (thing.kind, thing.colour, thing.accessory) == (
                wanted.kind,
                wanted.colour,
                wanted.accessory,
            )
            assert thing.pattern == (wanted.pattern or ("plain" if prompt.excluded else None)) or (
                "pattern" not in prompt.excluded and thing.pattern == wanted.pattern
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_caption_is_a_faithful_rewriting(kind):
    for held_out in (False, True):
        for prompt in prompts(kind, held_out=held_out, trigger="<rex>"):
            assert find_problems(required_terms(prompt.text), prompt.caption) == []
            assert ("<rex>" in prompt.caption) == (kind == KINDS[-1])


def test_prompts_are_repeatable_and_differ():
    for kind in KINDS:
        texts = [prompt.text for prompt in prompts(kind)]
        assert texts == [prompt.text for prompt in prompts(kind)]
        assert len(set(texts)) > 50


def test_held_out_words_are_in_prompts_that_ask_for_them_alone():
    def words(held_out):
        return {word for p in prompts("unseen words", held_out=held_out) for word in p.text.split()}

    assert not HELD_OUT_WORDS & words(False)
    assert len(HELD_OUT_WORDS & words(True)) > 10
    assert len(HELD_OUT_WORDS) == len(SYNONYMS) == sum(len(s) for s in SYNONYMS.values()) // 3


def test_the_base_knows_no_synonym():
    known = set(WORDS)
    for words in SYNONYMS.values():
        for phrase in words:
            assert any(word not in known for word in phrase.split()), phrase


def test_excluded_things_are_not_asked_for():
    for prompt in prompts(KINDS[-1]):
        (thing,) = prompt.request.things
        for attribute, word in prompt.excluded.items():
            assert getattr(thing, attribute) != word
            assert word not in prompt.caption.split()


def test_misspellings_change_one_place():
    rng = np.random.default_rng(0)
    for word in ("dog", "striped", "glasses"):
        for _ in range(20):
            assert abs(len(misspell(rng, word)) - len(word)) <= 1
    assert misspell(rng, "a") == "a"


def test_two_things_keep_their_order():
    request = random_request(np.random.default_rng(3), two=1.0)
    names = [thing.kind for thing in request.things]
    caption = write_caption(request)
    assert caption.index(names[0]) < caption.index(names[1])
