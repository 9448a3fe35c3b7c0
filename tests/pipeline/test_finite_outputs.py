"""Pictures that are not finite are told, with the concept that is the likely reason."""

import warnings

import pytest
import torch

from customize.concepts.types import Concept
from customize.core.lowrank import LowRank
from customize.errors import ConfigError
from tests.pipeline.making import concept, draw, modular
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl

MESSAGE = r"not finite.*of the attached concepts rex changes the model most, with weight 1e\+30"


@pytest.mark.parametrize("output", ["np", "pil", "pt", "latent"])
@pytest.mark.parametrize("fuse", [False, True])
def test_concept_with_the_largest_update_is_named(output, fuse):
    pipe = tiny_sd()
    tom = concept(pipe, "tom", index=1)
    pipe.load_custom(tom, concept(pipe), weights=[0.5, 1e30], fuse=fuse)
    with pytest.warns(UserWarning, match=MESSAGE):
        pipe("a photo of <rex>", num_inference_steps=2, output_type=output, height=32, width=32)


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_finite_images_and_the_base_do_not_warn(make):
    pipe = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_custom(concept(pipe))
        for output in ("np", "pil"):
            pipe("a dog", num_inference_steps=1, output_type=output, height=32, width=32)


def test_modular_pipelines_warn():
    pipe = modular(tiny_sdxl())
    pipe.load_custom(concept(pipe), weights=[1e30])
    with pytest.warns(UserWarning, match="attached concepts rex changes the model most"):
        pipe(prompt="a dog", num_inference_steps=1, height=32, width=32, output="images")


@pytest.mark.parametrize("fuse", [False, True])
def test_products_beyond_the_dtype_are_refused_by_name(fuse):
    """Though both factors fit into it."""
    pipe = tiny_sd().to(torch.float16)
    rex, before = concept(pipe), draw(tiny_sd().to(torch.float16))
    products = {
        component: {
            m: LowRank(u.up * 0 + 600.0, u.down * 0 + 600.0, u.scale) for m, u in modules.items()
        }
        for component, modules in rex.updates.items()
    }
    loud = Concept(rex.info, products, rex.embeddings)
    with pytest.raises(ConfigError, match=r"range of torch.float16, mostly by rex \(weight 1\)"):
        pipe.load_custom(concept(pipe, "tom", index=1), loud, fuse=fuse)
    assert (draw(pipe) == before).all()
