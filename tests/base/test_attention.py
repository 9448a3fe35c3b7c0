"""load_custom(attention=...): chosen backends, unchanged images and restoration."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)

from customize.base.attention.apply_backend import (
    BackendChoice,
    apply_backends,
    attention_modules,
    restore_backends,
)
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from tests.pipeline.making import assert_same, concept, draw, everything
from tests.pipeline.test_families import MAKERS

CLASSIC = ("sd", "animatediff", "sdxl", "sd3", "cogvideox")
DISPATCHED = [name for name in MAKERS if name not in CLASSIC]
#: Number of attention modules of each tiny denoiser.
COUNTS = {
    "sd": 14,
    "animatediff": 14 + 7 * 2,  # behind each of Stable Diffusion's pairs, two among frames
    "sdxl": 16,
    "sd3": 3,
    "flux": 4,
    "flux2-dev": 2 + 2,  # in blocks of two streams, and of one
    "flux2-klein": 2 + 2,
    "qwen_image": 2,
    "qwen_image_21": 2,
    "z_image": 4,
    "krea2": 2 + 2,  # the second pair fuses the LLM's layers
    "wan": 2 * 2,  # in each block one to the prompt
    "wan-14b": 2 * 2,  # in each of the two transformers
    "cogvideox": 2,
    "ltx2": 2 * 6,  # two for each stream, and one from each to the other
}

every = pytest.mark.parametrize("name", MAKERS)
classic = pytest.mark.parametrize("name", CLASSIC)
dispatched = pytest.mark.parametrize("name", DISPATCHED)


def processors(pipe):
    """Return all attention processors with their attributes."""
    named = {}
    for key, part in pipe.components.items():
        for module in attention_modules(part) if isinstance(part, torch.nn.Module) else ():
            named[key, id(module)] = module.processor, dict(vars(module.processor))
    return named


@every
def test_images_are_unchanged_and_processors_are_restored(name):
    pipe = MAKERS[name]()
    bare = draw(pipe)
    before, processors_before = everything(pipe), processors(pipe)
    family = family_of(pipe.components)
    for backend in ("auto", "native", "sdpa"):
        assert pipe.load_custom(attention=backend) is pipe
        np.testing.assert_allclose(draw(pipe), bare, atol=1e-5)
        reports = {report.component: report for report in pipe.custom.attention}
        for denoiser in family.denoisers:
            report = reports[denoiser]
            assert (report.backend, report.modules) == ("native", COUNTS[name])
            assert 0 < report.error < 1e-5 and not report.custom_processors
            assert f"{denoiser} native ({COUNTS[name]} modules, error" in repr(pipe.custom)
        assert reports.keys() >= family.all_text_encoders.keys()
        assert all(report.backend in ("native", "sdpa") for report in reports.values())
        pipe.unload_custom()
        assert_same(before, everything(pipe))
        assert processors(pipe) == processors_before
        assert not pipe.custom.attention and "attention" not in repr(pipe.custom)
        assert np.array_equal(draw(pipe), bare)


@dispatched
def test_dispatcher_backends_are_set_on_all_attention_modules(name):
    pipe = MAKERS[name]()
    bare, processors_before = draw(pipe), processors(pipe)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    pipe.load_custom(attention="_native_math")
    denoisers = family_of(pipe.components).denoisers.values()
    modules = [module for denoiser in denoisers for module in attention_modules(denoiser)]
    assert {module.processor._attention_backend for module in modules} == {"_native_math"}
    np.testing.assert_allclose(draw(pipe), bare, atol=1e-5)
    pipe.load_custom(attention="native")
    assert {module.processor._attention_backend for module in modules} == {"native"}
    # diffusers' own function would also change the default of all other models.
    assert _AttentionBackendRegistry.get_active_backend()[0] is active
    pipe.unload_custom()
    assert processors(pipe) == processors_before


@classic
def test_dispatcher_backends_are_refused_for_models_without_the_dispatcher(name):
    pipe = MAKERS[name]()
    before, processors_before = everything(pipe), processors(pipe)
    with pytest.raises(PipelineError, match="does not use diffusers' dispatcher") as caught:
        pipe.load_custom(attention="_native_math")
    assert "available are auto, native" in str(caught.value)
    assert_same(before, everything(pipe))
    assert processors(pipe) == processors_before


@every
def test_cuda_backends_are_refused_on_a_cpu(name):
    pipe = MAKERS[name]()
    rex = concept(pipe)
    before = everything(pipe)
    for backend in ("xformers", "flash", "sage", "_flash_3", "_native_cudnn"):
        message = rf"{backend} needs a CUDA device.*on cpu"
        with pytest.raises(PipelineError, match=message) as caught:
            pipe.load_custom(rex, attention=backend)
        assert "available are auto, native" in str(caught.value)
        assert_same(before, everything(pipe))


def test_the_error_names_a_missing_package(monkeypatch):
    pipe = MAKERS["flux"]()
    with pytest.raises(PipelineError, match=r"flash_hub fails: .*pip install kernels"):
        pipe.load_custom(attention="flash_hub")
    # As on a CUDA device without the package.
    module = "customize.base.attention.select_backend"
    monkeypatch.setattr(f"{module}.find_unmet_requirement", lambda *args: None)
    with pytest.raises(PipelineError, match=r"install it \(pip install sageattention\)"):
        pipe.load_custom(attention="sage")
    assert not pipe.custom.attention


@pytest.mark.parametrize("backend", ["fast", "", "AUTO", "Native"])
def test_unknown_backends_are_refused(backend):
    with pytest.raises(ConfigError, match=r"unknown attention backend.*choose from auto, flash"):
        MAKERS["sd"]().load_custom(attention=backend)


@dispatched
def test_an_inaccurate_backend_is_refused_with_its_error(name, monkeypatch):
    pipe = MAKERS[name]()
    processors_before = processors(pipe)

    def unscaled(query, key, value, attn_mask=None):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, attn_mask, scale=1.0).transpose(1, 2)

    math = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, unscaled)
    names = {"query", "key", "value", "attn_mask"}
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, math, names)
    with pytest.raises(PipelineError, match=r"is wrong with.*its relative error is [\d.]+, above"):
        pipe.load_custom(attention="_native_math")
    assert processors(pipe) == processors_before


def test_cogvideox_supports_native_attention_only(monkeypatch):
    pipe = MAKERS["cogvideox"]()
    processors_before = processors(pipe)
    # As on a CUDA device; diffusers' xFormers processors would omit the rotary embedding.
    module = "customize.base.attention.select_backend"
    monkeypatch.setattr(f"{module}.find_unmet_requirement", lambda *args: None)
    with pytest.raises(PipelineError, match=r"diffusers has no xformers processor for it"):
        pipe.load_custom(attention="xformers")
    pipe.transformer.fuse_qkv_projections()
    pipe.load_custom(attention="native")
    report = next(report for report in pipe.custom.attention if report.component == "transformer")
    assert report.modules == 2 and not report.custom_processors
    pipe.unload_custom()
    pipe.transformer.unfuse_qkv_projections()
    assert processors(pipe) == processors_before


@pytest.mark.parametrize("name", ["ltx2", "krea2"])
def test_backends_are_checked_with_the_models_kind_of_mask(name, monkeypatch):
    pipe = MAKERS[name]()
    kinds = []

    def record(query, key, value, attn_mask=None):
        kinds.append(attn_mask.dtype)
        raise ValueError("no mask of this kind")

    math = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, record)
    names = {"query", "key", "value", "attn_mask"}
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, math, names)
    with pytest.raises(PipelineError, match=r"fails: no mask of this kind"):
        pipe.load_custom(attention="_native_math")
    assert set(kinds) == {torch.float32 if name == "ltx2" else torch.bool}


def test_the_connectors_of_ltx2_use_the_backend_too():
    pipe = MAKERS["ltx2"]()
    bare = draw(pipe)
    pipe.load_custom(attention="_native_math")
    reports = {report.component: report for report in pipe.custom.attention}
    assert reports["connectors"].backend == "_native_math" and reports["connectors"].modules == 2
    np.testing.assert_allclose(draw(pipe), bare, atol=1e-5)


def test_a_denoiser_with_custom_processors_only_is_unchanged():
    class Mine(AttnProcessor2_0):
        pass

    pipe = MAKERS["sd"]()
    pipe.unet.set_attn_processor(Mine())
    processors_before = processors(pipe)
    with pytest.raises(PipelineError, match="are custom"):
        pipe.load_custom(attention="native")
    pipe.load_custom(attention="auto")
    report = next(report for report in pipe.custom.attention if report.component == "unet")
    assert "are custom" in report.note and report.custom_processors == {"Mine": 14}
    assert processors(pipe) == processors_before


def test_custom_processors_are_unchanged():
    pipe = MAKERS["sd"]()

    class Doubling(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    modules = attention_modules(pipe.unet)
    custom_processors = [Doubling(), IPAdapterAttnProcessor2_0(16, 32, num_tokens=(4,))]
    modules[0].set_processor(custom_processors[0])
    modules[1].set_processor(custom_processors[1])
    modules[2].set_processor(SlicedAttnProcessor(1))
    processors_before = processors(pipe)
    pipe.load_custom(attention="auto")
    assert [module.processor for module in modules[:2]] == custom_processors
    assert type(modules[2].processor) is AttnProcessor2_0
    report = next(report for report in pipe.custom.attention if report.component == "unet")
    assert report.modules == 12 and report.custom_processors == {
        "Doubling": 1,
        "IPAdapterAttnProcessor2_0": 1,
    }
    assert "1 Doubling kept, 1 IPAdapterAttnProcessor2_0 kept" in repr(pipe.custom)
    pipe.unload_custom()
    assert processors(pipe) == processors_before


def test_attention_without_scale_qk_is_unchanged():
    # AttnProcessor2_0 divides by the root of the width even with scale_qk=False.
    pipe = MAKERS["sd"]()
    module = attention_modules(pipe.unet)[0]
    module.scale_qk = False
    pipe.load_custom(attention="native")
    report = next(report for report in pipe.custom.attention if report.component == "unet")
    assert report.modules == 14  # including the module, which uses torch's attention already
    module.set_processor(SlicedAttnProcessor(1))
    pipe.load_custom(attention="native")
    assert type(module.processor) is SlicedAttnProcessor


def test_later_changes_of_processors_are_not_reverted():
    sd, flux = MAKERS["sd"](), MAKERS["flux"]()
    module = attention_modules(sd.unet)[0]
    module.set_processor(SlicedAttnProcessor(1))
    sd.load_custom(attention="native")
    replacement = SlicedAttnProcessor(2)
    module.set_processor(replacement)
    sd.unload_custom()
    assert module.processor is replacement

    processor = attention_modules(flux.transformer)[0].processor
    flux.load_custom(attention="native")
    processor._attention_backend = "_native_math"
    flux.unload_custom()
    assert processor._attention_backend == "_native_math"


def test_a_previous_backend_is_restored():
    pipe = MAKERS["flux"]()
    processor = attention_modules(pipe.transformer)[0].processor
    processor._attention_backend = "_native_math"
    pipe.load_custom(attention="native")
    assert processor._attention_backend == "native"
    pipe.unload_custom()
    assert processor._attention_backend == "_native_math"


@pytest.mark.parametrize(
    ("name", "stock", "other"),
    [
        ("sd", AttnProcessor2_0, XFormersAttnProcessor),
        ("sd3", JointAttnProcessor2_0, XFormersJointAttnProcessor),
    ],
)
def test_xformers_replaces_classic_processors(name, stock, other):
    pipe = MAKERS[name]()
    family, processors_before = family_of(pipe.components), processors(pipe)
    with apply_backends(family, {family.denoiser_key: BackendChoice("xformers", 1e-6)}):
        assert {type(module.processor) for module in attention_modules(family.denoiser)} == {other}
    pipe.load_custom(attention="native")
    assert {type(module.processor) for module in attention_modules(family.denoiser)} == {stock}
    restore_backends(family.denoiser)
    assert processors(pipe) == processors_before


def test_an_error_restores_the_previous_backend():
    pipe = MAKERS["flux"]()
    pipe.load_custom(attention="_native_math")
    family = family_of(pipe.components)
    with (
        pytest.raises(RuntimeError),
        apply_backends(family, {"transformer": BackendChoice("native", 0.0)}),
    ):
        raise RuntimeError
    names = {module.processor._attention_backend for module in attention_modules(pipe.transformer)}
    assert names == {"_native_math"}


@every
def test_concepts_and_a_backend_give_the_same_images(name):
    pipe, plain = MAKERS[name](), MAKERS[name]()
    rex = concept(pipe)
    bare = draw(pipe)
    before, processors_before = everything(pipe), processors(pipe)
    plain.load_custom(rex)
    pipe.load_custom(rex, attention="auto")
    np.testing.assert_allclose(draw(pipe), draw(plain), atol=1e-5)
    pipe.unload_custom("rex")
    assert pipe.custom.attention and not pipe.custom.rows
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert processors(pipe) == processors_before
    assert np.array_equal(draw(pipe), bare)


@every
def test_a_failed_call_changes_nothing(name, monkeypatch):
    pipe = MAKERS[name]()
    rex = concept(pipe)
    for module in attention_modules(pipe.vae):
        module.set_processor(SlicedAttnProcessor(1))
    before, processors_before = everything(pipe), processors(pipe)

    def failing(*args, **kwargs):
        raise MemoryError("full")

    monkeypatch.setattr("customize.pipeline.transaction.attach_updates", failing)
    with pytest.raises(MemoryError):
        pipe.load_custom(rex, attention="native")
    assert_same(before, everything(pipe))
    assert processors(pipe) == processors_before


def test_text_encoders_use_sdpa_until_unloaded():
    pipe = MAKERS["qwen_image"]()
    encoder = pipe.text_encoder
    encoder.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    encoder.config._attn_implementation_internal = "eager"
    configs = [encoder.config, encoder.config.text_config, encoder.config.vision_config]
    bare = draw(pipe)
    names = [config._attn_implementation for config in configs]
    assert names == ["eager", "eager", "sdpa"]
    pipe.load_custom(attention="native")
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    np.testing.assert_allclose(draw(pipe), bare, atol=1e-4)
    report = next(report for report in pipe.custom.attention if report.component == "text_encoder")
    assert report.backend == "sdpa" and 0 < report.error < 1e-5 and report.modules
    pipe.unload_custom()
    assert [config._attn_implementation for config in configs] == names


def test_a_copied_pipeline_is_restored_separately():
    pipe = MAKERS["sd"]()
    module = attention_modules(pipe.unet)[0]
    module.set_processor(SlicedAttnProcessor(1))
    pipe.load_custom(attention="native")
    twin = copy.deepcopy(pipe)
    pipe.unload_custom()
    assert type(module.processor) is SlicedAttnProcessor
    assert type(attention_modules(twin.unet)[0].processor) is AttnProcessor2_0
    twin.unload_custom()
    assert type(attention_modules(twin.unet)[0].processor) is SlicedAttnProcessor
