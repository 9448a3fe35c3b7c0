"""Prompts cleaned of what is not wanted: what is changed, what is not, what is refused."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch.linalg import svd

import customize
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from tests.pipeline.making import assert_same, attached, concept, everything, modular
from tests.stages.decor.cleaned import (
    AVOID,
    CLEAN,
    PHRASES,
    PLAIN,
    PROMPT,
    alike,
    draw,
    read,
    values_of,
    without,
    without_in_heads,
    words_of,
)
from tests.tiny import CLIP_LENGTH, tiny_flux, tiny_flux3, tiny_sd, tiny_sd3, tiny_sdxl


def test_the_call_shows_its_argument():
    assert inspect.signature(attached().__call__).parameters["avoid"].default is None


def test_words_of_the_prompt_lose_what_is_not_wanted_and_all_else_stays():
    pipe = attached().load_custom(CLEAN)
    before, after = read(pipe)[0], read(pipe, avoid=AVOID)[0]
    own = slice(1, 1 + len(words_of(pipe, PROMPT)))
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    assert torch.equal(after[0], before[0])  # of the empty prompt
    assert alike(after[1, own], without(before[1, own], unwanted))
    assert not alike(after[1, own], before[1, own])
    rest = [0, *range(own.stop, CLIP_LENGTH)]
    assert torch.equal(after[1, rest], before[1, rest])


@pytest.mark.parametrize(
    ("rows", "first"), [("words", 1), ("rest", 1), ("all", 0)], ids=["words", "rest", "all"]
)
def test_which_rows_are_changed(rows, first):
    pipe = attached()
    before = read(pipe)[0][1]
    pipe.load_custom(customize.Decor(AVOID, target="prompt", strength=0.5, rows=rows))
    changed = (read(pipe)[0][1] != before).any(1).tolist()
    words = len(words_of(pipe, PROMPT))
    stop = 1 + words if rows == "words" else CLIP_LENGTH
    assert changed == [first <= k < stop for k in range(CLIP_LENGTH)]


def test_rank_and_strength_are_those_of_the_formula():
    pipe = attached()
    before = read(pipe)[0][1, 1:6]
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    first = svd(unwanted, full_matrices=False)[2][:1]
    pipe.load_custom(customize.Decor(AVOID, target="prompt", strength=1.5, rank=1))
    assert alike(read(pipe)[0][1, 1:6], without(before, first, 1.5))
    plain = draw(pipe.load_custom(customize.Decor()))
    none = customize.Decor(AVOID, target="both", strength=0.0)
    assert torch.equal(draw(pipe.load_custom(none)), plain)


def test_what_all_texts_share_can_be_left_in():
    pipe = attached()
    before = read(pipe)[0][1, 1:6]
    pipe.load_custom(customize.Decor(AVOID, target="prompt", strength=1.0, centred=True))
    with torch.no_grad():
        empty = family_of(pipe.components).encode_prompts([""])["prompt_embeds"][0]
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES]) - empty[1:].mean(0)
    assert alike(read(pipe)[0][1, 1:6], without(before, unwanted))
    settings = {"target": "concepts", "strength": 1.0, **PLAIN}
    (words, plain, layer) = read(pipe.load_custom(customize.Decor(**settings)))
    after = read(pipe.load_custom(customize.Decor(AVOID, centred=True, **settings)))[1]
    base = layer.get_base_layer()
    with torch.no_grad():
        said, zero = base(words), base(empty[1:].mean(0))
    expected = without_in_heads((plain - said)[1], values_of(pipe, base) - zero)
    assert alike((after - said)[1], expected)


def test_negative_prompts_can_be_cleaned_as_well():
    pipe = attached()
    call = {"negative_prompt": "<rex> in a green scarf", "avoid": AVOID}
    words = slice(1, 1 + len(words_of(pipe, call["negative_prompt"])))
    for target in ("prompt", "concepts"):
        pipe.load_custom(customize.Decor(target=target, strength=1.0, negative="kept"))
        (kept, said, _), (asked, plain, _) = (
            read(pipe, **call),
            read(pipe, **call | {"avoid": None}),
        )
        assert torch.equal(kept[0], asked[0]) and torch.equal(said[0], plain[0])
        pipe.load_custom(customize.Decor(target=target, strength=1.0, negative="cleaned"))
        (other, answer, _) = read(pipe, **call)
        assert torch.equal(other[1], kept[1])
        assert torch.equal(other[0, words], kept[0, words]) is (target == "concepts")
        assert not torch.equal(answer[0, words], said[0, words])


def test_the_vector_of_a_whole_prompt_can_be_cleaned():
    pipe = attached(tiny_sdxl)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["text_embeds"]),
        with_kwargs=True,
    )
    call = {"num_inference_steps": 1, "avoid": AVOID}
    for pooled in (False, True):
        settings = customize.Decor(target="prompt", strength=1.0, pooled=pooled)
        draw(pipe.load_custom(settings), **call)
    draw(pipe, num_inference_steps=1)
    with torch.no_grad():
        read_pooled = [
            family_of(pipe.components).encode_prompts([text])["pooled_prompt_embeds"][0]
            for text in PHRASES
        ]
    kept, cleaned, plain = seen
    assert torch.equal(kept, plain) and torch.equal(cleaned[0], plain[0])
    assert alike(cleaned[1:], without(plain[1:], torch.stack(read_pooled)))


def test_by_itself_the_strength_leaves_words_nine_tenths_of_their_length():
    pipe = attached()
    prompt = "a photo of <rex> and a car"
    before = read(pipe, prompt)[0][1]
    pipe.load_custom(customize.Decor("cup, cat", target="prompt"))
    after = read(pipe, prompt)[0][1]
    ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    names = pipe.tokenizer.convert_ids_to_tokens(ids)
    share = (after.norm(dim=1) / before.norm(dim=1))[1 : 1 + len(ids)]
    own = [not name.startswith("<rex>") for name in names]
    assert own.count(False) == 2
    assert float(share[own].min()) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("target", ["prompt", "concepts", "both"])
def test_batches_are_drawn_as_each_alone_and_prompts_win(target):
    pipe = attached().load_custom(customize.Decor(AVOID, target=target, strength=1.0))
    other = "<rex> wearing a red cup"  # asks for words of both
    third = "two cats and <rex> in the forest with a blue cup"  # of one
    prompts = [PROMPT, other, third]
    call = {"negative_prompt": ["a dog", "", "a red hat"], "num_images_per_prompt": 2}
    with pytest.warns(UserWarning, match=r"asks for red hat, striped cup itself"):
        found = draw(pipe, prompts, seeds=range(6), **call)
    for k, prompt in enumerate(prompts):
        negative = {"negative_prompt": call["negative_prompt"][k]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in range(2):
                alone = draw(pipe, prompt, seeds=(2 * k + n,), **negative)
                assert alike(found[2 * k + n], alone[0])
        plain = draw(
            pipe.unload_custom().load_custom(concept(pipe)), prompt, seeds=(2 * k,), **negative
        )
        assert alike(found[2 * k], plain[0]) == (prompt == other)
        pipe.load_custom(customize.Decor(AVOID, target=target, strength=1.0))


@pytest.mark.parametrize("target", ["prompt", "concepts"])
def test_tokens_with_an_embedding_for_each_layer(target):
    pipe = attached(layers=True)
    plain = draw(pipe)
    settings = customize.Decor(AVOID, target=target, strength=1.0, **PLAIN)
    found = read(pipe.load_custom(settings))
    pipe.load_custom(customize.Decor())
    words, before, layer = read(pipe)
    own = slice(1, 1 + len(words_of(pipe, "a photo of")))
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    if target == "prompt":
        assert torch.equal(found[0][0], words[0])
        assert alike(found[0][1, own], without(words[1, own], unwanted))
    else:
        base = layer.get_base_layer()
        unwanted = values_of(pipe, base)
        with torch.no_grad():
            said = base(words)
        assert torch.equal(found[1][0], before[0])
        assert alike((found[1] - said)[1], without_in_heads((before - said)[1], unwanted))
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("target", ["prompt", "concepts"])
def test_regions_are_cleaned_as_well(target):
    pipe = attached().load_custom(customize.Decor(target=target, strength=1.0))
    whole = {"<rex>": (0, 0, 1, 1)}
    prompt = "a photo of <rex> on the beach"
    plain = draw(pipe, prompt, avoid=AVOID)
    assert alike(draw(pipe, prompt, avoid=AVOID, regions=whole), plain)
    assert not alike(plain, draw(pipe, prompt, regions=whole))


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3, tiny_flux, tiny_flux3])
def test_modular_pipelines_clean_prompts(make):
    pipe = attached(make)
    other = pipe if make is tiny_flux3 else modular(pipe).load_custom()
    plain = draw(other, output_type="np")
    found = draw(other, output_type="np", avoid=AVOID)
    assert not np.array_equal(found, plain)
    assert np.array_equal(draw(other, output_type="np"), plain)
    if make is tiny_flux:  # the others are guided in another way than the standard pipelines
        assert np.allclose(found, draw(pipe, output_type="np", avoid=AVOID), atol=1e-4)


def test_settings_need_no_concept_and_are_gone_with_the_rest():
    pipe = tiny_sd()
    before, plain = everything(pipe), draw(pipe, "a dog")
    pipe.load_custom(customize.Decor("hat", strength=1.0))
    assert "without hat (strength 1.0)" in repr(pipe.custom)
    assert not torch.equal(draw(pipe, "a dog"), plain)
    assert torch.equal(draw(pipe, "a dog", avoid="hat"), draw(pipe, "a dog"))
    assert not torch.equal(draw(pipe, "a dog", avoid="cat"), draw(pipe, "a dog"))
    pipe.load_custom(concept(pipe))
    pipe.unload_custom("rex")
    assert "without hat" in repr(pipe.custom)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert torch.equal(draw(pipe, "a dog"), plain)


def test_nothing_stays_after_an_error_within_a_call():
    pipe = attached()
    before, plain = everything(pipe), draw(pipe)

    def fail(*args):
        raise RuntimeError("stop")

    settings = customize.Decor(target="both")
    with pytest.raises(RuntimeError):
        draw(pipe.load_custom(settings), avoid=AVOID, callback_on_step_end=fail)
    pipe.load_custom(customize.Decor())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    assert not any(hooks) and not pipe.text_encoder._forward_hooks
    assert torch.equal(draw(pipe), plain)
    del before["unet attributes"]
    after = everything(pipe)
    del after["unet attributes"]  # where the settings are
    assert_same(before, after)


def test_auto_takes_what_captions_share():
    pipe = attached(training={"captions_share": ["hat", "cup"]})
    assert torch.equal(draw(pipe, avoid="auto"), draw(pipe, avoid="hat, cup"))
    with pytest.raises(ConfigError, match=r"name nothing that all their pictures share.*avoid="):
        draw(attached(), avoid="auto")


def test_a_text_encoder_that_is_gone_or_away_is_refused():
    pipe = attached().load_custom(CLEAN)
    with pytest.raises(ConfigError, match=r"words alone.*no prompt_embeds"):
        draw(pipe, None, avoid=AVOID, prompt_embeds=torch.zeros(1, CLIP_LENGTH, 32))
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(PipelineError, match="sequential offload"):
        draw(pipe, avoid=AVOID)
    pipe.text_encoder = None
    with pytest.raises(PipelineError, match=r"no text_encoder.*load the pipeline with its"):
        draw(pipe, avoid=AVOID)


WRONG = {
    "empty": ("", "nothing is named"),
    "commas": (" , ,", "nothing is named"),
    "no list": ([], "nothing is named"),
    "number": (7, "does not say what"),
    "numbers": ([7], "does not say what"),
    "all": (PROMPT, "is all of the prompt"),
    "long": ("hat " * 40, "longer than the 22 tokens"),
}


@pytest.mark.parametrize("target", ["prompt", "concepts"])
@pytest.mark.parametrize("name", WRONG)
def test_bad_lists_are_refused_before_anything_is_drawn(name, target):
    avoid, message = WRONG[name]
    pipe = attached().load_custom(customize.Decor(target=target, strength=1.0))
    called = []
    pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(ConfigError, match=message):
        draw(pipe, avoid=avoid)
    assert not called
    assert not pipe.text_encoder._forward_hooks


def test_words_that_an_encoder_does_not_know_are_refused():
    pipe = attached(tiny_flux)
    with pytest.raises(ConfigError, match=r"'漢字' has no words that the text encoder knows"):
        draw(pipe, avoid="hat, 漢字")
    assert not pipe.text_encoder_2._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 2.5}, "strength of 2.5 is not from 0 to 2"),
        ({"strength": -1.0}, "not from 0 to 2"),
        ({"strength": "much"}, "is no strength"),
        ({"rank": 0}, "is no rank"),
        ({"rows": "some"}, "none of words, rest, all"),
        ({"target": "picture"}, "none of None, prompt, concepts, both"),
        ({"avoid": ""}, "nothing is named"),
        ({"negative": True}, "none of named, kept, cleaned"),
        ({"keys": 2.0}, "2.0 is no share of the strength"),
        ({"noise": (0.5, 0.5)}, "are no two shares of noise"),
        ({"noise": (0.5, 1.5)}, "are no two shares of noise"),
        ({"noise": (0.5,)}, "are no two shares of noise"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        customize.Decor(**settings)


def test_two_settings_are_refused_and_change_nothing():
    pipe = tiny_sd()
    before = everything(pipe)
    with pytest.raises(ConfigError, match="two Decor"):
        pipe.load_custom(customize.Decor("hat"), customize.Decor("cup"))
    assert_same(before, everything(pipe))
