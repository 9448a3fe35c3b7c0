"""load_custom(memory=...): images and bytes under each strategy, and restoration after errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from customize.base.apply_memory_plan import apply_memory_plan
from customize.base.memory_plan import (
    GIB,
    STRATEGIES_WITHOUT_OFFLOAD,
    MemoryPlan,
    MemoryStrategy,
    estimate_peak_bytes,
    measure_components,
)
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.pipeline.test_families import MAKERS

CPU = torch.device("cpu")
CAST = STRATEGIES_WITHOUT_OFFLOAD[-1]

VIDEOS = ("animatediff", "wan", "wan-14b", "cogvideox", "ltx2")
PICTURES = [name for name in MAKERS if name not in VIDEOS]

# The tiny Z-Image has too few layers that are cast to need less memory.
every = pytest.mark.parametrize("name", [name for name in PICTURES if name != "z_image"])


@pytest.fixture(autouse=True)
def _no_text(monkeypatch):
    # The estimate for real text encoders exceeds the size of tiny pipelines.
    monkeypatch.setattr("customize.base.memory_plan.TEXT_ACTIVATIONS_PER_WIDTH", 0)


def memory_size_for(pipe, strategy):
    """Return a memory size that fits the strategy, but no faster one."""
    needed = estimate_peak_bytes(measure_components(family_of(pipe.components)), strategy)
    return f"{(needed + 2) / GIB:.12f}GB"


def denoiser(pipe):
    return family_of(pipe.components).denoiser


def stored(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["sd", "flux", "qwen_image"])
def test_sufficient_memory_changes_nothing(name):
    pipe = MAKERS[name]()
    bare, before = draw(pipe), everything(pipe)
    pipe.load_custom(memory="24GB")
    assert "memory: 24 GB: all models on the device; " in repr(pipe.custom)
    assert np.array_equal(draw(pipe), bare)
    vars(denoiser(pipe)).pop("_customize_memory")
    assert_same(before, everything(pipe))


def test_vae_tiling_matches_diffusers():
    pipe, plain = MAKERS["sd"](), MAKERS["sd"]()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    plain.vae.tile_sample_min_size, plain.vae.tile_latent_min_size = 16, 8
    whole = draw(plain)
    plain.vae.enable_tiling()
    with apply_memory_plan(
        pipe, family_of(pipe.components), MemoryPlan(GIB, MemoryStrategy(vae_tiling=True), 0), CPU
    ):
        pass
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert np.array_equal(draw(pipe), draw(plain))
    assert 1e-4 < np.abs(draw(pipe) - whole).mean() < 0.05
    assert "sliced and tiled" in repr(pipe.custom) and "float8" not in repr(pipe.custom)


@every
def test_layerwise_casting_matches_estimate_and_diffusers(name):
    pipe, plain = MAKERS[name](), MAKERS[name]()
    bare = draw(pipe)
    counted = measure_components(family_of(pipe.components)).float8_denoiser
    before = stored(denoiser(pipe))
    pipe.load_custom(memory=memory_size_for(pipe, CAST))
    assert "denoiser stored in float8" in repr(pipe.custom)
    assert stored(denoiser(pipe)) == counted < before
    denoiser(plain).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    plain.vae.enable_tiling()
    assert np.array_equal(draw(pipe), draw(plain))
    assert 0 < np.abs(draw(pipe) - bare).mean() < 0.1
    # The weights are in float8 again after the call, and casting cannot save more memory.
    assert (
        stored(denoiser(pipe))
        == counted
        == measure_components(family_of(pipe.components)).float8_denoiser
    )


@every
def test_concepts_keep_their_precision_under_layerwise_casting(name):
    pictures = []
    bare = MAKERS[name]()
    bare = draw(bare.load_custom(memory=memory_size_for(bare, CAST)))
    for order in ("before", "after", "at once"):
        pipe = MAKERS[name]()
        rex, word = concept(pipe), memory_size_for(pipe, CAST)
        if order == "at once":
            pipe.load_custom(rex, memory=word)
        elif order == "after":
            pipe.load_custom(memory=word).load_custom(rex)
        else:
            pipe.load_custom(rex)
            pipe.load_custom(memory=memory_size_for(pipe, CAST))
        layers = [module for module in denoiser(pipe).modules() if hasattr(module, "lora_A")]
        assert layers
        for layer in layers:
            assert layer.get_base_layer().weight.dtype == torch.float8_e4m3fn
            assert layer.lora_A["customize"].weight.dtype == torch.float32
            assert layer.lora_B["customize"].weight.dtype == torch.float32
        pictures.append(draw(pipe))
        assert len(pipe.custom.rows) == 1 and pipe.custom.memory
        pipe.unload_custom()
        assert pipe.custom.memory  # it stays
        assert np.array_equal(draw(pipe), bare)
    for picture in pictures[1:]:
        np.testing.assert_allclose(picture, pictures[0], atol=1e-5)
    assert np.abs(pictures[0] - bare).max() > 0.01


def test_layerwise_casting_of_a_model_with_skipped_layers():
    pipe, plain = MAKERS["z_image"](), MAKERS["z_image"]()
    family = family_of(pipe.components)
    counted = measure_components(family).float8_denoiser
    with apply_memory_plan(
        pipe, family, MemoryPlan(GIB, MemoryStrategy(layerwise_casting=True), 0), CPU
    ):
        pass
    plain.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    assert stored(pipe.transformer) == counted == stored(plain.transformer)
    assert np.array_equal(draw(pipe), draw(plain))


def test_fusing_into_float8_weights_is_refused():
    pipe = MAKERS["sd"]()
    rex = concept(pipe)
    pipe.load_custom(memory=memory_size_for(pipe, CAST))
    picture = draw(pipe)
    with pytest.raises(PipelineError, match=r"format: layerwise casting"):
        pipe.load_custom(rex, fuse=True)
    assert np.array_equal(draw(pipe), picture)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("placement", ["model", "group"])
def test_offloading_keeps_images_and_supports_concepts(name, placement):
    # Offloads to the CPU, which needs no accelerator; load_custom would not choose it.
    pipe, plain = MAKERS[name](), MAKERS[name]()
    rex, tom = concept(plain), concept(plain, "tom", index=1)
    plain.load_custom(rex)
    pipe.load_custom(rex)
    family = family_of(pipe.components)
    with apply_memory_plan(
        pipe, family, MemoryPlan(8 * GIB, MemoryStrategy(placement, vae_tiling=True), 0), CPU
    ):
        pass
    assert hooks(pipe)
    assert np.array_equal(draw(pipe), draw(plain))
    for pipeline in (pipe, plain):
        pipeline.load_custom(tom)
    assert np.array_equal(draw(pipe), draw(plain))
    pipe.unload_custom()
    plain.unload_custom()
    assert np.array_equal(draw(pipe), draw(plain)) and hooks(pipe)
    with pytest.raises(PipelineError, match="has a memory plan already: 8 GB"):
        pipe.load_custom(memory="12GB")


WAYS = [
    MemoryStrategy(vae_tiling=True),
    MemoryStrategy(vae_tiling=True, layerwise_casting=True),
    MemoryStrategy("model", vae_tiling=True),
    MemoryStrategy("model", layerwise_casting=True),
    MemoryStrategy("group", vae_tiling=True),
]


@pytest.mark.parametrize("strategy", WAYS, ids=str)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "with a concept"])
def test_error_restores_the_state(strategy, attached):
    pipe = MAKERS["sd"]()
    if attached:
        pipe.load_custom(concept(pipe))
    picture, before = draw(pipe), everything(pipe)
    notes, hooks_before = vars(pipe).keys(), hooks(pipe)
    family = family_of(pipe.components)
    with (
        pytest.raises(MemoryError),
        apply_memory_plan(pipe, family, MemoryPlan(GIB, strategy, 0), CPU),
    ):
        raise MemoryError("full")
    assert_same(before, everything(pipe))
    assert vars(pipe).keys() == notes and hooks(pipe) == hooks_before
    assert not (pipe.vae.use_tiling or pipe.vae.use_slicing)
    assert np.array_equal(draw(pipe), picture)


@every
def test_failed_attachment_reverts_the_plan(name, monkeypatch):
    pipe = MAKERS[name]()
    rex, word = concept(pipe), memory_size_for(pipe, CAST)
    picture, before = draw(pipe), everything(pipe)

    def failing(*args, **kwargs):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("customize.pipeline.transaction.attach_updates", failing)
        with pytest.raises(MemoryError):
            pipe.load_custom(rex, attention="native", memory=word)
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), picture)
    pipe.load_custom(rex, attention="native", memory=word)
    assert pipe.custom.rows and pipe.custom.attention and pipe.custom.memory


def test_failure_during_casting_is_reverted(monkeypatch):
    pipe = MAKERS["sd"]()
    before, word = everything(pipe), memory_size_for(pipe, CAST)
    cast, calls = torch.nn.Conv2d.to, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError("full")
        return cast(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "to", failing)
        with pytest.raises(MemoryError):
            pipe.load_custom(memory=word)
    assert len(calls) >= 5
    assert_same(before, everything(pipe))


@pytest.mark.parametrize("name", VIDEOS)
def test_video_pipelines_are_refused(name):
    pipe = MAKERS[name]()
    rex = concept(pipe)
    picture, before, hooks_before = draw(pipe), everything(pipe), hooks(pipe)
    with pytest.raises(PipelineError, match="memory of a video depends on its frames") as caught:
        pipe.load_custom(rex, attention="native", memory="24GB")
    assert "the pipeline's own offloading" in caught.value.fix
    assert_same(before, everything(pipe))
    assert hooks(pipe) == hooks_before
    assert not (pipe.custom.rows or pipe.custom.attention or pipe.custom.memory)
    assert np.array_equal(draw(pipe), picture)


def test_insufficient_memory_error_has_the_smallest_size():
    pipe = MAKERS["sd"]()
    rex = concept(pipe)
    before = everything(pipe)
    with pytest.raises(ConfigError, match="GB, because there is no accelerator") as caught:
        pipe.load_custom(rex, memory="0.000001GB")
    assert 'memory="0.1GB" or more' in caught.value.fix
    with pytest.raises(ConfigError, match="invalid memory size"):
        pipe.load_custom(rex, memory="small")
    assert_same(before, everything(pipe))


def test_second_plan_and_existing_offloading_are_refused():
    pipe = MAKERS["sd"]()
    pipe.load_custom(memory="8GB")
    pipe.load_custom(memory="8.0GB")  # the same
    with pytest.raises(PipelineError, match="load the pipeline again"):
        pipe.load_custom(memory="12GB")
    offloaded = MAKERS["sd"]()
    offloaded.enable_model_cpu_offload(device="cpu")
    with pytest.raises(PipelineError, match="offloaded already"):
        offloaded.load_custom(memory="8GB")
    grouped = MAKERS["sd"]()
    grouped.enable_group_offload(CPU, offload_type="leaf_level")
    with pytest.raises(PipelineError, match="offloaded already"):
        grouped.load_custom(memory="8GB")


def hooks(pipe):
    """Return the hooks of accelerate and diffusers with the names of their modules."""
    names = set()
    for key, part in pipe.components.items():
        for name, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            if hasattr(module, "_hf_hook"):
                names.add((key, name, type(module._hf_hook).__name__))
            registry = vars(module).get("_diffusers_hook")
            names |= {(key, name, hook_name) for hook_name in (registry.hooks if registry else ())}
    return names
