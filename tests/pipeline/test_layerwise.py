"""Concepts with an embedding for each cross-attention layer, on a pipeline."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor

import customize
from customize.concepts.tokens.layerwise_embeddings import mean_rows, vocabulary_rows
from customize.concepts.tokens.token_rows import add_tokens, vocabulary_entries
from customize.concepts.types import Concept
from customize.errors import ConceptError, PipelineError
from customize.families import family_of
from tests.pipeline.making import PROMPT, assert_same, concept, draw, everything
from tests.tiny import CLIP_LENGTH, tiny_sd, tiny_sd3

LAYERS = 7
WHOLE = LAYERS * CLIP_LENGTH


def layered(pipe: Any, name: str = "rex", *, spread: float = 1.0, index: int = 0) -> Concept:
    """A concept whose rows differ from layer to layer by `spread`, 0 for not at all."""
    plain = concept(pipe, name, index=index)
    generator = torch.Generator().manual_seed(3)
    rows = {
        key: embeddings[:, None]
        + spread * torch.randn(2, LAYERS, embeddings.shape[1], generator=generator)
        for key, embeddings in plain.embeddings.items()
    }
    return Concept(plain.info.model_copy(update={"token_layers": LAYERS}), plain.updates, rows)


def pictures(pipe: Any, prompt: Any = PROMPT, count: int = 1, **arguments: Any) -> np.ndarray:
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(
        prompt, num_inference_steps=2, generator=noise, output_type="np", **arguments
    ).images


@torch.no_grad()
def encoded_by_hand(learned: Concept, prompt: str) -> list[Tensor]:
    """What each layer should read: the prompt on a pipeline whose tokens are that layer's."""
    encoded = []
    for layer in range(LAYERS):
        pipe = tiny_sd()
        rows = {key: rows[:, layer] for key, rows in learned.embeddings.items()}
        info = learned.info.model_copy(update={"token_layers": 0})
        customize.load_custom(pipe, Concept(info, learned.updates, rows))
        encoded.append(pipe.encode_prompt(prompt, "cpu", 1, False)[0])
    return encoded


def test_every_layer_reads_its_embeddings_of_the_prompt() -> None:
    pipe = tiny_sd()
    rex = layered(pipe)
    customize.load_custom(pipe, rex)
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "a dog")
    assert embeds.shape == negative.shape == (1, WHOLE, 32)
    expected = torch.cat(encoded_by_hand(rex, PROMPT), dim=1)
    assert torch.allclose(embeds, expected, atol=1e-5)
    single = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    assert single.shape == (1, CLIP_LENGTH, 32)  # nothing to tell layers apart
    assert torch.allclose(negative, single.repeat(1, LAYERS, 1), atol=1e-5)
    again = pictures(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert np.array_equal(again, pictures(pipe, negative_prompt="a dog"))


def test_equal_layer_embeddings_draw_as_an_ordinary_concept() -> None:
    plain, pipe = tiny_sd(), tiny_sd()
    rex = concept(plain)
    customize.load_custom(plain, rex)
    customize.load_custom(pipe, layered(pipe, spread=0.0))
    assert np.allclose(pictures(pipe), pictures(plain), atol=1e-5)
    customize.load_custom(other := tiny_sd(), layered(other))
    assert np.abs(pictures(other) - pictures(plain)).max() > 1e-2


def test_conditions_of_ordinary_length_are_unchanged() -> None:
    pipe = tiny_sd()
    cup, empty = pipe.encode_prompt(["a red cup"], "cpu", 1, True)
    before = pictures(pipe, "a red cup", negative_prompt="a dog")
    customize.load_custom(pipe, layered(pipe), weights=[0.0])
    assert np.array_equal(pictures(pipe, "a red cup", negative_prompt="a dog"), before)
    arguments = {"prompt_embeds": cup, "negative_prompt_embeds": empty}
    assert np.array_equal(pictures(pipe, None, **arguments), pictures(pipe, "a red cup"))
    # The pipeline encodes the missing negative prompt, to the length of the user's own.
    assert np.array_equal(pictures(pipe, None, prompt_embeds=cup), pictures(pipe, "a red cup"))


def test_negative_prompts_batches_and_images_per_prompt() -> None:
    pipe = tiny_sd()
    customize.load_custom(pipe, layered(pipe), concept(pipe, "tom", index=1))
    prompts = [PROMPT, "a <tom> in the room", "<TOM> and <rex>"]
    negatives = ["a cat", "<rex>", ""]
    batch = pictures(pipe, prompts, 3, negative_prompt=negatives)
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        noise = torch.Generator().manual_seed(i)
        single = pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=2,
            generator=noise,
            output_type="np",
        ).images[0]
        assert np.allclose(batch[i], single, atol=1e-4), prompt
    twice = pictures(pipe, PROMPT, 2, num_images_per_prompt=2)
    assert np.allclose(twice[0], pictures(pipe)[0], atol=1e-4)
    # A trigger that is only in the negative prompt still does what it should.
    only = pictures(pipe, "a cup", negative_prompt="<rex>")
    assert np.abs(only - pictures(pipe, "a cup", negative_prompt="a dog")).max() > 1e-3
    cup = pipe.encode_prompt("a cup", "cpu", 1, False)[0]
    assert np.array_equal(pictures(pipe, None, prompt_embeds=cup, negative_prompt="<rex>"), only)
    # So do long prompts, cut as all are.
    assert pictures(pipe, PROMPT + " with the hat" * 20, negative_prompt="a cat " * 40).shape


