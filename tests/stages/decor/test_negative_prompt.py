"""Unwanted phrases in negative prompts, which concepts do not adapt."""

from __future__ import annotations

import warnings

import pytest
import torch

import customize
from customize.families import family_of
from tests.pipeline.making import attached, modular
from tests.stages.decor.reference_formulas import AVOID, PROMPT, alike, draw, read
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl

NAMED = "red hat, striped cup"


def encoded(pipe, text):
    with torch.no_grad():
        return family_of(pipe.components).encode_prompts([text])["prompt_embeds"][0]


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize(
    ("negative", "expected"),
    [
        (None, NAMED),
        ("a blurry dog", f"a blurry dog, {NAMED}"),
        ("a red hat", "a red hat, striped cup"),
    ],
    ids=["none", "another", "one of them"],
)
def test_unwanted_phrases_are_appended_to_negative_prompts(make, negative, expected):
    pipe = attached(make)
    call = {} if negative is None else {"negative_prompt": negative}
    (words, answer, layer) = read(pipe, avoid=AVOID, **call)
    assert alike(words[0], encoded(pipe, expected))
    # The concept does not adapt the negative prompt.
    with torch.no_grad():
        base_values = layer.get_base_layer()(words)
    assert alike(answer[0], base_values[0]) and not alike(answer[1], base_values[1])
    settings = customize.Decor(negative="keep")
    (words, answer, _) = read(pipe.load_custom(settings), avoid=AVOID, **call)
    (before, plain, _) = read(pipe, **call)
    assert torch.equal(words[0], before[0]) and torch.equal(answer[0], plain[0])


def test_the_image_is_that_of_a_negative_prompt_without_the_concept():
    # At a negligible strength only the negative prompt has an effect.
    pipe = attached().load_custom(customize.Decor(strength=1e-9))
    image = draw(pipe, avoid=AVOID)
    names = family_of(pipe.components).cross_attention_layers()
    handles = [
        pipe.unet.get_submodule(f"{name}.{part}")
        .lora_B["customize"]
        .register_forward_hook(lambda _, args, output: torch.cat([0 * output[:1], output[1:]]))
        for name in names
        for part in ("to_k", "to_v")
    ]
    assert alike(image, draw(pipe, negative_prompt=NAMED))
    for handle in handles:
        handle.remove()
    assert not alike(image, draw(pipe, negative_prompt=NAMED))


def test_prompts_of_a_batch_have_separate_negative_prompts():
    pipe = attached()
    prompts = [PROMPT, "<rex> wearing a red hat", "<rex> with a red hat and a striped cup"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (words, answer, layer) = read(pipe, prompts, seeds=(1, 2, 3), avoid=AVOID)
        (_, plain, _) = read(pipe, prompts, seeds=(1, 2, 3))
    expected = [NAMED, "striped cup", ""]
    assert all(alike(o, encoded(pipe, text)) for o, text in zip(words, expected, strict=False))
    with torch.no_grad():
        base_values = layer.get_base_layer()(words)
    assert [alike(answer[k], base_values[k]) for k in range(6)] == [True, True, *[False] * 4]
    assert torch.equal(answer[2], plain[2]) and torch.equal(answer[5], plain[5])


def test_negative_prompts_that_name_the_concept_are_adapted():
    pipe = attached()
    (words, answer, layer) = read(pipe, avoid=AVOID, negative_prompt="a photo of <rex>")
    assert alike(words[0], encoded(pipe, f"a photo of <rex>, {NAMED}"))
    with torch.no_grad():
        assert not alike(answer[0], layer.get_base_layer()(words)[0])


def test_negative_embeddings_are_unchanged():
    pipe = attached()
    embeddings = encoded(pipe, "a dog")[None]
    words = read(pipe, avoid=AVOID, negative_prompt_embeds=embeddings)[0]
    assert alike(words[0], embeddings[0])


def test_lists_of_different_lengths_raise_the_pipelines_error():
    pipe = attached()
    call = {"avoid": AVOID, "negative_prompt": ["a dog", "a cat"]}
    with pytest.raises((ValueError, TypeError)):
        draw(pipe, [PROMPT] * 3, seeds=(1, 2, 3), **call)


def test_adding_phrases_does_not_enable_true_guidance():
    pipe = attached(tiny_flux)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draw(pipe, avoid=AVOID, true_cfg_scale=4.0)
    assert len(calls) == 2


def test_modular_pipelines_extend_negative_prompts():
    pipe = modular(attached(tiny_sdxl)).load_custom()
    extended = draw(pipe, output_type="np", avoid=AVOID)
    pipe.load_custom(customize.Decor(negative="keep"))
    unchanged = draw(pipe, output_type="np", avoid=AVOID)
    assert abs(extended - unchanged).max() > 1e-3
