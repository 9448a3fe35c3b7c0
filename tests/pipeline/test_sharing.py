"""Pipelines that share some of their parts, and parts that a pipeline has lost or replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from customize.errors import PipelineError
from customize.pipeline import set_tokens
from tests.pipeline.making import PROMPT, assert_same, concept, draw, everything, table, user_lora
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl

modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])


def with_parts_of(pipe, make, *keys):
    """A pipeline of the same parts but for some, which are those of a new one."""
    fresh = make()
    components = {**pipe.components, **{key: getattr(fresh, key) for key in keys}}
    other = type(fresh)(**components)
    other.set_progress_bar_config(disable=True)
    return other


@modes
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_another_denoiser_with_a_shared_text_encoder_is_refused(make, fuse):
    pipe = make()
    other = with_parts_of(pipe, make, "unet")
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    before = everything(pipe), everything(other)
    pipe.load_custom(rex, fuse=fuse)
    attached, picture = everything(pipe), draw(pipe)
    for call in (
        lambda: other.load_custom(tom, fuse=fuse),
        lambda: other.load_custom(rex, fuse=fuse),
        lambda: other.unload_custom(),
    ):
        with pytest.raises(
            PipelineError, match=r"text_encoder .*another pipeline.*its unet.*Fix: "
        ):
            call()
    assert_same(attached, everything(pipe))
    assert np.array_equal(draw(pipe), picture)
    pipe.unload_custom()
    other.load_custom(tom, fuse=fuse)
    with pytest.raises(PipelineError, match="attached through another pipeline"):
        pipe.load_custom(rex, fuse=fuse)
    other.unload_custom()
    assert_same(before[0], everything(pipe))
    assert_same(before[1], everything(other))


def test_sharing_only_the_tokenizer_is_refused():
    pipe = tiny_sd()
    other = with_parts_of(pipe, tiny_sd, "unet", "text_encoder")
    pipe.load_custom(concept(pipe))
    with pytest.raises(PipelineError, match=r"the tokenizer of this pipeline carry"):
        other.load_custom(concept(pipe, "tom", index=1))


@modes
@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_another_text_encoder_with_a_shared_denoiser_is_refused(make, fuse):
    pipe = make()
    other = with_parts_of(pipe, make, "text_encoder", "tokenizer")
    plain, theirs = everything(pipe), everything(other)
    pipe.load_custom(concept(pipe), fuse=fuse)
    before, picture = everything(pipe), draw(pipe)
    with pytest.raises(PipelineError, match="another text_encoder and tokenizer"):
        other.load_custom(weights={"rex": 0.5})
    with pytest.raises(PipelineError, match="another text_encoder and tokenizer"):
        other.load_custom(concept(pipe, "tom", index=1), fuse=fuse)
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), picture)
    other.unload_custom()  # from the whole that the concept was attached to
    assert_same(plain, everything(pipe))
    assert_same(theirs, everything(other))


@modes
def test_freed_text_encoders_are_changed_too(fuse):
    pipe, whole = tiny_sd(), tiny_sd()
    before = everything(pipe)
    freed = pipe.text_encoder
    pipe.load_custom(concept(pipe), fuse=fuse)
    pipe.text_encoder = None
    pipe.load_custom(weights={"rex": 0.5})
    pipe.load_custom(concept(whole, "tom", index=1), fuse=fuse)
    whole.load_custom(concept(whole), weights=[0.5], fuse=fuse)
    whole.load_custom(concept(whole, "tom", index=1), fuse=fuse)
    assert torch.equal(table(freed), table(whole.text_encoder))
    pipe.unload_custom()
    pipe.text_encoder = freed
    assert_same(before, everything(pipe))


@modes
def test_unloading_restores_both_text_encoders_after_a_replacement(fuse):
    pipe = tiny_sd()
    before, old, new = everything(pipe), pipe.text_encoder, tiny_sd().text_encoder
    pipe.load_custom(concept(pipe), fuse=fuse)
    pipe.text_encoder = new
    with pytest.raises(PipelineError, match="another text_encoder"):
        pipe.load_custom(weights={"rex": 0.5})
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    pipe.text_encoder = old
    assert_same(before, everything(pipe))


def test_user_adapters_with_our_name_are_not_changed():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(user_lora(pipe), adapter_name="customize")
    assert pipe.custom.rows[0].mode == "adapter (removed by someone else)"
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"an adapter named customize.*delete_adapters"):
        pipe.unload_custom()
    assert_same(before, everything(pipe))
    pipe.delete_adapters("customize")
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), draw(tiny_sd()))


@pytest.mark.parametrize("remove", ["delete_adapters", "unload_lora_weights"])
def test_failures_do_not_restore_removed_adapters(remove, monkeypatch):
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    pipe.delete_adapters("customize") if remove == "delete_adapters" else pipe.unload_lora_weights()
    before, picture = pipe.custom.rows, draw(pipe)

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(set_tokens, "add_tokens", fails)
        with pytest.raises(MemoryError):
            pipe.load_custom(concept(pipe, "tom", index=1))
    assert before[0].mode == "adapter (removed by someone else)"
    assert pipe.custom.rows == before
    assert "customize" not in str(pipe.get_list_adapters())
    assert np.array_equal(draw(pipe), picture)
    pipe.load_custom(weights={"rex": 1.0})
    other = tiny_sd()
    other.load_custom(concept(other))
    assert np.array_equal(draw(pipe, PROMPT), draw(other, PROMPT))