def test_pipelines_of_a_shared_model_use_layer_embeddings() -> None:
    pipe = tiny_sd()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    customize.load_custom(pipe, layered(pipe))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def redraw(prompt: str, **arguments: Any) -> np.ndarray:
        noise = torch.Generator().manual_seed(1)
        arguments |= {"image": picture, "strength": 0.8, "num_inference_steps": 4}
        return other(prompt, generator=noise, output_type="np", **arguments).images

    assert other.encode_prompt(PROMPT, "cpu", 1, True)[0].shape == (1, WHOLE, 32)
    drawn = redraw(PROMPT, negative_prompt="a dog", clip_skip=None)
    customize.load_custom(other, weights={"rex": 1.0})  # then also in the negative prompt alone
    assert redraw("a cup", negative_prompt="<rex>").shape == (1, 32, 32, 3)
    customize.unload_custom(pipe)
    customize.load_custom(pipe, layered(pipe, spread=0.0))
    assert np.abs(redraw(PROMPT, negative_prompt="a dog") - drawn).max() > 1e-3


@pytest.mark.parametrize("fuse", [False, True])
def test_unloading_restores_everything(fuse: bool) -> None:
    pipe = tiny_sd()
    draw(pipe, "a dog")
    before = everything(pipe)
    hooks = hooks_of(pipe)
    rex, tom = layered(pipe), concept(pipe, "tom", index=1)
    customize.load_custom(pipe, tom)
    with_tom, drawn = everything(pipe), draw(pipe, "a <tom>")
    customize.load_custom(pipe, rex, fuse=fuse)
    customize.load_custom(pipe, weights={"rex": 0.5})
    assert draw(pipe, "a <tom> and <rex>").shape == (32, 32, 3)
    with pytest.raises(PipelineError, match=r"cross-attention layer|beside the weights"):
        pipe.save_pretrained("/nowhere")
    customize.unload_custom(pipe, "rex")
    if not fuse:
        assert_same(everything(pipe), with_tom)
    assert np.array_equal(draw(pipe, "a <tom>"), drawn)
    assert hooks_of(pipe) == hooks
    customize.unload_custom(pipe)
    assert_same(everything(pipe), before)
    assert hooks_of(pipe) == hooks


