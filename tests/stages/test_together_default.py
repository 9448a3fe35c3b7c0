"""together= where a call does not mention it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from customize.errors import ConfigError, PipelineError
from tests.pipeline.making import concept, modular
from tests.stages.together_making import CLASSES, HALVES, PROMPT, makers, pair
from tests.stages.together_making import draw_by_default as draw
from tests.tiny import tiny_sd3, tiny_sdxl


@makers
def test_prompts_of_two_concepts_are_routed_unless_the_call_says_no(make):
    pipe = pair(make)
    routed, plain = draw(pipe, together=True), draw(pipe, together=False)
    assert torch.equal(draw(pipe), routed)
    assert pipe.custom.reports["together"].startswith("together: ")
    assert not torch.allclose(routed, plain, atol=1e-3)
    assert torch.equal(draw(pipe, return_masks=True), routed)


def test_a_report_is_of_the_latest_call():
    pipe = pair()
    draw(pipe)
    assert "together" in pipe.custom.reports
    draw(pipe, together=False)
    assert "together" not in pipe.custom.reports


def test_one_concept_is_drawn_plainly():
    pipe = pair()
    for prompt in ("a photo of <rex>", "<rex> and <rex> in the forest", "a dog and a cat"):
        assert torch.equal(draw(pipe, prompt), draw(pipe, prompt, together=False))
        assert "together" not in pipe.custom.reports
    assert not torch.equal(
        draw(pipe, "a photo of a cat and <rex>"),
        draw(pipe, "a photo of a cat and <rex>", together=True),
    )


def test_what_cannot_be_routed_is_drawn_as_before_and_the_report_says_why():
    pipe = pair(merge="ties")
    assert torch.equal(draw(pipe), draw(pipe, together=False))
    draw(pipe)
    report = pipe.custom.reports["together"]
    assert report.startswith("together: off: the merge ties has mixed the concepts")
    with pytest.raises(PipelineError, match="has mixed the concepts"):
        draw(pipe, together=True)

    pipe = pair()
    halves = {key: HALVES[key] for key in HALVES}
    plain = draw(pipe, regions=halves, together=False)
    assert torch.equal(draw(pipe, regions=halves), plain)
    assert "together: off: regions cannot be combined" in pipe.custom.reports["together"]
    with pytest.raises(ConfigError, match="regions cannot be combined"):
        draw(pipe, regions=halves, together=True)


class _OwnProcessor:
    """Attends without calling the attention's projections as layers."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = functional.linear(hidden_states, attn.to_q.weight)
        key, value = (functional.linear(text, each.weight) for each in (attn.to_k, attn.to_v))
        attended = functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](attended)


def test_attention_that_cannot_be_read_stops_the_default_and_refuses_a_request():
    pipe = pair()
    pipe.unet.set_attn_processor(_OwnProcessor())
    default = draw(pipe)
    assert "does not call to_q and to_k" in pipe.custom.reports["together"]
    assert bool(torch.isfinite(default).all())
    with pytest.raises(PipelineError, match="does not call to_q and to_k"):
        draw(pipe, together=True)


def test_fused_attention_is_drawn_as_before():
    pipe = pair()
    plain = draw(pipe, together=False)
    pipe.unet.fuse_qkv_projections()
    try:
        fused = draw(pipe, together=False)
        assert torch.equal(draw(pipe), fused)
        assert "to_q and to_k" in pipe.custom.reports["together"]
        for request in (True, HALVES):
            with pytest.raises(PipelineError, match="in one fused layer"):
                draw(pipe, together=request)
    finally:
        pipe.unet.unfuse_qkv_projections()
    assert torch.equal(draw(pipe, together=False), plain)


def test_concepts_that_do_not_act_are_not_routed():
    pipe = pair()
    pipe.disable_lora()
    base = draw(pipe, together=False)
    assert torch.equal(draw(pipe), base)
    assert "the concepts is not active" in pipe.custom.reports["together"]
    with pytest.raises(PipelineError, match=r"not active.*enable_lora\(\)"):
        draw(pipe, together=True)
    pipe.enable_lora()
    assert not torch.allclose(draw(pipe), base, atol=1e-3)


def test_masks_are_of_what_is_routed_and_change_no_picture():
    pipe = pair()
    one = "a photo of <rex>"
    call = {"num_inference_steps": 6, "height": 32, "width": 32, "output_type": "latent"}
    with pytest.warns(UserWarning, match="no prompt names two attached concepts"):
        assert torch.equal(draw(pipe, one, return_masks=True), draw(pipe, one))
    with pytest.warns(UserWarning, match="there are no masks"):
        output = pipe([one, one], return_masks=True, num_images_per_prompt=2, **call)
    assert output.masks == [{}, {}, {}, {}]
    assert [*pipe(one, together=True, return_masks=True, **call).masks[0]] == ["rex"]
    pipe.unload_custom()
    with pytest.warns(UserWarning, match="there are no masks"):
        assert pipe("a dog", return_masks=True, **call).masks == [{}]


def test_masks_are_refused_where_nothing_is_routed_by_default():
    refused = pytest.raises(ConfigError, match="return_masks=True needs together=True: ")
    pipe = pair(tiny_sd3)
    with refused as error:
        draw(pipe, return_masks=True)
    assert "does not do it by default" in str(error.value)
    pipe = pair()
    for call in ({"regions": HALVES}, {"clip_skip": 1}):
        with refused:
            draw(pipe, return_masks=True, **call)


def test_modular_pipelines_are_routed():
    pipe = modular(pair(tiny_sdxl)).load_custom()
    assert torch.equal(draw(pipe), draw(pipe, together=True))
    assert not torch.allclose(draw(pipe, together=False), draw(pipe), atol=1e-3)


def test_families_that_were_not_measured_are_routed_on_request_alone():
    pipe = pair(tiny_sd3)
    assert torch.equal(draw(pipe), draw(pipe, together=False))
    assert "together" not in pipe.custom.reports
    assert not torch.allclose(draw(pipe, together=True), draw(pipe), atol=1e-4)


def test_prompts_in_a_batch_are_routed_where_one_of_them_names_two_concepts():
    pipe = pair()
    pipe.load_custom(concept(pipe, "kit", index=2, class_word=CLASSES["kit"]))
    prompts = [PROMPT, "a photo of a cat and <rex>"]
    batch = draw(pipe, prompts, seeds=(1, 2))
    assert torch.allclose(batch[1:], draw(pipe, prompts[1], seeds=(2,)), atol=1e-3)
    assert torch.allclose(batch[:1], draw(pipe, PROMPT, seeds=(1,)), atol=1e-3)
