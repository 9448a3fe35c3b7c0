"""memory_plan: a saved pipeline's sizes from its configurations, and how to load it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline

import customize
from customize.base.memory_plan import GIB, MemoryPlan, MemoryStrategy, measure_components
from customize.base.meta_device import load_on_meta_device, quantization_arguments
from customize.errors import ConfigError, PipelineError
from customize.families import family_of
from tests.base.test_apply_memory_plan import PICTURES
from tests.pipeline.making import concept, draw
from tests.pipeline.test_families import MAKERS


@pytest.mark.parametrize("name", PICTURES)
def test_meta_device_sizes_match_the_loaded_pipeline(name, tmp_path):
    MAKERS[name]().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()  # configurations are enough
    expected = measure_components(family_of(MAKERS[name]().to(torch.bfloat16).components))
    assert measure_components(load_on_meta_device(tmp_path, torch.bfloat16)) == expected


def test_memory_plan_and_loading_arguments(tmp_path):
    MAKERS["sd"]().save_pretrained(tmp_path)
    plan, loading = customize.memory_plan("8GB", tmp_path, dtype=torch.float16)
    assert plan.strategy == MemoryStrategy() and plan.budget == 8 * GIB
    assert loading == {"dtype": torch.float16}
    pipe = DiffusionPipeline.from_pretrained(tmp_path, **loading)
    assert pipe.load_custom(memory="8GB").custom.memory == str(plan)
    with pytest.raises(ConfigError, match="at least"):
        customize.memory_plan("0.00001GB", tmp_path)


def test_video_base_is_refused(tmp_path):
    MAKERS["wan"]().save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="memory of a video depends on its frames"):
        customize.memory_plan("24GB", tmp_path)


def test_missing_base(tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"no model_index\.json"):
        customize.memory_plan("8GB", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PipelineError, match="cannot be read"):
        customize.memory_plan("8GB", "nobody/nothing-of-the-kind")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "unet": [None, None]})
    )
    with pytest.raises(PipelineError, match="no known model family"):
        customize.memory_plan("8GB", tmp_path)


needs_bits = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra"
)
PARTS = ("transformer", "text_encoder_2")


@needs_bits
def test_quantization_config_class_per_library(tmp_path):
    MAKERS["flux"]().save_pretrained(tmp_path)
    plan = MemoryPlan(GIB, MemoryStrategy("model", quantize=True), 0, PARTS)
    arguments = quantization_arguments(
        plan, load_on_meta_device(tmp_path, torch.bfloat16), torch.bfloat16
    )
    mapping = arguments["quantization_config"].quant_mapping
    assert type(mapping["transformer"]) is diffusers.BitsAndBytesConfig
    assert type(mapping["text_encoder_2"]) is transformers.BitsAndBytesConfig
    for config in mapping.values():
        assert config.load_in_4bit and config.bnb_4bit_compute_dtype == torch.bfloat16


@needs_bits
@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantizes on a GPU")
def test_nf4_plan_loads_and_generates(tmp_path):
    MAKERS["flux"]().save_pretrained(tmp_path)
    family = load_on_meta_device(tmp_path, torch.bfloat16)
    whole = measure_components(family).components
    plan = MemoryPlan(GIB, MemoryStrategy("model", quantize=True), 0, PARTS)
    loading = quantization_arguments(plan, family, torch.bfloat16)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, **loading)
    pipe.load_custom(concept(MAKERS["flux"]()), attention="native", memory="8GB")
    sizes = measure_components(family_of(pipe.components))
    for key in PARTS:
        # Equal to the estimate, except for the padding of the smallest layers.
        counted, stored = whole[key].nf4_weights, sizes.components[key].weights
        assert stored < whole[key].weights and abs(stored - counted) < 0.15 * whole[key].weights
    assert (
        sizes.float8_denoiser == sizes.components["transformer"].weights
    )  # 4 bits are not cast to 8
    assert np.isfinite(draw(pipe)).all()
