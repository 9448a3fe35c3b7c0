"""Models that others have adapted, fused or scaled, before a concept comes or while it is there."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from peft import LoKrConfig, LoraConfig

from customize.concepts.concept_info import parse_info
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from customize.pipeline import set_tokens
from tests.pipeline.making import PROMPT, assert_same, concept, draw, everything, table, user_lora
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl


def scales(pipe):
    return {
        (key, name): dict(module.scaling)
        for key in ("unet", "text_encoder")
        for name, module in pipe.components[key].named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("std", [1e-4, 1e-2])
def test_small_half_precision_weights_can_be_fused_and_unfused(std):
    """Below float16's smallest normal number all steps have one size."""
    pipe = tiny_sd()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (pipe.unet, pipe.text_encoder):
            for parameter in part.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    pipe.to(torch.float16)
    before = everything(pipe)
    pipe.load_custom(concept(pipe), weights=[1e-3], fuse=True)
    pipe.load_custom(weights={"rex": 2e-3}, fuse=True)
    pipe.unload_custom()
    assert_same(before, everything(pipe))


def test_adapter_scales_set_by_set_adapters_are_kept():
    """Where two share a slice at some widths, ranks differ between layers."""
    pipe = tiny_sd()
    first, other = concept(pipe), concept(pipe, "tom", index=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pipe.load_custom(first, other)
    picture, before = draw(pipe), scales(pipe)
    ranks = {tuple(m.r.values()) for m in pipe.unet.modules() if hasattr(m, "lora_A")}
    assert len(ranks) > 1
    pipe.set_adapters(["customize"], [0.5])
    assert not np.array_equal(draw(pipe), picture)
    pipe.set_adapters(["customize"])
    assert scales(pipe) == before
    assert np.array_equal(draw(pipe), picture)


def test_fused_loras_on_other_layers_are_preserved():
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.2"]), "mine")
    pipe.unet.fuse_lora()
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"fused into its weight \(unet.*ff.*unfuse_lora"):
        pipe.load_custom(concept(pipe))
    assert_same(before, everything(pipe))


def test_adapters_of_other_types_on_other_layers_are_preserved():
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoKrConfig(r=2, alpha=2, target_modules=["ff.net.2"]), "lokr")
    before, base = everything(pipe), draw(pipe)
    pipe.load_custom(concept(pipe))
    assert not np.array_equal(draw(pipe), base)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), base)


def test_unloading_after_delete_adapters_unwraps_all_layers():
    pipe = tiny_sd()
    before, base = everything(pipe), draw(pipe)
    pipe.load_custom(concept(pipe))
    pipe.delete_adapters("customize")
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), base)


def test_failures_keep_adapter_settings_of_users(monkeypatch):
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    pipe.set_adapters(["customize"], [0.5])
    before, picture, weights = everything(pipe), draw(pipe), scales(pipe)

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(set_tokens, "add_tokens", fails)
        with pytest.raises(MemoryError):
            pipe.load_custom(concept(pipe, "tom", index=1))
    assert_same(before, everything(pipe))
    assert scales(pipe) == weights
    assert np.array_equal(draw(pipe), picture)


@pytest.mark.parametrize("fuse", [False, True])
def test_fused_projections_are_refused_both_ways(fuse):
    pipe = tiny_sd()
    rex = concept(pipe)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(PipelineError, match=r"projections.*unfuse_qkv_projections"):
        pipe.load_custom(rex, fuse=fuse)
    pipe.unfuse_qkv_projections(vae=False)
    pipe.load_custom(rex, fuse=fuse)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(PipelineError, match=r"projections.*unfuse_qkv_projections"):
        pipe.unload_custom()
    assert "rex" in repr(pipe.custom)


