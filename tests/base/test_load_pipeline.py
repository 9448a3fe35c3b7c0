"""Bases that diffusers implements as modular pipelines only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Flux3ModularPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from customize.base.load_pipeline import load_pipeline
from customize.errors import PipelineError
from customize.training.base_fingerprint import weight_digests, weight_digests_on_disk
from tests.tiny import tiny_flux3, tiny_sd


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "flux3"
    tiny_flux3().save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    # A copy, so that the index names another folder, as in a download.
    return Path(shutil.copytree(saved, tmp_path / "base"))


def test_a_modular_base_loads_completely_without_prompt_rewriting(base: Path) -> None:
    pipe = load_pipeline(str(base), {"default": torch.bfloat16, "vae": torch.float32})
    assert type(pipe) is Flux3ModularPipeline
    assert list(pipe.blocks.sub_blocks) == ["text_encoder", "vae_encoder", "denoise", "decode"]
    original = tiny_flux3()
    for key in ("transformer", "text_encoder", "vae"):
        dtype = torch.float32 if key == "vae" else torch.bfloat16
        actual, expected = (getattr(pipeline, key).state_dict() for pipeline in (pipe, original))
        assert actual.keys() == expected.keys()
        assert all(
            torch.equal(actual[name], expected[name].to(actual[name].dtype)) for name in actual
        )
        assert getattr(pipe, key).dtype == dtype
    assert pipe.scheduler.config.shift == original.scheduler.config.shift
    picture = pipe.to(torch.float32)(
        prompt="a dog", num_inference_steps=1, height=32, width=32, output="images"
    )[0]
    assert picture.size == (32, 32)


def test_digests_of_a_modular_bases_files_match_memory(base: Path) -> None:
    digests = weight_digests_on_disk(str(base))
    assert set(digests) == {"transformer", "text_encoder", "vae"}
    assert digests == weight_digests("", load_pipeline(str(base), torch.float32).components)
    shutil.rmtree(base / "text_encoder")  # which may be in a repository of its own
    assert weight_digests_on_disk(str(base)) == {}
    (base / "modular_model_index.json").write_text("{")
    assert weight_digests_on_disk(str(base)) == {}


def without_a_weight(base: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file)


def as_pickles(base: Path) -> None:
    for file in base.rglob("*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()


def without_the_encoder(base: Path) -> None:
    index = base / "modular_model_index.json"
    values = json.loads(index.read_text())
    values["text_encoder"][2]["pretrained_model_name_or_path"] = str(base / "nowhere")
    index.write_text(json.dumps(values))
    shutil.rmtree(base / "text_encoder")


def with_code(base: Path) -> None:
    (base / "blocks.py").write_text("raise SystemExit('run')")
    config = {"auto_map": {"ModularPipelineBlocks": "blocks.Blocks"}}
    (base / "modular_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_a_weight, "lack the weight transformer.proj_out.weight"),
        (as_pickles, "cannot be loaded"),
        (without_the_encoder, "cannot be loaded: Unable to load text_encoder"),
        (with_code, "cannot be loaded: .*contains custom code"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_modular_bases(spoil: Callable[[Path], None], says: str, base: Path) -> None:
    spoil(base)
    with pytest.raises(PipelineError, match=rf"{says}.*Fix: "):
        load_pipeline(str(base), torch.float32)


def test_a_base_with_both_indices_loads_as_the_standard_pipeline(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "modular_model_index.json").write_text("{}")
    assert type(load_pipeline(str(tmp_path / "base"), torch.float32)) is StableDiffusionPipeline


def test_a_hub_id_of_a_modular_base(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is loaded offline from the hub cache."""
    cache = base.parent / "cache"
    commit = "0" * 40
    snapshot = cache / "models--org--flux3" / "snapshots" / commit
    shutil.copytree(base, snapshot)
    refs, missing = snapshot.parents[1] / "refs", snapshot.parents[1] / ".no_exist" / commit
    refs.mkdir()
    (refs / "main").write_text(commit)
    for name in ("model_index.json", "modular_config.json", "tokenizer/config.json"):
        (missing / name).parent.mkdir(parents=True, exist_ok=True)
        (missing / name).touch()
    index = snapshot / "modular_model_index.json"
    index.write_text(
        index.read_text().replace(
            json.loads(index.read_text())["vae"][2]["pretrained_model_name_or_path"], "org/flux3"
        )
    )
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert type(load_pipeline("org/flux3", torch.float32)) is Flux3ModularPipeline
