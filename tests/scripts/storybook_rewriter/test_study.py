"""The prompts of the study, its cheap rival, and the rates of its texts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from customize.rewriting.required_terms import required_terms
from customize.storybook.caption_grammar import PromptRequest, RequestedThing
from customize.storybook.user_prompts import HELD_OUT_WORDS, KINDS, UserPrompt, is_held_out
from storybook_rewriter.study_prompts import held_out_prompts, training_prompts, tuning_prompts
from storybook_rewriter.word_rules import apply_word_rules

sys.path.append(str(Path(__file__).parents[3] / "scripts/bench"))

from _rewritings import added_things, keeps

RED_DOG = PromptRequest((RequestedThing("dog", "red", None, "hat"),), "beach")


def test_held_out_prompts_have_combinations_and_words_that_no_training_has():
    held_out = [prompt for prompt in held_out_prompts(120) if prompt.kind != KINDS[-1]]
    trained = [*training_prompts(240), *tuning_prompts(60)]
    assert all(is_held_out(prompt.request) for prompt in held_out)
    assert not any(is_held_out(p.request) for p in trained if p.kind != KINDS[-1])
    texts = " ".join(prompt.text for prompt in trained)
    assert not any(word in texts.split() for word in HELD_OUT_WORDS if " " not in word)
    assert any(word in " ".join(p.text for p in held_out).split() for word in HELD_OUT_WORDS)


def test_prompts_are_distinct_in_turns_of_kinds_and_the_same_again():
    prompts = held_out_prompts(48, "<rex>")
    assert len({prompt.text for prompt in prompts}) == 48
    assert set(Counter(prompt.kind for prompt in prompts).values()) == {8}
    assert sum(bool(prompt.trigger) for prompt in prompts) == 4
    assert prompts == held_out_prompts(48, "<rex>")


def test_training_prompts_have_triggers_with_and_without_exclusions():
    last = [prompt for prompt in training_prompts(180) if prompt.kind == KINDS[-1]]
    kinds = Counter((bool(prompt.trigger), bool(prompt.excluded)) for prompt in last)
    assert kinds == {(False, True): 10, (True, True): 10, (True, False): 10}
    triggers = [prompt.trigger for prompt in last if prompt.trigger]
    assert len(set(triggers)) == 20
    for prompt in last:
        assert prompt.trigger in prompt.text and prompt.trigger in prompt.caption
        assert bool(required_terms(prompt.text).excluded) == bool(prompt.excluded)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a crimson kitty wih spectacles", "a red cat with glasses"),
        ("an automobile at the seaside", "a car at the beach"),
        ("a phtoo of <puppy> in the woods", "a photo of <puppy> in the forest"),
        ("a beaker in the galaxy", "a beaker in the galaxy"),  # held out
        ("what I would really love", "what I would really love"),
    ],
)
def test_the_speller_corrects_and_replaces(prompt, expected):
    assert apply_word_rules(prompt) == expected


def test_added_things_are_those_that_nobody_asked_for():
    prompt = UserPrompt("short", "red dog hat, beach", RED_DOG, {}, "")
    assert added_things(prompt, "a crimson puppy wearing a cap at the shore") == set()
    assert added_things(prompt, "a red dog and a kitty in the woods") == {"cat", "forest"}
    without = UserPrompt(KINDS[-1], "a red dog, no scarf", RED_DOG, {"accessory": "scarf"}, "")
    assert added_things(without, "a plain red dog without a scarf and without glasses") == set()


def test_lost_triggers_and_wanted_exclusions_are_not_kept():
    prompt = UserPrompt(KINDS[-1], "a photo of <rex>, no hat", RED_DOG, {}, "", "<rex>")
    assert keeps(prompt, "a photo of <rex>")
    assert not keeps(prompt, "a photo of a dog")
    assert not keeps(prompt, "a photo of <rex> wearing a hat")