def test_shared_slices_warn_once():
    pipe = tiny_sd()
    with pytest.warns(UserWarning, match=r"rex and tom.*Fix: "):
        pipe.load_custom(concept(pipe), concept(pipe, "tom", index=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_custom(weights={"rex": 0.5})


def test_names_must_be_a_list():
    pipe = tiny_sd()
    with pytest.raises(ConfigError, match=r"3 does not name 1 concept"):
        pipe.load_custom(concept(pipe), names=3)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_snippet_for_stock_diffusers_runs(make, tmp_path):
    pipe = make()
    folder, base = save_concept(concept(pipe), tmp_path / "rex"), tmp_path / "base"
    pipe.save_pretrained(base)
    pipe.load_custom(load_concept(folder))
    ours = draw(pipe)
    code = (folder / "README.md").read_text().split("With diffusers alone:")[1]
    code = re.search(r"```python\n(.*?)```", code, re.S)[1].replace("FOLDER", str(folder))
    code = code.replace('"tiny"', repr(str(base))).rpartition("pipe(")[0]
    names: dict = {}
    exec(code, names)  # the lines as a reader would type them
    stock = names["pipe"]
    stock.set_progress_bar_config(disable=True)
    assert np.abs(draw(stock, PROMPT) - ours).max() <= 1e-5


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
def test_images_of_user_tokens_are_restored(make, fails, monkeypatch):
    """The published configurations let an encoder pool at a user's token, the highest id."""
    pipe = make()
    for dictionary in family_of(pipe.components).token_dictionaries():
        encoder, tokenizer = dictionary.text_encoder, dictionary.tokenizer
        tokenizer.add_tokens("<mine>")  # as load_textual_inversion does, which SD3 lacks
        encoder.resize_token_embeddings(len(tokenizer))
        table(encoder).data[-1] = 1.0
    prompt = "a <mine> dog on the beach"
    before, picture = everything(pipe), draw(pipe, prompt)
    if fails:

        def failing(*args):
            raise MemoryError

        monkeypatch.setattr(set_tokens, "expand_triggers", failing)
        with pytest.raises(MemoryError):
            pipe.load_custom(concept(pipe))
    else:
        pipe.load_custom(concept(pipe))
        pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe, prompt), picture)


def te_lora(pipe):
    """A user's LoRA of denoiser and text encoder."""
    generator = torch.Generator().manual_seed(7)
    state = user_lora(pipe)
    for name, module in pipe.text_encoder.named_modules():
        if name.endswith("q_proj"):
            key = f"text_encoder.text_model.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(3, module.in_features, generator=generator)
            state[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 3, generator=generator)
    return state


@pytest.mark.parametrize("remove", ["delete_adapters", "unload_lora_weights"])
def test_removed_user_loras_leave_no_trace(remove, tmp_path):
    pipe, stock = tiny_sd(), tiny_sd()
    for loaded in (stock, pipe):
        loaded.load_lora_weights(te_lora(loaded), adapter_name="mine")
        if loaded is pipe:
            loaded.load_custom(concept(loaded))
        if remove == "delete_adapters":
            loaded.delete_adapters("mine")
        else:
            loaded.unload_lora_weights()
    pipe.unload_custom()
    for key in ("unet", "text_encoder"):
        model = getattr(pipe, key)
        assert not getattr(model, "peft_config", {})
        assert not getattr(model, "_hf_peft_config_loaded", None)
    assert np.array_equal(draw(pipe), draw(tiny_sd()))
    pipe.save_pretrained(tmp_path / "saved")
    pipe.load_lora_weights(te_lora(pipe), adapter_name="mine")
    assert pipe.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    stock.unload_lora_weights()
    stock.load_lora_weights(te_lora(stock), adapter_name="mine")
    assert np.array_equal(draw(pipe), draw(stock))


def test_warnings_as_errors_change_nothing():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    before, rows = everything(pipe), pipe.custom.rows
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="rex and tom share"):
            pipe.load_custom(concept(pipe, "tom", index=0))
    assert_same(before, everything(pipe))
    assert pipe.custom.rows == rows


@pytest.mark.parametrize("published", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through", [torch.float16, torch.bfloat16])
def test_fused_weights_are_restored_after_casts(through, published):
    pipe, plain = tiny_sd(), tiny_sd()
    if published:  # as weights of that type that are loaded in float32
        for cast in (pipe, plain):
            cast.to(published).to(torch.float32)
    pipe.load_custom(concept(pipe), weights=[0.1], fuse=True)
    pipe.to(through)
    StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert pipe.unet.dtype == torch.float32
    pipe.load_custom(concept(pipe, "tom", index=1), fuse=True)
    pipe.unload_custom()
    assert_same(everything(plain.to(through).to(torch.float32)), everything(pipe))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("inside", ["load", "unload", "both"])
def test_loading_and_unloading_across_inference_mode(inside, fuse):
    pipe = tiny_sd()
    before, base = everything(pipe), draw(pipe)
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    with torch.inference_mode(inside != "unload"):
        pipe.load_custom(rex, fuse=fuse)
        draw(pipe)
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())
    with torch.inference_mode(inside != "load"):
        pipe.load_custom(tom, fuse=fuse)
        pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), base)
    pipe.load_custom(rex, fuse=fuse)


