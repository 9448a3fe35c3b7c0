"""Unwanted phrases projected out of what concepts add to keys and values."""

from __future__ import annotations

import pytest
import torch

import customize
from customize.errors import PipelineError
from customize.families import family_of
from customize.pipeline.state import get_state
from customize.stages.decor.kv_updates import UpdateCleaner
from tests.pipeline.making import attached, concept
from tests.stages.decor.reference_formulas import (
    AVOID,
    VALUES_ONLY,
    alike,
    cleaned_update,
    colour_directions,
    draw,
    read,
    words_of,
)
from tests.tiny import tiny_flux, tiny_sd


def test_updates_are_cleaned_and_base_values_are_unchanged():
    pipe = attached().load_custom(customize.Decor(strength=1.5, **VALUES_ONLY))
    (words, before, layer), (same, after, _) = read(pipe), read(pipe, avoid=AVOID)
    assert torch.equal(words, same)
    base = layer.get_base_layer()
    with torch.no_grad():
        values = base(words)
    assert torch.equal(before[0], after[0])
    expected = cleaned_update(pipe, base, (before - values)[1], strength=1.5)
    assert alike((after - values)[1], expected)
    assert not alike(after[1], before[1])


@pytest.mark.parametrize("strength", ["auto", 0.5])
def test_rows_are_cleaned_as_far_as_they_overlap_more_than_chance(strength):
    pipe = attached().load_custom(customize.Decor(strength=strength, **VALUES_ONLY))
    (words, before, layer), after = read(pipe), read(pipe, avoid="cup")[1]
    base = layer.get_base_layer()
    with torch.no_grad():
        values = base(words)
    before, after = (before - values)[1], (after - values)[1]
    number = 1.25 if strength == "auto" else strength
    expected = cleaned_update(pipe, base, before, ["cup"], number)
    assert alike(after, expected)
    assert not alike(expected, before)
    assert not alike(expected, cleaned_update(pipe, base, before, ["cup"], number, False))


def test_concepts_keep_their_colours():
    pipe = attached().load_custom(customize.Decor(strength=1.0, **VALUES_ONLY))
    (words, before, layer), after = read(pipe), read(pipe, avoid=AVOID)[1]
    base = layer.get_base_layer()
    with torch.no_grad():
        values = base(words)
    parts = (before - values)[1].chunk(2, -1), (after - values)[1].chunk(2, -1)
    for old, new, colours in zip(*parts, colour_directions(pipe, base), strict=True):
        assert alike(new @ colours.T, old @ colours.T)
    assert not alike(after, before)


def test_keys_are_cleaned_with_a_fraction_of_the_strength():
    pipe = attached()
    (name, *_) = family_of(pipe.components).cross_attention_layers()
    outputs = []
    for part in ("to_k", "to_v"):
        pipe.unet.get_submodule(f"{name}.{part}").register_forward_hook(
            lambda _, args, output, part=part: outputs.append((part, output[1].clone()))
        )

    def answers(avoid, **settings):
        outputs.clear()
        pipe.load_custom(customize.Decor(avoid, strength=1.0, **VALUES_ONLY | settings))
        draw(pipe, num_inference_steps=1)
        return dict(outputs)

    plain, values, half = answers(None), answers(AVOID), answers(AVOID, keys=0.5)
    whole = answers(AVOID, keys=1.0)
    assert torch.equal(plain["to_k"], values["to_k"])
    assert not torch.equal(plain["to_v"], values["to_v"])
    assert torch.equal(values["to_v"], whole["to_v"])
    assert not alike(plain["to_k"], whole["to_k"])
    assert alike(half["to_k"], (plain["to_k"] + whole["to_k"]) / 2)


def test_layers_compute_again_where_adapters_change_during_a_call():
    pipe = attached()
    (name, *_) = family_of(pipe.components).cross_attention_layers()
    layer = pipe.unet.get_submodule(f"{name}.to_v")
    answers = []
    layer.register_forward_hook(lambda _, args, output: answers.append(output.clone()))

    def change(pipe, step, timestep, arguments):
        if step == 1:
            pipe.set_adapters(["customize"], [0.5])
        return arguments

    draw(pipe, avoid=AVOID, num_inference_steps=4, callback_on_step_end=change)
    first, second, third, last = answers
    assert torch.equal(first, second) and torch.equal(third, last)
    assert not torch.equal(second, third)
    assert "forward" not in vars(layer) and not layer.lora_B["customize"]._forward_hooks


def test_fused_compiled_and_missing_updates_are_refused():
    fused = tiny_sd()
    fused.load_custom(concept(fused), fuse=True)
    plain = draw(fused)
    assert not torch.equal(draw(fused, avoid=AVOID), plain)  # the prompt is cleaned instead
    for make, why in ((lambda: fused, "no unfused concept"), (tiny_flux, "family flux")):
        pipe = make().load_custom(customize.Decor(AVOID, target="concepts"))
        with pytest.raises(PipelineError, match=f'{why}.*target="prompt"'):
            draw(pipe)
    pipe = attached().load_custom(customize.Decor(AVOID, target="both"))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(PipelineError, match="compiled"):
        draw(pipe)


def test_phrases_that_fit_only_alone_are_encoded_alone():
    pipe = attached()
    family = family_of(pipe.components)
    phrase = "red hat " * 10  # too long after "a photo of a dog"
    cleaner = UpdateCleaner(family, get_state(pipe), [phrase, "hat"], [""], [], 0.25)
    assert torch.equal(cleaner.phrase_rows[phrase], words_of(pipe, phrase))
    assert not torch.equal(cleaner.phrase_rows["hat"], words_of(pipe, "hat"))
