"""The step that gives tokens of references to diffusers' blocks, in a modular SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise

from customize.api.references_step import ReferencesStep
from customize.errors import PipelineError
from customize.references.model import ReferenceModel
from customize.stages.references import References
from tests.pipeline.making import modular
from tests.references.test_encoder import make_images
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import tiny_sdxl

REPOSITORY = Path(__file__).parents[2] / "pipelines" / "references"
A, B = make_images(2), make_images(2, 1)
PROMPT = "a dog on the beach"


def with_step(step: Any = None) -> Any:
    """A pipeline with the step behind the text encoder's."""
    blocks = modular(tiny_sdxl()).blocks
    blocks.sub_blocks.insert("references", step or ReferencesStep(), 1)
    pipe = blocks.init_pipeline()
    parts = tiny_sdxl().components
    pipe.update_components(**{key: parts[key] for key in parts if key in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(pipe: Any) -> ReferenceModel:
    """Load references into a pipeline, and return their model."""
    model = tiny_reference_model(tiny_sdxl().components, 40)
    pipe.load_custom(References(model))
    return model


def draw(pipe: Any, prompt: Any = PROMPT, output: Any = "images", **call: Any) -> Any:
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    noise = torch.Generator().manual_seed(1)
    asked = {} if prompt is None else {"prompt": prompt}
    return pipe(**asked, generator=noise, output=output, **settings | call)


def close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() < 1e-4)


@pytest.fixture(scope="module")
def plain() -> Any:
    """A pipeline without the step."""
    pipe = modular(tiny_sdxl())
    load(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = with_step()
    load(pipe)
    return pipe


def test_avoided_words_leave_the_tokens_that_blocks_give(pipe: Any, plain: Any) -> None:
    prompts = ["a dog", "a cat"]
    drawn = draw(pipe, prompts, reference_images=[A, B], avoid="red")
    assert close(drawn, draw(plain, prompts, reference_images=[A, B], avoid="red"))
    assert not close(drawn, draw(pipe, prompts, reference_images=[A, B]))


@pytest.mark.parametrize(
    ("prompts", "call"),
    [
        (PROMPT, {"reference_images": A}),
        (PROMPT, {"reference_images": A, "num_images_per_prompt": 2, "reference_scale": 0.5}),
        (["a dog", "a cat"], {"reference_images": [A, B], "reference_scale": [1.0, 0.5]}),
        (["a dog", "a cat"], {"reference_images": A, "num_images_per_prompt": 2}),
        # diffusers' input step would put these into another order than the prompts.
        (["a dog", "a cat"], {"reference_images": [A, B], "num_images_per_prompt": 2}),
        (
            "a dog and a cat",
            {
                "reference_images": {"a dog": A, "a cat": B},
                "regions": {"a dog": (0, 0, 0.5, 1), "a cat": (0.5, 0, 1, 1)},
            },
        ),
        (
            "a dog and a cat",
            {"reference_images": A, "regions": {"a dog": (0, 0, 0.5, 1), "a cat": (0.5, 0, 1, 1)}},
        ),
    ],
)
def test_images_are_those_of_a_pipeline_without_the_step(
    plain: Any, pipe: Any, prompts: Any, call: dict[str, Any]
) -> None:
    base = {key: call[key] for key in call if not key.startswith("reference")}
    expected = draw(plain, prompts, **call)
    assert close(draw(pipe, prompts, **call), expected)
    assert close(draw(pipe, prompts, **call), expected)  # nothing is kept in lists of the first
    assert not close(expected, draw(plain, prompts, **base))
    assert np.array_equal(draw(pipe, prompts, **base), draw(plain, prompts, **base))


def test_diffusers_blocks_get_the_tokens_by_their_names(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    step = before_denoise.StableDiffusionXLInputStep
    check = step.check_inputs

    def remember(self: Any, components: Any, block_state: Any) -> None:
        read.append((block_state.ip_adapter_embeds, block_state.negative_ip_adapter_embeds))
        check(self, components, block_state)

    monkeypatch.setattr(step, "check_inputs", remember)
    setting = pipe.custom  # of the loaded model
    assert "references" in setting.reports
    names = ["ip_adapter_embeds", "negative_ip_adapter_embeds"]
    outputs = [
        draw(pipe, output=names, reference_images=A, num_images_per_prompt=2) for _ in range(2)
    ]
    model = tiny_reference_model(tiny_sdxl().components, 40)
    expected = (References(model).encode(A).tokens, model.unconditional_tokens())
    for output in outputs:
        for name, tokens in zip(names, expected, strict=True):
            (embeds,) = output[name]  # of both images
            assert embeds.shape == (2, 1, *tokens.shape)
            torch.testing.assert_close(embeds, tokens.expand_as(embeds))
    for first, second in zip(read[0], read[1], strict=True):
        assert first is not second
    # Without references, or without an effect, the blocks get none.
    read.clear()
    draw(pipe)
    draw(pipe, reference_images=A, reference_scale=0.0)
    assert read == [(None, None)] * 2


def test_prompts_may_be_encoded_in_another_way(plain: Any, pipe: Any) -> None:
    call = {"negative_prompt": "a cat", "clip_skip": 1}
    standard = tiny_sdxl()
    load(standard)
    expected = standard(
        PROMPT,
        reference_images=A,
        generator=torch.Generator().manual_seed(1),
        **call | {"guidance_scale": 7.5, "num_inference_steps": 2, "output_type": "np"},
        height=32,
        width=32,
    ).images
    assert close(draw(pipe, reference_images=A, **call), expected)
    # Without the step, negative prompts of a guider cannot be recognized then.
    with pytest.raises(PipelineError, match="cannot be told from prompts") as error:
        draw(plain, reference_images=A, **call)
    assert "ReferencesStep" in error.value.fix


def test_the_repository_has_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    step = ModularPipelineBlocks.from_pretrained(str(REPOSITORY), trust_remote_code=True)
    assert type(step) is ReferencesStep
    assert "reference model" in step.description
    pipe = with_step(step)
    with pytest.raises(PipelineError, match="no reference model is loaded") as error:
        draw(pipe, reference_images=A)
    assert "load_custom" in error.value.fix


def test_the_step_takes_the_place_of_diffusers_own(plain: Any) -> None:
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["ip_adapter"] = ReferencesStep()
    pipe = blocks.init_pipeline()
    parts = tiny_sdxl().components
    pipe.update_components(**{key: parts[key] for key in parts if key in pipe.components})
    load(pipe)
    assert close(draw(pipe, reference_images=A), draw(plain, reference_images=A))
