"""Words of the prompt that have references: which region reads them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from customize.errors import ConfigError
from tests.pipeline.making import concept
from tests.stages.test_reference_tokens import A, B, images, make

PROMPT = "a dog and a cat on a beach"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
CALL = {"regions": {"dog": LEFT, "cat": RIGHT}, "width": 64, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return make()[0]


def test_case_and_white_space_are_those_of_the_regions_prompt(pipe):
    expected = images(pipe, PROMPT, reference_images={"a dog": A}, **with_regions("a dog"))
    other = images(pipe, PROMPT, reference_images={" A  Dog": A}, **with_regions("a dog"))
    assert np.array_equal(other, expected)


def with_regions(words):
    return CALL | {"regions": {words: LEFT, "cat": RIGHT}}


@pytest.mark.parametrize(
    ("references", "problem"),
    [
        ({"dog": A, "beach": B}, "'beach' has references and no region"),
        ({"a dog": A}, "'a dog' has references and no region"),
        ({"dog": A, "Dog": B}, "two groups of references are for 'dog'"),
        ({"horse": A}, "does not contain 'horse'"),
    ],
)
def test_words_that_no_region_reads_are_refused(pipe, references, problem):
    with pytest.raises(ConfigError, match=problem):
        images(pipe, PROMPT, reference_images=references, **CALL)


def test_names_of_concepts_are_their_triggers(pipe):
    named = make()[0].load_custom(concept(make()[0], "rex"))
    call = CALL | {"regions": {"<rex>": LEFT, "cat": RIGHT}}
    prompt = "<rex> and a cat"
    expected = images(named, prompt, reference_images={"<rex>": A}, **call)
    assert np.array_equal(images(named, prompt, reference_images={"rex": A}, **call), expected)
    with pytest.raises(ConfigError, match="two groups of references are for '<rex>'"):
        images(named, prompt, reference_images={"rex": A, "<rex>": B}, **call)


def test_prompts_have_groups_and_scales_for_words_of_their_own(pipe):
    prompts = ["a dog on a beach", "a cat on a beach"]
    call = CALL | {"regions": [{"dog": LEFT}, {"cat": RIGHT}]}
    groups = [{"dog": A}, {"cat": B}]
    scaled = images(pipe, prompts, reference_images=groups, reference_scale={"cat": 0.0}, **call)
    for index, scale in enumerate((1.0, 0.0)):
        alone = images(
            pipe,
            prompts[index],
            reference_images=groups[index],
            reference_scale=scale,
            **call | {"regions": call["regions"][index]},
        )
        assert np.abs(scaled[index] - alone[0]).max() < 1e-4
    with pytest.raises(ConfigError, match="'horse', which has no references"):
        images(
            pipe,
            prompts,
            reference_images=groups,
            reference_scale={"cat": 0.5, "horse": 1.0},
            **call,
        )
