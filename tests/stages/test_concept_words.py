"""The concepts that a prompt names, their classes in place of them, and their tokens."""

from __future__ import annotations

import pytest
import torch

from customize.errors import ConfigError
from customize.families import family_of
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from customize.stages.concept_words import (
    NamedConcept,
    encode_routed,
    named_concepts,
    token_positions,
    with_classes,
)
from tests.pipeline.making import concept
from tests.tiny import CLIP_LENGTH, tiny_sd, tiny_sdxl


def named(prompt, **classes):
    return tuple(
        NamedConcept(
            index, name, word, ((start := prompt.index(f"<{name}>"), start + len(name) + 2),)
        )
        for index, (name, word) in enumerate(classes.items())
    )


def test_other_concepts_become_their_classes():
    prompt = "a photo of <rex> and <tom> on a beach"
    rex, tom = both = named(prompt, rex="dog", tom="animal")
    text, (of_rex, of_tom) = with_classes(prompt, both, rex)
    assert text == "a photo of <rex> and an animal on a beach"
    assert [text[slice(*span)] for span in (*of_rex, *of_tom)] == ["<rex>", "an animal"]
    text, (of_rex, of_tom) = with_classes(prompt, both, tom)
    assert text == "a photo of a dog and <tom> on a beach"
    assert [text[slice(*span)] for span in (*of_rex, *of_tom)] == ["a dog", "<tom>"]
    assert with_classes(prompt, both, None)[0] == "a photo of a dog and an animal on a beach"


@pytest.mark.parametrize("word", ["a", "The", "my"])
def test_articles_of_the_prompt_are_kept(word):
    prompt = f"{word} <rex> and <tom>"
    both = named(prompt, rex="dog", tom="cat")
    assert with_classes(prompt, both, both[1])[0] == f"{word} dog and <tom>"


def test_concepts_without_a_class_and_repeated_ones():
    prompt = "<rex>, <tom> and <rex>"
    rex = NamedConcept(0, "rex", "dog", ((0, 5), (17, 22)))
    tom = NamedConcept(1, "tom", "", ((7, 12),))
    assert with_classes(prompt, (rex, tom), tom)[0] == "a dog, <tom> and a dog"
    assert with_classes(prompt, (rex, tom), rex)[0] == prompt


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_positions_are_those_of_the_encoded_tokens(make):
    pipe = make()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    prompt = "a photo of <rex> and <tom> with <rex>"
    family = family_of(pipe.components)
    rex, tom = named_concepts(prompt, get_state(pipe))
    ids = pipe.tokenizer(prompt).input_ids
    for each in (rex, tom):
        tokens = pipe.tokenizer.convert_ids_to_tokens(
            [ids[p] for p in token_positions(family, prompt, each.spans)]
        )
        count = len(each.spans)
        assert tokens == [f"<{each.name}>", f"<{each.name}>_1"] * count
    assert len(rex.spans) == 2 and len(tom.spans) == 1


def test_prompts_that_are_cut_off_or_name_nothing():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    family, state = family_of(pipe.components), get_state(pipe)
    assert named_concepts("a dog and a cat", state) == ()
    last = "a " * (CLIP_LENGTH - 4) + "<rex>"
    (rex,) = named_concepts(last, state)
    assert token_positions(family, last, rex.spans) == (CLIP_LENGTH - 3, CLIP_LENGTH - 2)
    longer = "a " + last
    (rex,) = named_concepts(longer, state)
    with pytest.raises(ConfigError, match="longer than the text encoder reads"):
        token_positions(family, longer, rex.spans)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_each_trigger_is_read_by_its_concept_alone_and_other_words_by_none(make):
    pipe, base = make(), make()
    concepts = [
        concept(pipe, name, index=index, class_word=word)
        for index, (name, word) in enumerate((("rex", "dog"), ("tom", "cat")))
    ]
    pipe.load_custom(*concepts, merge="sum")
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a photo of <rex> and <tom> on the beach"
    channels = rank_channels(family, state)
    (routed,) = encode_routed(family, state, channels, [prompt])

    def read(text):
        return family_of(base.components).encode_prompts([text])["prompt_embeds"][0]

    expected = read("a photo of a dog and a cat on the beach").clone()
    for each, positions, text in zip(
        concepts,
        routed.tokens,
        ("a photo of <rex> and a cat", "a photo of a dog and <tom>"),
        strict=True,
    ):
        base.load_custom(each)
        expected[list(positions)] = read(text)[list(positions)]
        base.unload_custom()
    assert torch.allclose(routed.keys, expected, atol=1e-4)
    assert torch.equal(routed.encoded, family.encode_prompts([prompt])["prompt_embeds"][0])
    assert not torch.allclose(routed.encoded, expected, atol=1e-2)


def test_classes_of_more_tokens_than_the_trigger_leave_no_gap():
    pipe, base = tiny_sd(), tiny_sd()
    rex = concept(pipe, class_word="red striped dog")
    pipe.load_custom(rex, concept(pipe, "tom", index=1, class_word="cat"), merge="sum")
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a <rex> and <tom> on the beach"
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    text = "a red striped dog and a cat on the beach"
    expected = family_of(base.components).encode_prompts([text])["prompt_embeds"][0]
    # "<rex>" has two tokens, and its class three.
    assert torch.allclose(routed.keys[4], expected[5], atol=1e-4)
    assert torch.allclose(routed.keys[7:-1], expected[8:], atol=1e-4)
    assert torch.allclose(routed.keys[-1], expected[-1], atol=1e-4)


def test_values_of_a_trigger_are_those_of_the_prompt_that_ends_with_it():
    pipe = tiny_sd()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_custom(rex, tom, merge="sum")
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a photo of <rex> and <tom> with <rex>"
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    of_rex, of_tom = routed.tokens
    rest = [k for k in range(CLIP_LENGTH) if k not in (*of_rex, *of_tom)]
    assert torch.equal(routed.values[rest], routed.keys[rest])
    pipe.unload_custom("rex")
    alone = family.encode_prompts(["a photo of <tom>"])["prompt_embeds"][0]
    assert torch.allclose(routed.values[list(of_tom)], alone[4:6], atol=1e-4)
    assert not torch.allclose(routed.keys[list(of_tom)], alone[4:6], atol=1e-2)
    assert torch.equal(routed.values[list(of_rex[:2])], routed.values[list(of_rex[2:])])
