"""The step that rewrites prompts, in a modular pipeline that is built from blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks

from customize.api.rewrite_step import RewriteStep
from customize.errors import ConfigError, PipelineError
from customize.stages.rewrite import Rewriter
from tests.pipeline.making import modular
from tests.tiny import tiny_sdxl
from tests.tiny_rewriter import ScriptedModel

REPOSITORY = Path(__file__).parents[2] / "pipelines" / "rewriting"
USERS, BETTER = "puppy at the seaside", "a photo of a dog on the beach"


def with_step(step=None):
    blocks = modular(tiny_sdxl()).blocks
    blocks.sub_blocks.insert("rewrite", step or RewriteStep(), 0)
    pipe = blocks.init_pipeline()
    parts = tiny_sdxl().components
    pipe.update_components(**{key: parts[key] for key in parts if key in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=USERS, output="images", **call):
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    noise = torch.Generator().manual_seed(1)
    return pipe(prompt=prompt, generator=noise, output=output, **settings | call)


@pytest.mark.parametrize("from_repository", [False, True])
def test_the_prompt_is_overwritten_where_asked(from_repository):
    step = None
    if from_repository:
        step = ModularPipelineBlocks.from_pretrained(str(REPOSITORY), trust_remote_code=True)
    pipe = with_step(step)
    plain, expected = draw(pipe), draw(pipe, BETTER)
    with pytest.raises(PipelineError, match="no language model is loaded"):
        draw(pipe, enable_prompt_enhancement=True)
    model = ScriptedModel({USERS: [BETTER]})
    pipe.load_custom(Rewriter(model))
    assert np.array_equal(draw(pipe), plain)
    assert np.array_equal(draw(pipe, enable_prompt_enhancement=True), expected)
    found = draw(pipe, output="rewritings", enable_prompt_enhancement=True)
    assert [each.text for each in found] == [BETTER]


def test_the_arguments_of_ltx2s_step():
    pipe = with_step()
    model = ScriptedModel({USERS: [BETTER]})
    pipe.load_custom(Rewriter(model, temperature=1.0))
    settings = {"system_prompt": "be brief", "prompt_max_new_tokens": 20}
    draw(pipe, enable_prompt_enhancement=True, prompt_enhancement_seed=3, **settings)
    assert model.chats[0].messages[0].content == "be brief"
    assert model.chats[0].seed == 3
    assert model.samplings[0].max_new_tokens == 20


def test_a_rewriting_that_is_too_long_is_asked_again():
    pipe = with_step()
    model = ScriptedModel({USERS: [f"{BETTER} {' '.join(map(chr, range(97, 123)))} " * 3, BETTER]})
    pipe.load_custom(Rewriter(model))
    found = draw(pipe, output="rewritings", enable_prompt_enhancement=True)
    assert [each.text for each in found] == [BETTER]
    assert "it is too long" in model.chats[1].messages[-1].content


def test_stage_and_step_do_not_both_rewrite():
    pipe = with_step()
    model = ScriptedModel({USERS: [BETTER]})
    pipe.load_custom(Rewriter(model))
    with pytest.raises(ConfigError, match="would both rewrite the prompt"):
        draw(pipe, rewrite=True, enable_prompt_enhancement=True)
    assert model.chats == []
    expected = draw(pipe, enable_prompt_enhancement=True)
    assert np.array_equal(draw(pipe, rewrite=True), expected)
