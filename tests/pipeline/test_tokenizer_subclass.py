"""Other pipelines from the same components, saving, and the pipeline's own interface."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3AutoBlocks,
)

from customize.errors import PipelineError
from customize.families import family_of
from customize.stages import CALL_ARGUMENTS, load_stages
from tests.forked import run_forked
from tests.pipeline.making import MAKERS, PROMPT, assert_same, concept, draw, everything, user_lora

IMG2IMG = {
    "sd": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])

STOCK = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(1)
picture = pipe(sys.argv[2], num_inference_steps=2, generator=noise, output_type="np").images[0]
np.save(sys.argv[3], picture)
assert "customize" not in sys.modules
"""


@both
def test_the_pipeline_keeps_its_interface(make):
    pipe, plain = make(), make()
    pipe.load_custom(concept(pipe))
    assert type(pipe) is type(plain)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(pipe), name) == getattr(type(plain), name)
        assert getattr(type(pipe.tokenizer), name) == getattr(type(plain.tokenizer), name)
    for method in ("__init__", "encode_prompt", "save_pretrained"):
        assert inspect.signature(getattr(pipe, method)) == inspect.signature(getattr(plain, method))
    call = inspect.signature(type(pipe).__call__)
    assert set(CALL_ARGUMENTS) == {name for stage in load_stages() for name in stage.arguments}
    assert set(CALL_ARGUMENTS) <= call.parameters.keys()
    stock_parameters = [
        parameter for parameter in call.parameters.values() if parameter.name not in CALL_ARGUMENTS
    ]
    stock = inspect.signature(inspect.unwrap(type(plain).__call__))
    assert call.replace(parameters=stock_parameters) == stock
    assert inspect.signature(pipe.tokenizer) == inspect.signature(plain.tokenizer)
    assert pipe.components.keys() == plain.components.keys()
    assert dict(pipe.config) == dict(plain.config)


@both
@modes
def test_pipelines_from_the_same_components_share_the_concepts(make, fuse):
    pipe = make()
    kind = IMG2IMG[family_of(pipe.components).name]
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    image = torch.zeros(1, 3, 32, 32)

    def redraw(other, prompt=PROMPT):
        noise = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np"}
        return other(prompt, image=image, generator=noise, **call).images[0]

    base = redraw(kind(**make().components))
    expanded = PROMPT.replace("<rex>", "<rex> <rex>_1")
    pipe.load_custom(rex, fuse=fuse)
    before = None
    for other in (
        kind.from_pipe(pipe),
        AutoPipelineForImage2Image.from_pipe(pipe),
        kind(**pipe.components),
    ):
        other.set_progress_bar_config(disable=True)
        assert type(other) is kind
        assert other.custom.rows == pipe.custom.rows
        picture = redraw(other)
        assert not np.allclose(picture, base, atol=1e-3)
        assert before is None or np.array_equal(picture, before)
        before = picture
        if kind is StableDiffusion3Img2ImgPipeline:  # the other's mixin would expand it again
            assert np.array_equal(picture, redraw(other, expanded))
    other.load_custom(tom, fuse=fuse)
    assert [row.name for row in pipe.custom.rows] == ["rex", "tom"]
    pipe.unload_custom()
    assert other.custom.rows == ()
    assert np.array_equal(redraw(other), base)
    other.unload_custom()
    assert type(other) is kind
    assert_same(everything(make()), everything(pipe))


@both
def test_saving_with_adapters_is_refused_and_writes_nothing(make, tmp_path):
    pipe = make()
    pipe.load_custom(concept(pipe), fuse=True)
    pipe.load_custom(concept(pipe, "tom", index=1))
    with pytest.raises(PipelineError, match=r"concepts tom are attached beside.*fuse=True"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unload_custom()
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), draw(make()))


