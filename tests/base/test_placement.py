"""Pipelines whose weights are offloaded, compiled, moved, copied or incomplete."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, CpuOffload

from customize.errors import PipelineError
from customize.families import family_of
from tests.pipeline.making import MAKERS, assert_same, concept, draw, everything
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl

both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])


def offload_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe):
    # As enable_sequential_cpu_offload, except for its "cpu:0", with which accelerate fails.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def offload_groups(pipe):
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(pipe):
    pipe.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)


@modes
@pytest.mark.parametrize(
    ("name", "offload"),
    [
        ("sd", offload_models),
        ("sd", offload_layers),
        ("sd", offload_groups),
        ("sd", offload_blocks),
        ("sd3", offload_layers),
        ("sd3", offload_groups),
    ],
)
def test_offloading_stays_enabled_and_images_are_unchanged(name, fuse, offload):
    pipe, plain = MAKERS[name](), MAKERS[name]()
    base = draw(plain)
    offload(pipe)
    hooks = _hooks(pipe)
    assert hooks
    rex, tom = concept(plain), concept(plain, "tom", index=1)
    for pipeline in (pipe, plain):
        pipeline.load_custom(rex, fuse=fuse)
    assert np.array_equal(draw(pipe), draw(plain))
    for pipeline in (pipe, plain):
        pipeline.load_custom(tom, fuse=fuse)
    assert np.array_equal(draw(pipe), draw(plain))
    assert {kind for _, kind in _hooks(pipe)} == {kind for _, kind in hooks}
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), base)
    assert _hooks(pipe) == hooks
    pipe.remove_all_hooks()


def test_a_failed_load_keeps_sequential_offloading(monkeypatch):
    pipe = MAKERS["sd"]()
    base = draw(pipe)
    rex = concept(pipe)
    offload_layers(pipe)
    hooks = _hooks(pipe)

    def failing(*args):
        raise MemoryError("full")

    monkeypatch.setattr("customize.pipeline.set_tokens.add_tokens", failing)
    with pytest.raises(MemoryError):
        pipe.load_custom(rex)
    assert _hooks(pipe) == hooks
    assert np.array_equal(draw(pipe), base)


def test_weights_offloaded_to_disk_or_meta_are_refused(tmp_path):
    pipe = MAKERS["sd"]()
    rex = concept(pipe)
    pipe.unet.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(PipelineError, match=r"offloaded to disk.*\(unet\)"):
        pipe.load_custom(rex)
    pipe = MAKERS["sd"]()
    pipe.unet.to("meta")
    with pytest.raises(PipelineError, match="never loaded"):
        pipe.load_custom(rex)
    assert "customize" not in getattr(pipe.text_encoder, "peft_config", {})


@modes
def test_adapters_move_with_the_pipeline(fuse):
    pipe = MAKERS["sd"]()
    pipe.load_custom(concept(pipe), fuse=fuse)
    pipe.unet.to("meta")
    assert all(weight.is_meta for weight in pipe.unet.parameters())


@pytest.mark.parametrize(
    "make",
    [partial(tiny_sd, few_layers=True), partial(tiny_sdxl, few_layers=True), tiny_sd3],
    ids=MAKERS,
)
def test_concepts_load_into_a_compiled_denoiser(make):
    pipe, plain = make(), make()
    rex = concept(plain)
    key = family_of(pipe.components).denoiser_key
    setattr(pipe, key, torch.compile(getattr(pipe, key), backend="eager"))
    plain.load_custom(rex)
    pipe.load_custom(rex)
    np.testing.assert_allclose(draw(pipe), draw(plain), atol=1e-5)
    pipe.unload_custom()
    assert not hasattr(getattr(pipe, key)._orig_mod, "_customize")


@both
@modes
def test_a_copied_pipeline_is_independent(make, fuse):
    pipe = make()
    pipe.load_custom(concept(pipe), fuse=fuse)
    picture = draw(pipe)
    other = copy.deepcopy(pipe)
    pipe.unload_custom()
    assert np.array_equal(draw(other), picture)
    other.unload_custom()
    assert_same(everything(make()), everything(other))


def test_pickling_keeps_the_tokenizers_triggers():
    pipe = MAKERS["sd"]()
    pipe.load_custom(concept(pipe))
    again = pickle.loads(pickle.dumps(pipe.tokenizer))
    assert type(again) is type(pipe.tokenizer)
    assert again("<rex>").input_ids == pipe.tokenizer("<rex> <rex>_1").input_ids


def test_optional_text_encoders_may_be_missing_and_required_ones_not():
    full, small = MAKERS["sd3"](), MAKERS["sd3"](t5=False)
    rex = concept(full)
    small.load_custom(rex)
    assert np.isfinite(draw(small)).all()
    small.unload_custom()
    small.text_encoder_2 = None
    before = everything(small)
    with pytest.raises(PipelineError, match="needs a text_encoder_2"):
        small.load_custom(rex)
    assert_same(before, everything(small))


def _hooks(pipe) -> set[tuple[str, str]]:
    """Return the offloading hooks with the names of their modules."""
    names = set()
    for key, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        for name, module in part.named_modules():
            hook = getattr(module, "_hf_hook", None)
            for inner in getattr(hook, "hooks", (hook,)):
                if isinstance(inner, AlignDevicesHook | CpuOffload):
                    names.add((f"{key}.{name}", type(inner).__name__))
            registry = getattr(module, "_diffusers_hook", None)
            for inner in registry.hooks if registry else ():
                names.add((f"{key}.{name}", inner))
    return names
