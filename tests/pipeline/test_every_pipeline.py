"""Stages on every pipeline of the same models, in any order of making and loading."""

from __future__ import annotations

import inspect
import timeit

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import customize
from customize.api.patch_diffusers import wrap_calls
from customize.concepts.io.write_concept import save_concept
from customize.errors import CustomizeError, PipelineError
from tests.pipeline.making import MAKERS, attached, concept, modular
from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.tiny_video import tiny_wan

PROMPT = "a photo of <rex> on the beach"
REGIONS = {"<rex>": (0.0, 0.0, 0.5, 1.0)}
IMAGE = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
MASK = torch.ones(1, 1, 32, 32)
REDRAW = {"image": IMAGE, "strength": 0.9}
INPAINT = REDRAW | {"mask_image": MASK}

#: of each: how the models are made, the class of the other pipeline, and what its call needs.
OTHERS = {
    "sd again": (tiny_sd, "StableDiffusionPipeline", {}),
    "sd img2img": (tiny_sd, "StableDiffusionImg2ImgPipeline", REDRAW),
    "sd inpaint": (tiny_sd, "StableDiffusionInpaintPipeline", INPAINT),
    "sd controlnet": (tiny_sd, "StableDiffusionControlNetPipeline", {"image": IMAGE}),
    "sdxl again": (tiny_sdxl, "StableDiffusionXLPipeline", {}),
    "sdxl img2img": (tiny_sdxl, "StableDiffusionXLImg2ImgPipeline", REDRAW),
    "sdxl inpaint": (tiny_sdxl, "StableDiffusionXLInpaintPipeline", INPAINT),
    "sd3 img2img": (tiny_sd3, "StableDiffusion3Img2ImgPipeline", REDRAW),
    "sd3 inpaint": (lambda: tiny_sd3(channels=16), "StableDiffusion3InpaintPipeline", INPAINT),
    "flux img2img": (tiny_flux, "FluxImg2ImgPipeline", REDRAW),
    "flux inpaint": (tiny_flux, "FluxInpaintPipeline", INPAINT),
    "qwen img2img": (tiny_qwen_image, "QwenImageImg2ImgPipeline", REDRAW),
    "z-image img2img": (tiny_z_image, "ZImageImg2ImgPipeline", REDRAW),
    "wan again": (tiny_wan, "WanPipeline", {}),
}
others = pytest.mark.parametrize("name", OTHERS)


def other_of(pipe, name):
    make, kind, _ = OTHERS[name]
    cls = getattr(diffusers, kind)
    parts = dict(pipe.components)
    if "controlnet" in name:
        torch.manual_seed(0)
        parts["controlnet"] = diffusers.ControlNetModel.from_unet(
            make().unet, conditioning_embedding_out_channels=(16, 32)
        )
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    other = cls(**parts, **extra)
    other.set_progress_bar_config(disable=True)
    return other


def draw(pipe, name, **call):
    noise = torch.Generator().manual_seed(1)
    arguments = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "output_type": "np",
        "generator": noise,
    }
    specific = OTHERS[name][2]
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        arguments |= {"height": 32, "width": 32}
    if OTHERS[name][0] is tiny_wan:
        arguments |= {"num_frames": 1}
    result = pipe(**arguments | specific | call)
    return getattr(result, "frames", None) if hasattr(result, "frames") else result.images


@others
def test_stages_act_on_pipelines_made_before_and_after_loading(name):
    pipe = OTHERS[name][0]()
    before = other_of(pipe, name)
    pipe.load_custom(concept(pipe))
    after = other_of(pipe, name)
    plain = draw(before, name)
    assert np.array_equal(draw(after, name), plain)
    for asked in ({"regions": REGIONS}, {"avoid": "house"}):
        picture = draw(before, name, **asked)
        assert not np.array_equal(picture, plain), asked
        assert np.array_equal(draw(after, name, **asked), picture), asked
        assert np.array_equal(draw(before, name), plain)  # and nothing of it is left
    after.load_custom(customize.Decor(avoid="house"))
    assert np.array_equal(draw(before, name), draw(before, name, avoid="house"))
    assert not np.array_equal(draw(before, name), plain)
    pipe.unload_custom()
    assert not before.custom.rows and not before.custom.reports


