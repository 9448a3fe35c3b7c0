"""The concepts that a prompt names, their classes in place of them, and their tokens."""

from __future__ import annotations

import pytest
import torch

from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
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


def test_adjectives_and_numbers_of_the_prompt_are_kept():
    prompt = "two red <rex> and a happy <tom>"
    both = named(prompt, rex="dog", tom="cat")
    assert with_classes(prompt, both, None)[0] == "two red dog and a happy cat"


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
def test_rows_of_a_concept_are_those_of_its_class_plus_what_it_changed_alone(make):
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

    # Tokens: begin, "a photo of", 4 and 5 "<rex>" or "a dog", 6 "and", 7 and 8 the second one.
    classes = read("a photo of a dog and a cat on the beach")
    expected = classes.clone()
    for each, at, word in zip(concepts, ((4, 5), (7, 8)), ("dog", "cat"), strict=True):
        in_class = read(f"a photo of a {word}")[5]
        base.load_custom(each)
        alone = read(f"a photo of <{each.info.name}>")[4:6]
        base.unload_custom()
        expected[list(at)] = classes[at[1]] + alone - in_class
    assert routed.tokens == ((4, 5), (7, 8))
    assert torch.allclose(routed.rows, expected, atol=1e-4)
    assert torch.equal(routed.encoded, family.encode_prompts([prompt])["prompt_embeds"][0])
    assert not torch.allclose(routed.encoded, expected, atol=1e-2)


@pytest.mark.parametrize("caption", ["a photo of {}", "the picture of {} on a beach"])
def test_a_concept_in_the_caption_that_it_was_learned_by_is_read_as_without_routing(caption):
    pipe = tiny_sd()
    training = {"settings": {"caption": caption}}
    pipe.load_custom(concept(pipe, class_word="dog", training=training))
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = caption.replace("{}", "<rex>")
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    assert routed.tokens == ((4, 5),)
    assert torch.allclose(routed.rows[4:6], routed.encoded[4:6], atol=1e-4)


def test_classes_of_more_tokens_than_the_trigger_leave_no_gap():
    pipe, base = tiny_sd(), tiny_sd()
    rex = concept(pipe, class_word="red striped dog")
    pipe.load_custom(rex, concept(pipe, "tom", index=1, class_word="cat"), merge="sum")
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a <rex> and <tom> on the beach"
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])

    def read(text):
        return family_of(base.components).encode_prompts([text])["prompt_embeds"][0]

    expected = read("a red striped dog and a cat on the beach")
    # "<rex>" has two tokens, and its class three.
    assert torch.allclose(routed.rows[4], expected[5], atol=1e-4)
    assert torch.allclose(routed.rows[7:-1], expected[8:], atol=1e-4)
    assert torch.allclose(routed.rows[-1], expected[-1], atol=1e-4)
    in_class = read("a photo of a red striped dog")[7]
    base.load_custom(rex)
    alone = read("a photo of <rex>")[4:6]
    assert torch.allclose(routed.rows[2:4], expected[4] + alone - in_class, atol=1e-4)


def test_a_lora_without_a_class_is_read_behind_the_classes_of_the_others():
    pipe = tiny_sd()
    layer = "unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = pipe.components[layer[0]].get_submodule(layer[1]).weight
    update = LowRank(torch.randn(len(weight), 2), torch.randn(2, weight.shape[1]), 0.1)
    lora = Lora(
        LoraInfo("hat", "sd", "", 2, trigger_words="red hat"), {layer[0]: {layer[1]: update}}
    )
    pipe.load_custom(concept(pipe, class_word="dog"), lora)
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a photo of <rex> and red hat on the beach"
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    text = "a photo of a dog and red hat on the beach"
    expected = family_of(tiny_sd().components).encode_prompts([text])["prompt_embeds"][0]
    assert torch.allclose(routed.rows[6:], expected[6:], atol=1e-4)


def test_a_concept_that_is_named_twice_is_the_same_change_of_both_places():
    pipe, base = tiny_sd(), tiny_sd()
    pipe.load_custom(concept(pipe, class_word="dog"), concept(pipe, "tom", index=1))
    family, state = family_of(pipe.components), get_state(pipe)
    prompt = "a photo of <rex> and <tom> with <rex>"
    (routed,) = encode_routed(family, state, rank_channels(family, state), [prompt])
    assert routed.tokens[0] == (4, 5, 10, 11)
    text = "a photo of a dog and a dog with a dog"
    classes = family_of(base.components).encode_prompts([text])["prompt_embeds"][0]
    first = routed.rows[[4, 5]] - classes[5]
    assert torch.allclose(routed.rows[[10, 11]] - classes[11], first, atol=1e-4)
