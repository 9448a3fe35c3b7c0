"""avoid=: what is cleaned, what stays unchanged, and what is refused."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import customize
from customize.errors import ConfigError, PipelineError
from tests.pipeline.making import assert_same, attached, concept, everything, modular
from tests.stages.decor.reference_formulas import (
    AVOID,
    CLEAN,
    PHRASES,
    PROMPT,
    VALUES_ONLY,
    alike,
    cleaned_update,
    draw,
    read,
    without,
    words_of,
)
from tests.tiny import CLIP_LENGTH, tiny_flux, tiny_flux3, tiny_sd, tiny_sd3, tiny_sdxl


def test_the_signature_of_calls_has_avoid():
    assert inspect.signature(attached().__call__).parameters["avoid"].default is None


def test_rows_of_the_prompts_words_are_cleaned_and_no_others():
    pipe = attached().load_custom(CLEAN)
    before, after = read(pipe)[0], read(pipe, avoid=AVOID)[0]
    words = slice(1, 1 + len(words_of(pipe, PROMPT)))
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    assert torch.equal(after[0], before[0])  # of the empty prompt
    assert alike(after[1, words], without(before[1, words], unwanted))
    assert not alike(after[1, words], before[1, words])
    others = [0, *range(words.stop, CLIP_LENGTH)]
    assert torch.equal(after[1, others], before[1, others])


def test_every_row_of_a_word_is_changed():
    pipe = attached()
    before = read(pipe)[0][1]
    pipe.load_custom(customize.Decor(AVOID, target="prompt", strength=0.5))
    changed = (read(pipe)[0][1] != before).any(1).tolist()
    words = len(words_of(pipe, PROMPT))
    assert changed == [1 <= k < 1 + words for k in range(CLIP_LENGTH)]


def test_strength_is_that_of_the_formula():
    pipe = attached()
    before = read(pipe)[0][1, 1:6]
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    pipe.load_custom(customize.Decor(AVOID, target="prompt", strength=1.5))
    assert alike(read(pipe)[0][1, 1:6], without(before, unwanted, 1.5))
    plain = draw(pipe.load_custom(customize.Decor()))
    none = customize.Decor(AVOID, target="both", strength=0.0)
    assert torch.equal(draw(pipe.load_custom(none)), plain)


def test_negative_prompts_can_be_cleaned():
    pipe = attached()
    call = {"negative_prompt": "<rex> in a green scarf", "avoid": AVOID}
    words = slice(1, 1 + len(words_of(pipe, call["negative_prompt"])))
    for target in ("prompt", "concepts"):
        pipe.load_custom(customize.Decor(target=target, strength=1.0, negative="keep"))
        (unchanged, values, _), (expected, expected_values, _) = (
            read(pipe, **call),
            read(pipe, **call | {"avoid": None}),
        )
        assert torch.equal(unchanged[0], expected[0]) and torch.equal(values[0], expected_values[0])
        pipe.load_custom(customize.Decor(target=target, strength=1.0, negative="clean"))
        (other, answer, _) = read(pipe, **call)
        assert torch.equal(other[1], unchanged[1])
        assert torch.equal(other[0, words], unchanged[0, words]) is (target == "concepts")
        assert not torch.equal(answer[0, words], values[0, words])


def test_pooled_vectors_are_unchanged():
    pipe = attached(tiny_sdxl)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["text_embeds"]),
        with_kwargs=True,
    )
    settings = customize.Decor(target="prompt", strength=1.0)
    draw(pipe.load_custom(settings), num_inference_steps=1, avoid=AVOID)
    draw(pipe, num_inference_steps=1)
    cleaned, plain = seen
    assert torch.equal(cleaned, plain)


def test_the_automatic_strength_keeps_90_percent_of_each_words_length():
    pipe = attached()
    prompt = "a photo of <rex> and a car"
    before = read(pipe, prompt)[0][1]
    pipe.load_custom(customize.Decor("cup, cat", target="prompt"))
    after = read(pipe, prompt)[0][1]
    ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    names = pipe.tokenizer.convert_ids_to_tokens(ids)
    share = (after.norm(dim=1) / before.norm(dim=1))[1 : 1 + len(ids)]
    is_plain = [not name.startswith("<rex>") for name in names]
    assert is_plain.count(False) == 2
    assert float(share[is_plain].min()) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("target", ["prompt", "concepts", "both"])
def test_batches_equal_single_prompts_and_words_of_the_prompt_are_not_avoided(target):
    pipe = attached().load_custom(customize.Decor(AVOID, target=target, strength=1.0))
    other = "<rex> with a striped cup wearing a red hat"  # contains all words of both phrases
    third = "two cats and <rex> in the forest with a blue cup"  # contains words of one phrase
    prompts = [PROMPT, other, third]
    call = {"negative_prompt": ["a dog", "", "a red hat"], "num_images_per_prompt": 2}
    with pytest.warns(UserWarning, match=r"asks for red hat, striped cup itself"):
        images = draw(pipe, prompts, seeds=range(6), **call)
    for k, prompt in enumerate(prompts):
        negative = {"negative_prompt": call["negative_prompt"][k]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in range(2):
                alone = draw(pipe, prompt, seeds=(2 * k + n,), **negative)
                assert alike(images[2 * k + n], alone[0])
        plain = draw(
            pipe.unload_custom().load_custom(concept(pipe)), prompt, seeds=(2 * k,), **negative
        )
        assert alike(images[2 * k], plain[0]) == (prompt == other)
        pipe.load_custom(customize.Decor(AVOID, target=target, strength=1.0))


@pytest.mark.parametrize("target", ["prompt", "concepts", "both"])
def test_other_words_of_a_phrase_are_avoided_where_a_prompt_contains_one(target):
    pipe = attached().load_custom(customize.Decor(target=target, strength=1.0))
    prompt = "a photo of <rex> with a blue hat"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = draw(pipe, prompt, avoid="red hat")
    assert alike(image, draw(pipe, prompt, avoid="red"))
    assert not alike(image, draw(pipe, prompt))
    assert not alike(image, draw(pipe, prompt, avoid="cup"))


@pytest.mark.parametrize("target", ["prompt", "concepts"])
def test_layerwise_embeddings_are_cleaned(target):
    pipe = attached(layers=True)
    plain = draw(pipe)
    settings = customize.Decor(AVOID, target=target, strength=1.0, **VALUES_ONLY)
    cleaned = read(pipe.load_custom(settings))
    pipe.load_custom(customize.Decor())
    words, before, layer = read(pipe)
    plain_words = slice(1, 1 + len(words_of(pipe, "a photo of")))
    unwanted = torch.cat([words_of(pipe, phrase) for phrase in PHRASES])
    if target == "prompt":
        assert torch.equal(cleaned[0][0], words[0])
        assert alike(cleaned[0][1, plain_words], without(words[1, plain_words], unwanted))
    else:
        base = layer.get_base_layer()
        with torch.no_grad():
            values = base(words)
        assert torch.equal(cleaned[1][0], before[0])
        assert alike((cleaned[1] - values)[1], cleaned_update(pipe, base, (before - values)[1]))
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("target", ["prompt", "concepts"])
def test_prompts_of_regions_are_cleaned(target):
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
    cleaned = draw(other, output_type="np", avoid=AVOID)
    assert not np.array_equal(cleaned, plain)
    assert np.array_equal(draw(other, output_type="np"), plain)
    if make is tiny_flux:  # the others are guided in another way than the standard pipelines
        assert np.allclose(cleaned, draw(pipe, output_type="np", avoid=AVOID), atol=1e-4)


def test_settings_work_without_concepts_and_are_unloaded_with_them():
    pipe = tiny_sd()
    before, plain = everything(pipe), draw(pipe, "a dog")
    pipe.load_custom(customize.Decor("hat", strength=1.0))
    assert "avoid hat (strength 1.0)" in repr(pipe.custom)
    assert not torch.equal(draw(pipe, "a dog"), plain)
    assert torch.equal(draw(pipe, "a dog", avoid="hat"), draw(pipe, "a dog"))
    assert not torch.equal(draw(pipe, "a dog", avoid="cat"), draw(pipe, "a dog"))
    pipe.load_custom(concept(pipe))
    pipe.unload_custom("rex")
    assert "avoid hat" in repr(pipe.custom)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert torch.equal(draw(pipe, "a dog"), plain)


def test_hooks_are_removed_after_an_error_during_a_call():
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
    del after["unet attributes"]  # contain the settings
    assert_same(before, after)


def test_auto_avoids_the_words_that_captions_share():
    pipe = attached(training={"captions_share": ["hat", "cup"]})
    assert torch.equal(draw(pipe, avoid="auto"), draw(pipe, avoid="hat, cup"))
    with pytest.raises(ConfigError, match=r"share no words besides.*avoid="):
        draw(attached(), avoid="auto")


def test_missing_and_offloaded_text_encoders_are_refused():
    pipe = attached().load_custom(CLEAN)
    with pytest.raises(ConfigError, match=r"needs the prompt as text.*no prompt_embeds"):
        draw(pipe, None, avoid=AVOID, prompt_embeds=torch.zeros(1, CLIP_LENGTH, 32))
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    with pytest.raises(PipelineError, match="sequential offload"):
        draw(pipe, avoid=AVOID)
    pipe.text_encoder = None
    with pytest.raises(PipelineError, match=r"no text_encoder.*load the pipeline with its"):
        draw(pipe, avoid=AVOID)


WRONG = {
    "empty": ("", "contains no words"),
    "commas": (" , ,", "contains no words"),
    "no list": ([], "contains no words"),
    "number": (7, "is not text"),
    "numbers": ([7], "is not text"),
    "all": (PROMPT, "contains the whole prompt"),
    "long": ("hat " * 40, "longer than the 22 tokens"),
}


@pytest.mark.parametrize("target", ["prompt", "concepts"])
@pytest.mark.parametrize("name", WRONG)
def test_invalid_phrases_are_refused_before_the_first_step(name, target):
    avoid, message = WRONG[name]
    pipe = attached().load_custom(customize.Decor(target=target, strength=1.0))
    called = []
    pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(ConfigError, match=message):
        draw(pipe, avoid=avoid)
    assert not called
    assert not pipe.text_encoder._forward_hooks


def test_words_unknown_to_an_encoder_are_refused():
    pipe = attached(tiny_flux)
    with pytest.raises(ConfigError, match=r"knows no word of '漢字'"):
        draw(pipe, avoid="hat, 漢字")
    assert not pipe.text_encoder_2._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 2.5}, "strength 2.5 is outside"),
        ({"strength": -1.0}, "outside the range"),
        ({"strength": "much"}, "invalid strength"),
        ({"target": "picture"}, "none of None, prompt, concepts, both"),
        ({"avoid": ""}, "contains no words"),
        ({"negative": True}, "none of extend, keep, clean"),
        ({"keys": 2.0}, "invalid strength for keys: 2.0"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        customize.Decor(**settings)


def test_two_settings_are_refused_and_change_nothing():
    pipe = tiny_sd()
    before = everything(pipe)
    with pytest.raises(ConfigError, match="two Decor"):
        pipe.load_custom(customize.Decor("hat"), customize.Decor("cup"))
    assert_same(before, everything(pipe))
