"""Bases in a single file, loaded by diffusers without downloads."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from customize.base.load_pipeline import load_pipeline
from customize.cli import main
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConfigError, PipelineError
from customize.training.recipe import train
from tests.ldm import write_single_file
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_flux, tiny_sd
from tests.training.runs import Stop, crash_at, same, settings, tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A single file, and a folder with only the configuration of its pipeline."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny_sd()
    pipe.save_pretrained(folder / "config")
    for weights in (folder / "config").rglob("*.safetensors"):
        weights.unlink()
    return str(write_single_file(pipe, folder / "tiny.safetensors")), str(folder / "config")


def test_a_single_file_loads_as_the_saved_pipeline(checkpoint):
    file, config = checkpoint
    pipe = load_pipeline(file, torch.float32, config=config)
    assert np.array_equal(draw(pipe, "a dog"), draw(tiny_sd(), "a dog"))
    half = load_pipeline(file, {"default": torch.bfloat16, "vae": torch.float32}, config=config)
    assert half.unet.dtype == torch.bfloat16 and half.text_encoder.dtype == torch.bfloat16
    vae = tiny_sd().vae.state_dict()
    assert half.vae.dtype == torch.float32
    assert all(torch.equal(vae[key], value) for key, value in half.vae.state_dict().items())


def test_missing_components_are_loaded_from_the_configurations_pipeline(tmp_path):
    pipe = tiny_flux()
    pipe.save_pretrained(tmp_path / "config")
    shutil.rmtree(tmp_path / "config" / "transformer")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "config" / "transformer").mkdir()
    shutil.copy(tmp_path / "transformer" / "config.json", tmp_path / "config" / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    loaded = load_pipeline(str(file), torch.float32, config=str(tmp_path / "config"))
    np.testing.assert_allclose(draw(loaded, "a dog"), draw(tiny_flux(), "a dog"), atol=1e-5)


def test_a_missing_configuration_is_named_in_the_error(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(PipelineError, match=r"stable-diffusion-v1-5.*--base-config"):
        load_pipeline(checkpoint[0], torch.float32)


def test_wrong_files_are_refused(checkpoint, tmp_path):
    _, config = checkpoint
    with pytest.raises(ConfigError, match="no such file"):
        load_pipeline(str(tmp_path / "none.safetensors"), torch.float32, config=config)
    with pytest.raises(ConfigError, match="code"):
        load_pipeline(str(tmp_path / "model.ckpt"), torch.float32, config=config)
    (tmp_path / "cut.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(PipelineError, match="base"):
        load_pipeline(str(tmp_path / "cut.safetensors"), torch.float32, config=config)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PipelineError, match="base"):
        load_pipeline(str(tmp_path / "other.safetensors"), torch.float32, config=config)
    with pytest.raises(ConfigError, match="no variants"):
        load_pipeline(checkpoint[0], torch.float32, variant="fp16", config=config)
    with pytest.raises(ConfigError, match="only a single file"):
        load_pipeline(config, torch.float32, config=config)


def test_training_resumes_and_generates_on_a_single_file(checkpoint, tmp_path, capsys):
    file, config = checkpoint
    changes = {"base": file, "base_config": config, "steps": 4, "checkpoint_every": 2}
    plain = train(settings(tmp_path, "plain", **changes), progress=False)
    with pytest.raises(Stop):
        train(settings(tmp_path, **changes), progress=False, on_step=crash_at(3))
    resumed = train(settings(tmp_path, **changes), progress=False)
    assert same(tensors(plain), tensors(resumed))
    memory = train(settings(tmp_path, "memory", steps=4), tiny_sd().components, progress=False)
    assert same(tensors(memory), tensors(resumed))
    assert train(settings(tmp_path, **changes), progress=False).info == resumed.info
    assert "StableDiffusionPipeline.from_single_file" in (tmp_path / "out/README.md").read_text()
    words = ["generate", str(tmp_path / "out"), "--base", file, "--base-config", config]
    words += ["--prompt", "a photo of <rex>", "--steps", "1", "--output", str(tmp_path / "drawn")]
    assert main(words) == 0
    assert list((tmp_path / "drawn").glob("*.png"))
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert load_concept(tmp_path / "out").info.base == file


def test_merging_into_a_single_file_writes_a_folder(checkpoint, tmp_path):
    file, config = checkpoint
    save_concept(concept(tiny_sd()), tmp_path / "rex")
    words = ["merge", str(tmp_path / "rex"), "--output", str(tmp_path / "whole"), "--fuse"]
    assert main([*words, "--base", file, "--base-config", config]) == 0
    assert type(load_pipeline(str(tmp_path / "whole"), torch.float32)) is type(tiny_sd())
