"""together= in calls and with concepts that it cannot act on."""

from __future__ import annotations

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from safetensors.torch import save_file

from customize.concepts.types import Lora, LoraInfo
from customize.core.lowrank import LowRank
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from customize.pipeline.rank_channels import rank_channels
from customize.pipeline.state import get_state
from customize.stages.concept_routing import ConceptRouter
from customize.stages.concept_words import RoutedPrompt, named_concepts, wordless_concepts
from tests.stages.together_making import HALVES, LEFT, PROMPT, alike, draw, pair
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
    "masks": (
        {"return_masks": True, "together": False},
        "return_masks=True needs the masks that together=False leaves out",
    ),
    "masks of text": ({"together": True, "return_masks": "yes"}, "invalid return_masks='yes'"),
    "unknown": ({"together": HALVES | {"<kit>": LEFT}}, "'<kit>' is no concept.*rex, tom"),
    "twice": ({"together": HALVES | {"rex": LEFT}}, "'rex' is given two areas"),
    "unnamed": (
        {"together": {"<rex>": LEFT, "<tom>": 1 - LEFT}, "prompt": "a photo of <rex>"},
        "no prompt names tom, which has an area",
    ),
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


@pytest.mark.parametrize("call", [{"together": True}, {"together": HALVES}, {"regions": HALVES}])
def test_caches_of_unets_are_refused(call):
    pipe = pair()
    expected = draw(pipe, **call)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    with pytest.raises(PipelineError, match="caches outputs from step to step"):
        draw(pipe, **call)
    fresh = pair()
    assert torch.equal(draw(fresh, **call), expected)


def test_concepts_that_cannot_be_routed_are_refused():
    with pytest.raises(PipelineError, match="the merge ties has mixed the concepts"):
        draw(pair(merge="ties"), together=True)


def test_dora_whose_ranks_fill_a_layer_is_refused_by_name(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe, generator = pair(names=("rex",)), torch.Generator().manual_seed(3)
    out, width = family_of(pipe.components).layers("unet")[name]
    tensors = {
        f"unet.{name}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"unet.{name}.lora_B.weight": 0.1 * torch.randn(out, 2, generator=generator),
        f"unet.{name}.lora_magnitude_vector": torch.ones(out),
    }
    save_file(tensors, tmp_path / "dora.safetensors")
    pipe.load_custom(tmp_path / "dora.safetensors", merge="sum")
    with pytest.raises(PipelineError, match=f"mixed the concepts in the layer unet.{name}"):
        draw(pipe, "a photo of <rex> and a cat", together=True)


def test_concepts_without_words_act_everywhere():
    pipe = pair()
    family = family_of(pipe.components)
    generator = torch.Generator().manual_seed(3)
    layers = family.layers("unet")
    modules = [*family.adapter_targets("unet"), "mid_block.resnets.0.time_emb_proj"]

    def style():
        updates = {
            module: LowRank(
                0.1 * torch.randn(layers[module][0], 2, generator=generator),
                torch.randn(2, layers[module][1], generator=generator),
                1.0,
            )
            for module in modules
        }
        info = LoraInfo("style", "sd", "", 2)
        return Lora(info, {"unet": updates})

    routed = draw(pipe, together=HALVES)
    pipe.load_custom(style())
    state = get_state(pipe)
    assert wordless_concepts(state) == (2,)
    assert not torch.allclose(draw(pipe, together=HALVES), routed, atol=1e-2)
    named = named_concepts(PROMPT, state)
    encoded = family.encode_prompts([PROMPT])["prompt_embeds"][0].detach()
    nowhere = ConceptRouter(
        family,
        rank_channels(family, state),
        3,
        [RoutedPrompt(PROMPT, named, encoded, encoded, ((), ()))],
        [lambda *grid: torch.zeros(2, *grid)],
        wordless_concepts(state),
    )
    with nowhere.attach():
        alone = draw(pipe)  # the style acts in the negative branch, too
    pipe.load_custom(weights={"rex": {"unet": 0.0}, "tom": {"unet": 0.0}})
    assert alike(alone, draw(pipe))


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
    half = {"rex": torch.ones(2, 2), "mine": LEFT}
    whole = half | {"mine": torch.ones(2, 2)}
    assert not torch.allclose(
        draw(pipe, prompt, together=half), draw(pipe, prompt, together=whole), atol=1e-4
    )
