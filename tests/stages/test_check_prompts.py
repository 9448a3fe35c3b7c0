"""Warnings about unknown triggers, and triggers beyond the token limit."""

from __future__ import annotations

import warnings

import pytest
import torch

from customize.concepts.io.write_concept import save_concept
from tests.pipeline.making import MAKERS, attached, concept, draw, modular, user_lora
from tests.tiny import drawn, tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl

makers = pytest.mark.parametrize(
    "make", [*MAKERS.values(), tiny_flux, tiny_qwen_image], ids=[*MAKERS, "flux", "qwen_image"]
)
LONG = "in the snow " * 300 + "with <rex>"


def warnings_of(pipe, prompt="a photo of <rex>", **call):
    """Return the warnings of a call about triggers."""
    noise = torch.Generator().manual_seed(1)
    defaults = {"num_inference_steps": 1, "output_type": "np", "height": 32, "width": 32}
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        drawn(pipe, prompt, generator=noise, **defaults | call)
    messages = [str(warning.message) for warning in recorded if warning.category is UserWarning]
    return [text for text in messages if "trigger" in text or "cut off" in text]


@makers
def test_misspelt_triggers_are_reported_with_the_nearest_one(make):
    pipe = attached(make)
    assert warnings_of(pipe) == [] == warnings_of(pipe, "a dog")
    (message,) = warnings_of(pipe, "a photo of <rexx>")
    assert message == (
        "the prompt contains <rexx>, and no attached concept has that trigger; did you mean <rex>?"
    )
    assert warnings_of(pipe, "a <REX>") == []
    pipe.unload_custom()
    assert warnings_of(pipe, "a photo of <rexx>") == []  # not a customized pipeline


def test_all_prompt_arguments_are_checked():
    pipe = attached(tiny_sdxl)
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
        assert "did you mean <rex>" in warnings_of(pipe, **{name: "<rexx>"})[0], name
    assert len(warnings_of(pipe, ["a <rex>", "a <rexx> and <rexy>"])) == 2
    sd3 = attached(tiny_sd3)
    assert "<rexx>" in warnings_of(sd3, prompt_3="a <rexx>")[0]


def test_tokens_of_the_user_are_known():
    pipe = tiny_sd()
    pipe.load_textual_inversion({"<rexx>": torch.ones(1, 32)})
    pipe.load_custom(concept(pipe))
    assert warnings_of(pipe, "<rex> and <rexx>") == []
    pipe.load_textual_inversion({"<rex>-style": torch.ones(1, 32)})
    assert warnings_of(pipe, "<rex>-style") == []
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    assert warnings_of(pipe, "<rex> of a <b>") != []


def test_pipelines_that_share_the_models_warn_too():
    pipe = attached()
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    assert "<rexx>" in warnings_of(other, "a <rexx>")[0]


def test_the_warning_points_at_the_callers_line():
    pipe = attached()
    with pytest.warns(UserWarning, match="<rexx>") as recorded:
        draw(pipe, "<rexx>")
    assert not recorded[0].filename.startswith("customize/") and "tiny" in recorded[0].filename


@makers
def test_truncated_triggers_are_reported(make):
    pipe = attached(make)
    (message, *more) = warnings_of(pipe, LONG)
    assert "<rex> is cut off" in message and "write that nearer to its beginning" in message
    assert all("<rex> is cut off" in other for other in more)
    assert warnings_of(pipe, "<rex> " + LONG) == []
    assert warnings_of(pipe, "in the snow " * 300) == []  # no trigger is truncated


def test_the_warning_contains_encoder_token_count_and_limit():
    pipe = attached(tiny_flux)
    clip, t5 = pipe.tokenizer, pipe.tokenizer_2
    messages = warnings_of(pipe, LONG, max_sequence_length=40)
    assert len(messages) == 2
    counts = [len(tokenizer(LONG).input_ids) for tokenizer in (clip, t5)]
    window = clip.model_max_length
    assert f"has {counts[0]} tokens, of which the text_encoder reads {window}" in messages[0]
    assert f"has {counts[1]} tokens, of which the text_encoder_2 reads 40" in messages[1]
    # The texts of each encoder, and the negative prompt.
    (message,) = warnings_of(pipe, prompt_2=LONG, max_sequence_length=40)
    assert "the text_encoder_2 reads 40" in message
    sd = attached()
    (message,) = warnings_of(sd, negative_prompt=LONG)
    assert message.startswith("the negative prompt 'in the snow")


@pytest.mark.parametrize("tokens", [1, 2])
def test_triggers_at_the_last_position_are_not_reported(tokens):
    pipe = tiny_sd()
    rex = concept(pipe)
    if tokens == 1:
        info = rex.info.model_copy(update={"num_tokens": 1})
        rows = {key: value[:1] for key, value in rex.embeddings.items()}
        rex = type(rex)(info, rex.updates, rows)
    pipe.load_custom(rex)
    one = len(pipe.tokenizer("dog ", add_special_tokens=False).input_ids)
    room = pipe.tokenizer.model_max_length - 2 - tokens
    fits = "dog " * (room // one)
    assert warnings_of(pipe, fits + "<rex>") == []
    begun = len(pipe.tokenizer(fits + "dog <rex>", add_special_tokens=False).input_ids)
    assert bool(warnings_of(pipe, fits + "dog <rex>")) == (begun > room + tokens)
    assert warnings_of(pipe, fits + "dog " * tokens + "<rex>") != []


def test_layerwise_embeddings_and_modular_pipelines_are_checked():
    pipe = attached(layers=True)
    assert "is cut off" in warnings_of(pipe, LONG)[0]
    sd3 = attached(tiny_sd3)
    pipe = modular(sd3)
    pipe.set_progress_bar_config(disable=True)
    assert "is cut off" in warnings_of(pipe, LONG)[0] and "<rexx>" in warnings_of(pipe, "<rexx>")[0]


def test_libraries_refuse_unknown_triggers_and_report_truncated_ones(tmp_path):
    pipe = tiny_sd()
    save_concept(concept(pipe), tmp_path / "rex")
    pipe.load_custom(library=tmp_path)
    assert "<rex> is cut off" in warnings_of(pipe, LONG)[0]
    with pytest.raises(Exception, match="it has <rex>"):
        draw(pipe, "<rexx>")