@pytest.mark.parametrize("name", ["sd img2img", "sdxl inpaint", "sd3 img2img", "qwen img2img"])
def test_libraries_serve_all_pipelines_of_the_models(name, tmp_path):
    pipe = OTHERS[name][0]()
    other, rex = other_of(pipe, name), concept(pipe)
    save_concept(rex, tmp_path / "rex")
    save_concept(concept(pipe, "tom", index=1), tmp_path / "tom")
    pipe.load_custom(rex)
    expected = draw(other, name)
    pipe.unload_custom()
    pipe.load_custom(library=tmp_path)
    assert np.array_equal(draw(other, name), expected)
    with pytest.raises(CustomizeError, match="it has <rex>"):
        draw(other, name, prompt="<rexx>")
    draw(other, name, prompt="a <tom>")
    assert [row.name for row in pipe.custom.rows] == ["tom"]


@pytest.mark.parametrize("make", [*MAKERS.values(), tiny_flux], ids=[*MAKERS, "flux"])
def test_regions_and_avoid_need_no_concept(make):
    pipe = make()
    name = next(key for key, (maker, *_) in OTHERS.items() if maker is make)
    pipe = pipe if not OTHERS[name][2] else other_of(pipe, name)
    plain = draw(pipe, name, prompt="a dog on the beach")
    regions = {"dog": (0.0, 0.0, 0.5, 1.0)}
    for asked in ({"regions": regions}, {"avoid": "house"}):
        assert not np.array_equal(draw(pipe, name, prompt="a dog on the beach", **asked), plain)
    assert np.array_equal(draw(pipe, name, prompt="a dog on the beach"), plain)


def test_unknown_families_refuse_stage_arguments():
    class Strange(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self, prompt=None, **kwargs):
            return prompt

    pipe = Strange(diffusers.UNet1DModel(block_out_channels=(32, 32, 64)), tiny_sd().scheduler)
    assert pipe("a dog") == "a dog"
    for asked in ({"regions": REGIONS}, {"avoid": "house"}):
        with pytest.raises(PipelineError, match="no known model family"):
            pipe("a dog", **asked)


class Counting(StableDiffusionPipeline):
    """A class of a user's that calls the stock one, of which stages are to know nothing."""

    calls = 0

    def __call__(self, prompt, **kwargs):
        type(self).calls += 1
        return super().__call__(prompt, **kwargs)


class Opaque(StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Asking(StableDiffusionPipeline):
    """One that asks for regions itself."""

    def __call__(self, prompt, **kwargs):
        return super().__call__(prompt, regions=REGIONS, **kwargs)


@pytest.mark.parametrize("kind", [Counting, Opaque, Asking])
def test_stages_run_once_in_classes_that_delegate_calls(kind):
    pipe = attached()
    other = kind(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for asked in ({"regions": REGIONS}, {"avoid": "house"}, {}):
        expected = asked | ({"regions": REGIONS} if kind is Asking else {})
        arguments = {} if kind is Asking and "regions" in asked else asked
        assert np.array_equal(
            draw(other, "sd again", **arguments), draw(pipe, "sd again", **expected)
        )


def test_stages_run_in_replaced_calls(monkeypatch):
    pipe = attached()
    expected = draw(pipe, "sd again", avoid="house")
    patched = StableDiffusionPipeline.__call__

    def wrapped(self, *args, **kwargs):  # as programs that cache steps do
        return patched(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", wrapped)
    assert np.array_equal(draw(pipe, "sd again", avoid="house"), expected)
    stock = patched.__wrapped__

    def replaced(self, prompt=None, negative_prompt=None, **kwargs):
        return stock(self, prompt, negative_prompt=negative_prompt, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", replaced)
    wrap_calls(StableDiffusionPipeline)
    assert np.array_equal(draw(pipe, "sd again", avoid="house"), expected)


def test_modular_and_standard_pipelines_share_settings():
    pipe = tiny_sd3()
    other = modular(pipe)
    other.set_progress_bar_config(disable=True)
    pipe.load_custom(concept(pipe))

    def picture(**call):
        noise = torch.Generator().manual_seed(1)
        arguments = {"prompt": PROMPT, "num_inference_steps": 2, "height": 32, "width": 32}
        return other(**arguments, generator=noise, output_type="np", output="images", **call)

    plain, clean = picture(), picture(avoid="house")
    assert not np.array_equal(plain, clean)
    pipe.load_custom(customize.Decor(avoid="house"))
    assert np.array_equal(picture(), clean)


def test_uncustomized_calls_have_negligible_overhead():
    class Quick(StableDiffusionPipeline):
        def __call__(self, prompt=None, callback=None):
            return prompt

    pipe = Quick(**tiny_sd().components, requires_safety_checker=False)
    pipe("a dog")
    seconds = min(timeit.repeat(lambda: pipe("a dog"), number=20, repeat=5)) / 20
    assert seconds < 1e-3