def test_save_pretrained_refuses_fused_layer_embeddings(tmp_path: Path) -> None:
    pipe = tiny_sd()
    customize.load_custom(pipe, layered(pipe), fuse=True)
    with pytest.raises(PipelineError, match="for each cross-attention layer"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_tokens_unloaded_by_others_are_restored() -> None:
    pipe = tiny_sd()
    before = everything(pipe)
    customize.load_custom(pipe, layered(pipe))
    drawn = draw(pipe)
    pipe.unload_textual_inversion("<rex>")
    customize.load_custom(pipe, weights={"rex": 1.0})
    assert np.array_equal(draw(pipe), drawn)
    customize.unload_custom(pipe)
    assert_same(
        {k: v for k, v in everything(pipe).items() if "attributes" not in k},
        {k: v for k, v in before.items() if "attributes" not in k},
    )


def test_invalid_layer_counts_change_nothing() -> None:
    pipe = tiny_sd()
    rex = layered(pipe)
    before = everything(pipe)
    fewer = {key: rows[:, :3] for key, rows in rex.embeddings.items()}
    few = replace(rex, info=rex.info.model_copy(update={"token_layers": 3}), embeddings=fewer)
    with pytest.raises(
        ConceptError, match="3 cross-attention layers, and this pipeline's unet takes 7"
    ):
        customize.load_custom(pipe, few)
    sd3 = tiny_sd3()
    joint = concept(sd3)
    rows = {
        key: embeddings[:, None].repeat(1, 2, 1) for key, embeddings in joint.embeddings.items()
    }
    info = joint.info.model_copy(update={"token_layers": 2})
    with pytest.raises(ConceptError, match="this pipeline's transformer takes 0"):
        customize.load_custom(sd3, Concept(info, joint.updates, rows))
    assert_same(everything(pipe), before)
    dictionary = family_of(pipe.components).token_dictionaries()[0]
    add_tokens(dictionary, ["<rex@4>"], torch.zeros(1, 32))
    with pytest.raises(ConceptError, match="<rex@4>"):
        customize.load_custom(pipe, rex)


def test_tokenizer_is_unchanged_for_other_callers() -> None:
    pipe = tiny_sd()
    rex = layered(pipe)
    names, _ = vocabulary_rows("<rex>", rex.embeddings["text_encoder"])
    assert names[:2] == vocabulary_entries("<rex>", 2)
    customize.load_custom(pipe, rex)
    tokenizer = pipe.tokenizer
    first = tokenizer.convert_tokens_to_ids("<rex>")
    assert tokenizer("<rex>", add_special_tokens=False).input_ids == [first, first + 1]
    ids = tokenizer("a <rex>", padding="max_length", max_length=CLIP_LENGTH).input_ids
    assert len(ids) == CLIP_LENGTH and first in ids
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[first : first + 2], mean_rows(rex.embeddings["text_encoder"]))
    copied = pickle.loads(pickle.dumps(tokenizer))
    asked = {"padding": "max_length", "max_length": CLIP_LENGTH, "return_tensors": "pt"}
    wide = tokenizer(["a <rex>", "a dog"], **asked)
    assert wide.input_ids.shape == wide.attention_mask.shape == (2, WHOLE)
    assert torch.equal(copied(["a <rex>", "a dog"], **asked).input_ids, wide.input_ids)


def test_user_tokens_around_a_trigger_are_equal_in_all_layers() -> None:
    pipe = tiny_sd()
    pipe.load_textual_inversion({"<rex>-style": torch.ones(1, 32)})
    customize.load_custom(pipe, layered(pipe))
    asked = {"padding": "max_length", "max_length": CLIP_LENGTH, "return_tensors": "pt"}
    ids = pipe.tokenizer("<rex> <rex>-style", **asked).input_ids.reshape(LAYERS, -1)
    style = pipe.tokenizer.convert_tokens_to_ids("<rex>-style")
    assert (ids == style).sum(1).tolist() == [1] * LAYERS
    for layer in range(LAYERS):
        first = pipe.tokenizer.convert_tokens_to_ids(f"<rex@{layer}>")
        assert ids[layer, 1:3].tolist() == [first, first + 1]


def hooks_of(pipe: Any) -> dict[str, tuple[int, int]]:
    return {
        f"{key}.{name}": (len(module._forward_pre_hooks), len(module._forward_hooks))
        for key in ("unet", "text_encoder")
        for name, module in getattr(pipe, key).named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }
