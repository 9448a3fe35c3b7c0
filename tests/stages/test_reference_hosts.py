"""Reference models on other families, offloaded, compiled and modular pipelines."""

from __future__ import annotations

import gc

import diffusers
import numpy as np
import pytest
import torch

from customize.stages.references import References
from tests.base.test_placement import offload_groups, offload_layers, offload_models
from tests.references.test_encoder import make_images
from tests.references.test_seams import snapshot
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import drawn, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

A, B = make_images(2), make_images(2, 1)
PROMPT = "a dog on the beach"


def images(pipe, prompt=PROMPT, **call):
    count = 1 if isinstance(prompt, str) else len(prompt)
    generators = [torch.Generator().manual_seed(1) for _ in range(count)]
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(prompt=prompt, generator=generators, **settings | call).images


def differ(a, b):
    return np.abs(a - b).max() > 1e-3


def close(a, b):
    return np.abs(a - b).max() < 1e-4


@pytest.mark.parametrize("kind", [tiny_sd3, tiny_flux])
def test_transformers_read_references(kind):
    pipe = kind()
    base = images(pipe)
    pipe.load_custom(References(tiny_reference_model(pipe.components, 48)))
    assert np.array_equal(images(pipe), base)
    before = snapshot(pipe.transformer)
    with_a = images(pipe, reference_images=A)
    assert differ(with_a, base)
    assert differ(images(pipe, reference_images=B), with_a)
    assert np.array_equal(images(pipe, reference_images=A), with_a)
    assert np.array_equal(images(pipe, reference_images=A, reference_scale=0.0), base)
    both = images(pipe, ["a dog", "a cat"], reference_images=[A, B], reference_scale=[0.0, 1.0])
    assert close(both[:1], images(pipe, "a dog"))
    assert close(both[1:], images(pipe, "a cat", reference_images=B))
    blocks = {"transformer_blocks": [1.0, 0.0]}
    one_block = images(pipe, reference_images=A, reference_scale=blocks)
    assert differ(one_block, with_a) and differ(one_block, base)
    assert snapshot(pipe.transformer) == before
    pipe.unload_custom()
    assert np.array_equal(images(pipe), base)


def test_flux_guided_by_a_negative_prompt():
    pipe = tiny_flux()
    pipe.load_custom(References(tiny_reference_model(pipe.components, 48)))
    call = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    guided = images(pipe, reference_images=A, **call)
    assert differ(guided, images(pipe, **call))
    assert differ(guided, images(pipe, reference_images=A))


def test_modular_pipelines_read_references():
    parts = tiny_sdxl().components
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}

    def draw(**more):
        return drawn(pipe, PROMPT, generator=torch.Generator().manual_seed(1), **call, **more)

    base = draw()
    pipe.load_custom(References(tiny_reference_model(parts, 40)))
    assert np.array_equal(draw(), base)
    with_a = draw(reference_images=A)
    assert differ(with_a, base)
    assert np.array_equal(draw(reference_images=A), with_a)  # nothing is kept in the caller's lists
    standard = tiny_sdxl().load_custom(References(tiny_reference_model(parts, 40)))
    expected = images(standard, reference_images=A, guidance_scale=7.5)
    assert close(with_a, expected)


@pytest.mark.parametrize("offload", [offload_models, offload_layers, offload_groups])
def test_offloaded_pipelines_read_references(offload):
    plain = tiny_sd()
    model = tiny_reference_model(plain.components)
    expected = images(plain.load_custom(References(model)), reference_images=A)
    pipe = tiny_sd()
    offload(pipe)
    base = images(pipe)
    pipe.load_custom(References(model))
    assert close(images(pipe, reference_images=A), expected)
    assert np.array_equal(images(pipe), base)
    assert close(images(pipe, reference_images=A), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_denoisers_read_references(in_place):
    torch._dynamo.reset()
    pipe = tiny_sd(few_layers=True)
    model = tiny_reference_model(pipe.components)
    expected = images(pipe.load_custom(References(model)), reference_images=A)
    base = images(pipe)
    assert differ(expected, base)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert close(images(pipe), base)
    assert close(images(pipe, reference_images=A), expected)
    assert close(images(pipe), base)
    plain = tiny_sd(few_layers=True).load_custom(References(model))
    call = {"reference_images": B, "reference_scale": 0.5}
    assert close(images(pipe, **call), images(plain, **call))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_chosen_attention_backends_read_references(backend):
    pipe = tiny_sd()
    model = tiny_reference_model(pipe.components)
    expected = images(pipe.load_custom(References(model)), reference_images=A)
    pipe.load_custom(attention=backend)
    assert close(images(pipe, reference_images=A), expected)
    pipe = tiny_flux().load_custom(attention=backend)
    pipe.load_custom(References(tiny_reference_model(pipe.components, 48)))
    assert differ(images(pipe, reference_images=A), images(pipe))


def test_half_precision_denoisers_read_references():
    pipe = tiny_sd()
    model = tiny_reference_model(pipe.components)
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    pipe.load_custom(References(model))
    assert differ(images(pipe, reference_images=A), images(pipe))
    assert next(model.adapter.parameters()).dtype == torch.float32
    assert model.adapter_on(pipe.device, torch.bfloat16) is model.adapter_on(
        pipe.device, torch.bfloat16
    )


def test_nothing_is_kept_of_a_call():
    pipe = tiny_sd()
    pipe.load_custom(References(tiny_reference_model(pipe.components)))
    images(pipe, reference_images=A)
    gc.collect()
    before = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    for _ in range(2):
        images(pipe, reference_images=A)
    gc.collect()
    assert sum(isinstance(each, torch.Tensor) for each in gc.get_objects()) <= before + 8
