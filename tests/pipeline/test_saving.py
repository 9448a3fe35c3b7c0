"""Saving and copying single components while concepts are attached to them."""

from __future__ import annotations

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from safetensors.torch import load_file

from customize.api.patch_diffusers import _COPYING
from customize.errors import PipelineError
from customize.families import family_of
from customize.pipeline.state import customized_components
from tests.pipeline.making import (
    MAKERS,
    assert_same,
    attached,
    concept,
    draw,
    everything,
    user_lora,
)
from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3

makers = pytest.mark.parametrize(
    "make", [*MAKERS.values(), tiny_flux, tiny_qwen_image], ids=[*MAKERS, "flux", "qwen_image"]
)
COPIES = {
    "ControlNet": (tiny_sd, "unet", ControlNetModel.from_unet),
    "motion": (tiny_sd, "unet", UNetMotionModel.from_unet2d),
    "SD3": (tiny_sd3, "transformer", SD3ControlNetModel.from_transformer),
    "FLUX": (tiny_flux, "transformer", FluxControlNetModel.from_transformer),
}


def parts(pipe):
    return customized_components(family_of(pipe.components, pipe.config))


@makers
def test_components_with_adapters_refuse_to_be_saved(make, tmp_path):
    pipe = make()
    before = everything(pipe)
    pipe.load_custom(concept(pipe))
    changed = parts(pipe)
    assert changed.keys() >= {family_of(pipe.components, pipe.config).denoiser_key}
    for key, part in changed.items():
        for save in (part.save_pretrained, part.push_to_hub):
            with pytest.raises(PipelineError, match=r"concepts rex are attached beside.*fuse=True"):
                save(tmp_path / key)
    with pytest.raises(PipelineError, match="attached beside"):
        pipe.push_to_hub("nobody/nothing")
    assert not list(tmp_path.iterdir())
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    for key, part in changed.items():
        part.save_pretrained(tmp_path / key)
        assert "save_pretrained" not in vars(part)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("first", [True, False], ids=["the original first", "the copy first"])
def test_copies_refuse_by_their_attached_concepts(copied, first, tmp_path):
    pipe = attached()
    other = copied(pipe)
    detached, still = (pipe, other) if first else (other, pipe)
    detached.unload_custom()
    for part in parts(still).values():
        with pytest.raises(PipelineError, match="attached beside"):
            part.save_pretrained(tmp_path / "still")
    for key, part in parts(detached).items():
        part.save_pretrained(tmp_path / key)
    assert not (tmp_path / "still").exists()
    still.unload_custom()
    assert np.array_equal(draw(still), draw(detached))


def test_saved_components_load_with_fused_weights(tmp_path):
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), fuse=True)
    picture = draw(pipe)
    pipe.unet.save_pretrained(tmp_path / "unet")
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    weights = opened.state_dict()
    assert all(torch.equal(weights[key], weight) for key, weight in pipe.unet.state_dict().items())
    pipe.unload_custom()
    pipe.unet = opened
    pipe.load_custom(concept(pipe), weights=[0.0])
    assert np.isfinite(picture).all() and np.isfinite(draw(pipe)).all()
    pipe.vae.save_pretrained(tmp_path / "vae")  # which carries nothing
    AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_adapters_of_users_can_be_saved(tmp_path):
    pipe = tiny_sd()
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    pipe.unet.save_lora_adapter(tmp_path / "plain", adapter_name="mine")
    pipe.load_custom(concept(pipe))
    pipe.unet.save_lora_adapter(tmp_path / "beside", adapter_name="mine")
    name = "pytorch_lora_weights.safetensors"
    plain, beside = (load_file(tmp_path / folder / name) for folder in ("plain", "beside"))
    assert plain.keys() == beside.keys()
    assert all(torch.equal(plain[key], beside[key]) for key in plain)
    with pytest.raises(PipelineError, match="attached beside"):
        pipe.unet.save_lora_adapter(tmp_path / "ours", adapter_name="customize")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", COPIES)
def test_copying_weights_of_a_model_with_an_adapter_is_refused(kind):
    make, key, copy = COPIES[kind]
    pipe = make()
    model = getattr(pipe, key)
    heads = ("num_attention_heads", "attention_head_dim", "num_layers", "num_single_layers")
    config = {name: model.config[name] for name in heads if kind == "FLUX"}
    config |= {"num_layers": 1} if kind == "SD3" else {}
    plain = copy(model, **config).state_dict()
    pipe.load_custom(concept(pipe))
    with pytest.raises(PipelineError, match=r"copies weights by the names.*fuse=True"):
        copy(model, **config)
    pipe.unload_custom()
    again = copy(model, **config).state_dict()
    shared = [name for name in plain if name in model.state_dict()]
    assert shared and all(torch.equal(plain[name], again[name]) for name in shared)
    pipe.load_custom(concept(pipe), fuse=True)
    fused = copy(model, **config).state_dict()
    weights = model.state_dict()
    assert all(torch.equal(fused[name], weights[name]) for name in shared)


def test_all_copying_methods_of_diffusers_are_guarded():
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Model")]
    methods = [
        getattr(kind, name)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
        for name in _COPYING
        if name in vars(kind)
    ]
    assert len(methods) > 5
    assert all(hasattr(method, "_customize_patched") for method in methods)