@both
def test_other_pipelines_of_the_models_refuse_saving_with_adapters(make, tmp_path):
    pipe = make()
    pipe.load_custom(concept(pipe))
    other = type(pipe)(**pipe.components)
    with pytest.raises(PipelineError, match=r"concepts rex are attached beside.*fuse=True"):
        other.save_pretrained(tmp_path / "saved")
    pipe.load_custom(weights={"rex": 1.0}, fuse=True)
    pipe.unload_custom()
    other.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), draw(make()))


@both
def test_fuse_lora_refuses_concepts(make):
    pipe = make()
    pipe.load_custom(concept(pipe))
    before = everything(pipe)
    for arguments in ({}, {"adapter_names": ["customize"]}):
        with pytest.raises(PipelineError, match=r"unload_custom could not.*fuse=True"):
            pipe.fuse_lora(**arguments)
    assert_same(before, everything(pipe))
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    pipe.fuse_lora(adapter_names=["mine"])
    assert pipe.num_fused_loras == 1 and len(pipe.custom.rows) == 1
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.unload_custom()
    pipe.fuse_lora()  # its own method again: there is nothing to fuse


@both
def test_pipelines_saved_with_fused_concepts_load_in_stock_diffusers(make, tmp_path):
    pipe = make()
    pipe.load_custom(concept(pipe), fuse=True)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    assert index["tokenizer"] == ["transformers", type(pipe.tokenizer).__name__]
    prompt = PROMPT
    if make is MAKERS["sd3"]:  # which expands nothing by itself
        prompt = PROMPT.replace("<rex>", "<rex> <rex>_1")
    result = tmp_path / "picture.npy"
    done = run_forked(STOCK, tmp_path / "saved", prompt, result)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(result), draw(pipe), atol=1e-5)


@modes
def test_modular_pipelines(fuse, tmp_path):
    standard = MAKERS["sd3"]()
    rex = concept(standard)
    pipe = StableDiffusion3AutoBlocks().init_pipeline()
    pipe.update_components(**standard.components)
    pipe.set_progress_bar_config(disable=True)
    before = everything(pipe)

    def draw_modular(prompt=PROMPT):
        noise = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
        return pipe(prompt=prompt, generator=noise, output="images", **call)[0]

    base = draw_modular()
    assert pipe.load_custom(rex, fuse=fuse) is pipe
    assert [row.name for row in pipe.custom.rows] == ["rex"]
    assert standard.custom.rows == pipe.custom.rows
    if not fuse:
        with pytest.raises(PipelineError, match="concepts rex are attached beside"):
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    picture = draw_modular()
    assert not np.allclose(picture, base, atol=1e-3)
    assert np.array_equal(picture, draw_modular(PROMPT.replace("<rex>", "<rex> <rex>_1")))
    pipe.unload_custom()
    assert np.array_equal(draw_modular(), base)
    assert_same(before, everything(pipe))


@both
def test_fuse_lora_of_other_pipelines_refuses_concepts(make):
    pipe = make()
    plain = everything(pipe)
    pipe.load_custom(concept(pipe))
    other = IMG2IMG[family_of(pipe.components).name].from_pipe(pipe)
    before = everything(pipe)
    for call in (
        lambda: other.fuse_lora(),
        lambda: other.fuse_lora(components=["text_encoder"]),
        lambda: family_of(pipe.components).denoiser.fuse_lora(),
    ):
        with pytest.raises(PipelineError, match=r"unload_custom could not.*fuse=True"):
            call()
    assert_same(before, everything(pipe))
    pipe.unload_custom()
    assert_same(plain, everything(pipe))


@both
def test_refused_saves_of_any_pipeline_write_nothing(make, tmp_path):
    pipe = make()
    pipe.load_custom(concept(pipe))
    fresh = {family_of(pipe.components).denoiser_key: family_of(make().components).denoiser}
    for other in (
        IMG2IMG[family_of(pipe.components).name].from_pipe(pipe),
        type(pipe)(**{**pipe.components, **fresh}),  # only its text encoders are wrapped
    ):
        with pytest.raises(PipelineError, match=r"concepts rex are attached beside.*fuse=True"):
            other.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