@pytest.mark.parametrize("fuse", [False, True])
def test_models_created_in_inference_mode(fuse):
    with torch.inference_mode():
        pipe = tiny_sd()
        before = everything(pipe)
    rex = concept(pipe)
    pipe.load_custom(rex, fuse=fuse)
    pipe.unload_custom()
    assert_same(before, everything(pipe))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_beyond_the_range_are_refused(dtype, fuse):
    pipe = tiny_sd().to(dtype)
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_custom(rex, fuse=fuse)
    before = everything(pipe)
    for weight in (1e300, 10**400, 1e6 if dtype == torch.float16 else 1e39):
        with pytest.raises(ConfigError, match=r"a finite number|leaves the range"):
            pipe.load_custom(tom, weights=[weight], fuse=fuse)
    with pytest.raises(ConfigError, match=r"\['rex'\] is not the name of a concept"):
        pipe.unload_custom(["rex"])
    assert_same(before, everything(pipe))
    facts = rex.info.model_dump() | {"rank": 10**400}
    with pytest.raises(ConceptError, match="rank"):
        parse_info(facts, "here")


def test_weights_alone_fuse_the_named_concepts():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    pipe.load_custom(weights={"rex": 1.0}, fuse=True)
    assert [row.mode for row in pipe.custom.rows] == ["fused", "adapter"]
    pipe.load_custom(weights={"rex": 0.5})
    assert [row.mode for row in pipe.custom.rows] == ["fused", "adapter"]
    pipe.load_custom(concept(pipe, "ann", index=2), weights={"tom": 0.5}, fuse=True)
    assert [row.mode for row in pipe.custom.rows] == ["fused", "adapter", "fused"]


def test_tokens_unloaded_by_others_are_reported():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1), weights=[1.0, 0.5])
    pipe.unload_textual_inversion("<rex>")
    modes = [row.mode for row in pipe.custom.rows]
    assert modes == ["adapter (tokens removed by someone else)", "adapter"]
    pipe.load_custom(weights={"rex": 1.0})
    assert [row.mode for row in pipe.custom.rows] == ["adapter", "adapter"]


def test_user_tokens_around_a_trigger_are_preserved():
    pipe = tiny_sd()
    pipe.load_textual_inversion({"<rex>-style": torch.ones(2, 32)})
    text = "a <rex>-style <rex>-style_1 photo"
    ids = pipe.tokenizer(text).input_ids
    pipe.load_custom(concept(pipe))
    assert pipe.tokenizer(text).input_ids == ids
    both = pipe.tokenizer("<REX> in <rex>-style", add_special_tokens=False).input_ids
    assert both[:2] == pipe.tokenizer.convert_tokens_to_ids(["<rex>", "<rex>_1"])
    assert both[-1] == pipe.tokenizer.convert_tokens_to_ids("<rex>-style")


def test_encode_expands_triggers_as_calls_do():
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    assert pipe.tokenizer.encode(PROMPT) == pipe.tokenizer(PROMPT).input_ids
    plain = tiny_sd().tokenizer.encode(PROMPT)
    pipe.unload_custom()
    assert pipe.tokenizer.encode(PROMPT) == plain


def test_loading_another_concept_keeps_weights_of_users():
    pipe, other = tiny_sd(), tiny_sd()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    other.load_lora_weights(user_lora(other), adapter_name="mine")
    pipe.load_custom(rex)
    pipe.set_adapters(["mine", "customize"], [0.5, 0.3])
    pipe.load_custom(tom)
    other.load_custom(rex, tom)
    other.set_adapters(["mine", "customize"], [0.5, 0.3])
    assert scales(pipe) == scales(other)
    assert np.array_equal(draw(pipe), draw(other))
