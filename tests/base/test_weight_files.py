"""Bases with variants of weight files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from customize.base.load_pipeline import load_pipeline
from customize.base.weight_files import list_variants, select_variants
from customize.cli import main
from customize.concepts.io.write_concept import save_concept
from customize.errors import PipelineError
from customize.training.base_fingerprint import weight_digests, weight_digests_on_disk
from customize.training.recipe import train
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_flux3, tiny_sd
from tests.training.runs import same, settings, tensors


def sd(folder: Path, variant: str | None = "fp16", **how: Any) -> Path:
    """Save a base in float32, so that variants differ in file names only."""
    tiny_sd().save_pretrained(folder, variant=variant, **how)
    return folder


def same_weights(a: Any, b: Any) -> bool:
    return all(
        same(part.state_dict(), b.components[key].state_dict())
        for key, part in a.components.items()
        if isinstance(part, torch.nn.Module)
    )


def test_variants_are_read_from_names_of_weight_files(tmp_path):
    names = {
        "model.safetensors": "",
        "model-00001-of-00002.safetensors": "",
        "model.fp16.safetensors": "fp16",
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "model-00001-of-00002.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    }
    for number, (name, variant) in enumerate(names.items()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).touch()
        for other in ("model.fp16.bin", "config.json", "pytorch_model.safetensors"):
            (tmp_path / str(number) / other).touch()
        assert list_variants(tmp_path / str(number)) == {variant}
    assert list_variants(tmp_path / "none") == set()


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "40KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_the_only_variant_is_loaded_and_its_digests_match_memory(variant, how, tmp_path):
    base = str(sd(tmp_path / "base", variant, **how))
    pipe = load_pipeline(base, {"default": torch.float32, "vae": torch.float32})
    assert same_weights(pipe, tiny_sd())
    assert weight_digests_on_disk(base) == weight_digests("", pipe.components) != {}
    half = load_pipeline(base, {"default": torch.bfloat16, "vae": torch.float32})
    assert (half.unet.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    assert same_weights(load_pipeline(base, torch.float32, variant=variant), pipe)


def test_components_may_have_different_variants(tmp_path):
    base = sd(tmp_path / "base", None)
    pipe = tiny_sd()
    shutil.rmtree(base / "unet")
    pipe.unet.save_pretrained(base / "unet", variant="fp16")
    shutil.rmtree(base / "text_encoder")
    pipe.text_encoder.save_pretrained(base / "text_encoder", variant="ema")
    with torch.no_grad():
        pipe.vae.get_parameter("decoder.conv_in.weight").zero_()
    pipe.vae.save_pretrained(
        base / "vae", variant="fp16"
    )  # beside the default weights, which are loaded
    assert select_variants(base) == {"unet": "fp16", "text_encoder": "ema", "vae": ""}
    loaded = load_pipeline(str(base), torch.float32)
    assert same_weights(loaded, tiny_sd())
    assert weight_digests_on_disk(str(base)) == weight_digests("", loaded.components)
    loaded = load_pipeline(
        str(base), torch.float32, variant="fp16"
    )  # loaded because it is requested
    assert not loaded.vae.get_parameter("decoder.conv_in.weight").any()
    assert weight_digests_on_disk(str(base), "fp16") == weight_digests("", loaded.components)


def test_ambiguous_variants_are_refused_by_name(tmp_path):
    base = sd(tmp_path / "base", "fp16")
    tiny_sd().unet.save_pretrained(base / "unet", variant="ema")
    message = r"unet has no weights without a variant.*ema and fp16.*--variant"
    with pytest.raises(PipelineError, match=message):
        load_pipeline(str(base), torch.float32)
    assert weight_digests_on_disk(str(base)) == {}
    assert same_weights(load_pipeline(str(base), torch.float32, variant="ema"), tiny_sd())
    with pytest.raises(PipelineError, match=r"no component of the base has the variant fp8"):
        load_pipeline(str(base), torch.float32, variant="fp8")
    plain = sd(tmp_path / "plain", None)
    with pytest.raises(PipelineError, match=r"variant fp16.*leave the variant out"):
        load_pipeline(str(plain), torch.float32, variant="fp16")


def test_the_only_variant_of_a_modular_base_is_loaded(tmp_path):
    pipe = tiny_flux3()
    pipe.save_pretrained(str(tmp_path / "base"), overwrite_modular_index=True)
    for name in ("transformer", "text_encoder", "vae"):
        (weights,) = (tmp_path / "base" / name).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    loaded = load_pipeline(str(tmp_path / "base"), torch.float32)
    for name in ("transformer", "text_encoder", "vae"):
        assert same(getattr(loaded, name).state_dict(), getattr(pipe, name).state_dict())
    assert weight_digests_on_disk(str(tmp_path / "base")) == weight_digests("", loaded.components)


def test_a_hub_id_with_a_cached_variant_only(tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--org--sd" / "snapshots" / commit
    sd(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert same_weights(load_pipeline("org/sd", torch.float32), tiny_sd())
    assert same_weights(load_pipeline("org/sd", torch.float32, variant="fp16"), tiny_sd())


def test_training_and_commands_use_the_variant(tmp_path, capsys):
    variant, plain = sd(tmp_path / "variant"), sd(tmp_path / "plain", None)
    one = train(settings(tmp_path, "one", base=str(variant), steps=2), progress=False)
    two = train(settings(tmp_path, "two", base=str(plain), steps=2), progress=False)
    assert same(tensors(one), tensors(two))
    # A named variant and the only one give the same run.
    named = settings(tmp_path, "one", base=str(variant), steps=2, variant="fp16")
    assert train(named, progress=False).info == one.info
    assert np.array_equal(draw(load_pipeline(str(variant), torch.float32)), draw(tiny_sd()))
    save_concept(concept(tiny_sd()), tmp_path / "rex")
    base = ["--base", str(variant), "--variant", "fp16"]
    drawn = ["generate", str(tmp_path / "rex"), *base, "--prompt", "a <rex>", "--steps", "1"]
    assert main([*drawn, "--output", str(tmp_path / "drawn")]) == 0
    assert main(["record", str(tmp_path / "rex"), *base]) == 0
    whole = ["merge", str(tmp_path / "rex"), "--output", str(tmp_path / "whole"), "--fuse"]
    assert main([*whole, *base]) == 0
    assert main(["merge", str(tmp_path / "rex"), "--output", str(tmp_path / "x"), *base[2:]]) != 0
    assert "--variant has no effect without" in capsys.readouterr().err
