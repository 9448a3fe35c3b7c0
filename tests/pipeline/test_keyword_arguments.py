"""Keywords that no pipeline reads."""

from __future__ import annotations

import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from customize.errors import ConfigError
from customize.pipeline.keyword_arguments import keywords_read
from tests.pipeline.making import MAKERS, attached, modular
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3

makers = pytest.mark.parametrize("make", [*MAKERS.values(), tiny_flux], ids=[*MAKERS, "flux"])
NEAR = {"avoids": "avoid", "region": "regions", "Regions": "regions", "avoid_": "avoid"}


def draw(pipe, **call):
    arguments = {"prompt": "a dog", "num_inference_steps": 1, "output_type": "np"}
    size = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    return pipe(**arguments | size | call)


@makers
@pytest.mark.parametrize("load", [False, True], ids=["never customized", "customized"])
def test_misspelt_keywords_are_refused_on_every_pipeline(make, load):
    pipe = attached(make) if load else make()
    for wrong, right in NEAR.items():
        with pytest.raises(ConfigError, match=rf"reads no argument {wrong}.*write {right}\b"):
            draw(pipe, **{wrong: "beach"})
    with pytest.raises(ConfigError, match="write guidance_scale"):
        draw(pipe, guidance_scal=3.0)


def test_arguments_of_load_custom_are_named():
    with pytest.raises(ConfigError, match=r"library is an argument of load_custom"):
        draw(tiny_sd(), library="concepts")


def test_keywords_that_pipelines_read_are_accepted():
    pipe = tiny_sd()
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw(pipe, callback=lambda i, t, latents: steps.append(i), callback_steps=1)
        draw(pipe, anything=3)  # ignored, as ever
    assert steps == [0]
    with pytest.raises(TypeError, match="anything"):
        draw(tiny_sd3(), anything=3)


def test_classes_that_delegate_keywords():
    class Handing(StableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    class Opaque(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Reading(StableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            self.seen = kwargs.pop("region_count", None), kwargs.get("avoidance")
            kwargs = {k: v for k, v in kwargs.items() if k != "avoidance"}
            return super().__call__(prompt, **kwargs)

    parts = tiny_sd().components
    for kind in (Handing, Opaque, Reading):
        pipe = kind(**parts, requires_safety_checker=False)
        with pytest.raises(ConfigError, match=r"reads no argument avoids"):
            draw(pipe, avoids="beach")
    draw(pipe, region_count=3, avoidance=4)
    assert pipe.seen == (3, 4)


def test_arguments_of_the_pipeline_take_precedence():
    class Own(StableDiffusionPipeline):
        def __call__(self, prompt, regions=None, **kwargs):
            self.seen = regions
            return super().__call__(prompt, **kwargs)

    plain = tiny_sd()
    pipe = Own(**plain.components, requires_safety_checker=False)
    draw(pipe, regions="mine")
    assert pipe.seen == "mine"
    names = inspect.signature(Own.__call__).parameters
    assert list(names)[-1] == "kwargs" and "avoid" in names


def test_modular_pipelines_read_the_inputs_of_their_blocks():
    pipe = modular(tiny_sd3())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigError, match="write regions"):
        draw(pipe, region={})
    with pytest.warns(UserWarning, match="Unexpected input"):
        draw(pipe, anything=3)


def test_read_keywords_are_known_for_every_pipeline():
    """Of diffusers' pipelines that take keywords, all but a few say which they read."""
    keywords = {}
    for name in dir(diffusers):
        if name.startswith("StableDiffusion") and name.endswith("Pipeline"):
            kind = getattr(diffusers, name)
            if "__call__" in vars(kind):
                keywords[name] = keywords_read(vars(kind)["__call__"])
    assert len(keywords) > 10 and None not in keywords.values()
    assert keywords["StableDiffusionPipeline"] == {"callback", "callback_steps"}


def test_all_ways_to_read_keywords_are_recognized():
    def call(self, prompt, **kwargs):
        a = kwargs.pop("a", None)
        b = kwargs.get("b"), kwargs["c"]
        return a, b, "d" in kwargs

    def handing(self, **kwargs):
        kwargs.pop("a")
        return call(self, "", **kwargs)

    assert keywords_read(call) == {"a", "b", "c", "d"}
    assert keywords_read(handing) is None
    assert keywords_read(lambda self, prompt: None) == frozenset()
    assert keywords_read(np.add) is None
