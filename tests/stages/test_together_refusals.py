"""together= in calls and with concepts that it cannot act on."""

from __future__ import annotations

import pytest
import torch

from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from tests.stages.together_making import HALVES, LEFT, PROMPT, draw, pair
from tests.tiny import CLIP_LENGTH


def test_prompts_without_a_concept_are_drawn_plainly_with_a_warning():
    pipe = pair()
    prompt = "a dog and a cat"
    plain = draw(pipe, prompt)
    with pytest.warns(UserWarning, match="no prompt names an attached concept"):
        assert torch.equal(draw(pipe, prompt, together=True), plain)
    assert "no effect" in pipe.custom.reports["together"]


WRONG = {
    "text": ({"together": "yes"}, "invalid together='yes'"),
    "number": ({"together": 1.0}, "invalid together=1.0"),
    "empty": ({"together": {}}, "invalid together={}"),
    "masks": ({"return_masks": True}, "return_masks=True needs together=True"),
    "masks of text": ({"together": True, "return_masks": "yes"}, "invalid return_masks='yes'"),
    "unknown": ({"together": HALVES | {"<kit>": LEFT}}, "'<kit>' is no concept.*rex, tom"),
    "twice": ({"together": HALVES | {"rex": LEFT}}, "'rex' is given two areas"),
    "missing": ({"together": {"<rex>": LEFT}}, "names tom, without an area"),
    "area": ({"together": {"<rex>": LEFT, "<tom>": (0, 0, 64, 64)}}, "exceeds the image"),
    "regions": (
        {"together": True, "regions": {"<rex>": LEFT}},
        "regions cannot be combined with together=",
    ),
    "embeds": (
        {"together": True, "prompt": None, "prompt_embeds": torch.zeros(1, CLIP_LENGTH, 32)},
        "prompt_embeds cannot be combined with together=",
    ),
    "clip skip": ({"together": True, "clip_skip": 1}, "clip_skip cannot be combined"),
    "no text": ({"together": True, "prompt": None}, "needs the prompt as text"),
    "long": (
        {"together": True, "prompt": "<rex> " + "a red " * 9 + "dog and <tom>"},
        "longer than the text encoder reads",
    ),
}


@pytest.mark.filterwarnings("ignore:the prompt .* is cut off")
@pytest.mark.parametrize("name", WRONG)
def test_invalid_calls_are_refused_before_the_denoiser_runs(name):
    pipe = pair()
    call, message = WRONG[name]
    called = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(ConfigError, match=message):
        draw(pipe, **{"prompt": PROMPT} | call)
    assert not called
    handle.remove()
    assert draw(pipe).isfinite().all()


def test_concepts_that_cannot_be_routed_are_refused():
    with pytest.raises(PipelineError, match="the merge ties has mixed the concepts"):
        draw(pair(merge="ties"), together=True)


def test_layers_without_positions_are_refused_and_convolutions_routed():
    pipe = pair()
    generator = torch.Generator().manual_seed(3)

    def lora(module):
        out, width = family_of(pipe.components).layers("unet")[module]
        update = LowRank(
            0.1 * torch.randn(out, 2, generator=generator),
            torch.randn(2, width, generator=generator),
        )
        info = LoraInfo("mine", "sd", "", 2, trigger_words="red hat")
        return Lora(info, {"unet": {module: update}})

    prompt = "a photo of <rex> and a red hat"
    pipe.load_custom(lora("mid_block.resnets.0.time_emb_proj"))
    with pytest.raises(PipelineError, match="a layer without positions"):
        draw(pipe, prompt, together=True)
    pipe.unload_custom("mine")
    pipe.load_custom(lora("down_blocks.0.downsamplers.0.conv"))
    half = {"rex": torch.ones(2, 2), "tom": torch.ones(2, 2), "mine": LEFT}
    whole = half | {"mine": torch.ones(2, 2)}
    assert not torch.allclose(
        draw(pipe, prompt, together=half), draw(pipe, prompt, together=whole), atol=1e-4
    )
