"""The stage of ``reference_images=``: which calls it changes, and how it refuses the others."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from customize.concepts.io.write_concept import save_concept
from customize.errors import ConfigError, PipelineError
from tests.pipeline.making import concept
from tests.tiny import tiny_flux, tiny_sd
from tests.tiny_llm import tiny_flux2_klein

RED, BLUE = (Image.new("RGB", (64, 96), color) for color in ("red", "blue"))


def draw(pipe, prompt="a dog on the beach", **call):
    noise = torch.Generator().manual_seed(1)
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(prompt=prompt, generator=noise, **settings | call).images


def test_references_are_the_same_with_and_without_concepts_loaded():
    pipe = tiny_flux2_klein()
    plain = draw(pipe)
    native = draw(pipe, image=[RED, BLUE])
    assert not np.array_equal(native, plain)
    assert np.array_equal(draw(pipe, reference_images=[RED, BLUE]), native)
    pipe.load_custom(concept(pipe))
    attached = draw(pipe, image=[RED, BLUE])
    assert not np.array_equal(attached, native)
    assert np.array_equal(draw(pipe, reference_images=[RED, BLUE]), attached)
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), plain)


def test_references_combine_with_other_stages():
    pipe = tiny_flux2_klein()
    for asked in ({"avoid": "cat"}, {"regions": {"dog": (0.0, 0.0, 0.5, 1.0)}}):
        expected = draw(pipe, image=[RED], **asked)
        assert np.array_equal(draw(pipe, reference_images=RED, **asked), expected)
        assert not np.array_equal(expected, draw(pipe, image=[RED]))


def test_models_without_references_name_those_with():
    for pipe in (tiny_sd(), tiny_flux()):
        plain = draw(pipe)
        with pytest.raises(PipelineError, match="takes no reference images by itself") as error:
            draw(pipe, reference_images=[RED])
        assert "Flux2Pipeline" in str(error.value)
        assert np.array_equal(draw(pipe), plain)


def test_a_scale_without_references_is_refused():
    with pytest.raises(ConfigError, match="without reference_images"):
        draw(tiny_sd(), reference_scale=0.5)


def test_none_is_no_reference():
    pipe = tiny_sd()
    assert np.array_equal(draw(pipe, reference_images=None), draw(pipe))


def test_models_of_no_family_get_their_references():
    """The stage needs no family, as others do."""

    class OmniGenPipeline(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self, prompt=None, input_images=None):
            return prompt, input_images

    pipe = OmniGenPipeline(
        diffusers.UNet1DModel(block_out_channels=(32, 32, 64)), tiny_sd().scheduler
    )
    marked = "the dog of <img><|image_1|></img> beside <img><|image_2|></img>"
    prompt, images = pipe(marked, reference_images=[RED, BLUE])
    assert prompt == marked
    assert [[image.getpixel((0, 0)) for image in group] for group in images] == [
        [(255, 0, 0), (0, 0, 255)]
    ]
    with pytest.raises(PipelineError, match="no known model family"):
        pipe(marked, reference_images=[RED, BLUE], avoid="hat")


class Own(diffusers.DiffusionPipeline):
    """A pipeline with an argument of the same name, and a meaning of its own."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self, prompt=None, reference_images=None):
        return reference_images


def test_the_own_argument_of_an_unknown_pipeline_is_left_alone():
    pipe = Own(diffusers.UNet1DModel(block_out_channels=(32, 32, 64)))
    assert pipe("a dog", reference_images="anything") == "anything"
    assert pipe("a dog") is None
    with pytest.raises(PipelineError, match="takes no reference images by itself"):
        pipe("a dog", reference_images="anything", reference_scale=0.5)


def test_the_prompt_may_come_first_on_every_model(tmp_path):
    pipe = tiny_flux2_klein()  # whose first parameter is the images
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    noise = torch.Generator().manual_seed(1)
    first = pipe("a dog on the beach", reference_images=[RED], generator=noise, **call).images
    assert np.array_equal(first, draw(pipe, image=[RED]))
    with pytest.raises(ConfigError, match="the call has both"):
        pipe([BLUE], "a dog", reference_images=[RED])
    # The stages before this one see it too.
    save_concept(concept(pipe), tmp_path / "rex")
    pipe.load_custom(library=tmp_path)
    noise.manual_seed(1)
    pipe("a photo of <rex>", reference_images=[RED], generator=noise, **call)
    assert [row.name for row in pipe.custom.rows] == ["rex"]


def test_positional_arguments_keep_their_places():
    pipe = tiny_flux2_klein()
    call = {"generator": torch.Generator().manual_seed(1), "output_type": "np"}
    native = pipe([RED], "a dog", 32, 32, 2, **call).images
    call["generator"].manual_seed(1)
    asked = pipe(None, "a dog", 32, 32, 2, reference_images=[RED], **call).images
    assert np.array_equal(asked, native)
