"""What concepts add to a prompt, cleaned of what is not wanted."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import svd

import customize
from customize.errors import PipelineError
from customize.families import family_of
from customize.stages.decor.kv_updates import COLOURS
from tests.pipeline.making import attached, concept
from tests.stages.decor.cleaned import (
    AVOID,
    PLAIN,
    alike,
    draw,
    read,
    values_of,
    without,
    without_in_heads,
    words_of,
)
from tests.tiny import tiny_flux, tiny_sd


@pytest.mark.parametrize("by_head", [True, False])
def test_what_concepts_add_loses_it_and_what_the_base_reads_stays(by_head):
    pipe = attached().load_custom(customize.Decor(strength=1.5, by_head=by_head, **PLAIN))
    (words, before, layer), (same, after, _) = read(pipe), read(pipe, avoid=AVOID)
    assert torch.equal(words, same)
    base = layer.get_base_layer()
    unwanted = values_of(pipe, base)
    with torch.no_grad():
        said = base(words)
    assert torch.equal(before[0], after[0])
    wanted = without_in_heads if by_head else without
    assert alike((after - said)[1], wanted((before - said)[1], unwanted, 1.5))
    assert not alike(after[1], before[1])


@pytest.mark.parametrize("strength", ["auto", 0.5])
def test_as_far_as_it_is_more_than_chance(strength):
    pipe = attached().load_custom(customize.Decor(strength=strength, **PLAIN | {"surely": True}))
    (words, before, layer), after = read(pipe), read(pipe, avoid="hat")[1]
    base = layer.get_base_layer()
    with torch.no_grad():
        said = base(words)
    found = []
    for own, unwanted in zip(
        (before - said)[1].chunk(2, -1), values_of(pipe, base, ["hat"]).chunk(2, -1), strict=True
    ):
        inside, width = own - without(own, unwanted), own.shape[-1]
        share = inside.square().sum(-1) / own.square().sum(-1)
        spread = (2 / width * (1 - 1 / width) / (width + 2)) ** 0.5
        sure = ((share - 1 / width) / (2 * spread)).clamp(0, 1)
        found.append(own - (1.25 if strength == "auto" else strength) * sure[:, None] * inside)
    changed = torch.cat(found, -1)
    assert alike((after - said)[1], changed)
    assert not alike(changed, (before - said)[1])
    assert not alike(changed, without_in_heads((before - said)[1], values_of(pipe, base, ["hat"])))


def test_a_concept_keeps_its_colours_unless_told_otherwise():
    pipe = attached().load_custom(customize.Decor(strength=1.0, **PLAIN | {"colours": False}))
    (words, before, layer), after = read(pipe), read(pipe, avoid=AVOID)[1]
    base = layer.get_base_layer()
    colours = [words_of(pipe, each).mean(0) for each in COLOURS]
    with torch.no_grad():
        said, shades = base(words), base(torch.stack(colours))
    found = []
    parts = (before - said)[1], values_of(pipe, base), shades - shades.mean(0)
    for own, unwanted, tones in zip(*(part.chunk(2, -1) for part in parts), strict=True):
        kept = svd(tones)[2][: len(COLOURS) - 1]  # what all have in common is no colour
        _, sizes, right = svd(unwanted - unwanted @ kept.T @ kept, full_matrices=False)
        right = right[sizes > 1e-4]
        found.append(own - own @ right.T @ right)
        assert alike(own @ kept.T, found[-1] @ kept.T)
    assert alike((after - said)[1], torch.cat(found, -1))


def test_keys_are_cleaned_with_a_share_of_the_strength():
    pipe = attached()
    (name, *_) = family_of(pipe.components).cross_attention_layers()
    found = []
    for part in ("to_k", "to_v"):
        pipe.unet.get_submodule(f"{name}.{part}").register_forward_hook(
            lambda _, args, output, part=part: found.append((part, output[1].clone()))
        )

    def answers(avoid, **settings):
        found.clear()
        pipe.load_custom(customize.Decor(avoid, strength=1.0, **PLAIN | settings))
        draw(pipe, num_inference_steps=1)
        return dict(found)

    plain, values, half = answers(None), answers(AVOID), answers(AVOID, keys=0.5)
    whole = answers(AVOID, keys=1.0)
    assert torch.equal(plain["to_k"], values["to_k"])
    assert not torch.equal(plain["to_v"], values["to_v"])
    assert torch.equal(values["to_v"], whole["to_v"])
    assert not alike(plain["to_k"], whole["to_k"])
    assert alike(half["to_k"], (plain["to_k"] + whole["to_k"]) / 2)


def test_at_some_shares_of_noise_alone():
    pipe = attached()
    (layer, *_) = family_of(pipe.components).cross_attention_layers()
    answers = []
    pipe.unet.get_submodule(f"{layer}.to_v").register_forward_hook(
        lambda _, args, output: answers.append(output[1].clone())
    )
    found = {}
    for noise in (None, (0.0, 1.0), (0.5, 1.0), (0.0, 0.5)):
        answers.clear()
        settings = customize.Decor(target="concepts", **({"noise": noise} if noise else {}))
        draw(pipe.load_custom(settings), num_inference_steps=4, avoid=AVOID if noise else None)
        found[noise] = torch.stack(answers)
    on = [torch.equal(a, b) for a, b in zip(found[0.5, 1.0], found[0.0, 1.0], strict=True)]
    off = [torch.equal(a, b) for a, b in zip(found[0.5, 1.0], found[None], strict=True)]
    assert on == [True, True, False, False] and off == [False, False, True, True]
    late = [torch.equal(a, b) for a, b in zip(found[0.0, 0.5], found[None], strict=True)]
    assert late == on
    pipe.load_custom(customize.Decor(target="prompt", noise=(0.5, 1.0)))
    with pytest.raises(PipelineError, match="the same at all shares of noise"):
        draw(pipe, avoid=AVOID)


def test_layers_answer_anew_where_something_changes_on_the_way():
    pipe = attached()
    (name, *_) = family_of(pipe.components).cross_attention_layers()
    layer = pipe.unet.get_submodule(f"{name}.to_v")
    answers = []
    layer.register_forward_hook(lambda _, args, output: answers.append(output.clone()))

    def change(pipe, step, timestep, given):
        if step == 1:
            pipe.set_adapters(["customize"], [0.5])
        return given

    draw(pipe, avoid=AVOID, num_inference_steps=4, callback_on_step_end=change)
    first, second, third, last = answers
    assert torch.equal(first, second) and torch.equal(third, last)
    assert not torch.equal(second, third)
    assert "forward" not in vars(layer) and not layer.lora_B["customize"]._forward_hooks


def test_where_concepts_cannot_be_reached():
    fused = tiny_sd()
    fused.load_custom(concept(fused), fuse=True)
    plain = draw(fused)
    assert not torch.equal(draw(fused, avoid=AVOID), plain)  # the prompt
    for make, why in ((lambda: fused, "no concept is attached beside"), (tiny_flux, "family flux")):
        pipe = make().load_custom(customize.Decor(AVOID, target="concepts"))
        with pytest.raises(PipelineError, match=f'{why}.*target="prompt"'):
            draw(pipe)
    pipe = attached().load_custom(customize.Decor(AVOID, target="both"))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(PipelineError, match="compiled"):
        draw(pipe)


def test_what_fits_only_alone_is_read_alone():
    pipe = attached().load_custom(customize.Decor(rank=1, strength=1.0, **PLAIN))
    phrase = "red hat " * 10  # and not behind "a photo of a dog"
    (words, before, layer), after = read(pipe), read(pipe, avoid=phrase)[1]
    base = layer.get_base_layer()
    with torch.no_grad():
        said, unwanted = base(words), base(words_of(pipe, phrase))
    first = [svd(part, full_matrices=False)[2][:1] for part in unwanted.chunk(2, -1)]
    assert alike((after - said)[1], without_in_heads((before - said)[1], torch.cat(first, -1)))
