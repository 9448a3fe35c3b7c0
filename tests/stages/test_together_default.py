"""together= where a call does not mention it."""

from __future__ import annotations

import pytest
import torch

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


def test_attention_that_cannot_be_read_stops_the_default_and_refuses_a_request():
    pipe = pair()
    plain = draw(pipe, together=False)
    pipe.unet.fuse_qkv_projections()
    try:
        default = draw(pipe)
        assert "does not call to_q and to_k" in pipe.custom.reports["together"]
        with pytest.raises(PipelineError, match="does not call to_q and to_k"):
            draw(pipe, together=True)
    finally:
        pipe.unet.unfuse_qkv_projections()
    assert default.shape == plain.shape and bool(torch.isfinite(default).all())
    assert torch.equal(draw(pipe, together=False), plain)


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
