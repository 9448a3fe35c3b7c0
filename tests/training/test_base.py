import shutil

import pytest
import torch

from customize.errors import SettingsError
from customize.families import family_of
from customize.training.base import resolution_of, weights_of, weights_on_disk
from customize.training.loop import train
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.training.runs import same, settings, tensors


class Stop(Exception):
    """What a test throws into a run, as a crash would."""


def crash(done, loss):
    if done == 6:
        raise Stop


def save_base(folder, factor=1.0):
    """The tiny base, its UNet's weights multiplied; what was there before goes."""
    pipe = tiny_sd()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(factor)
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    return pipe


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_weights_on_disk_and_in_memory_agree(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    found = weights_on_disk(str(tmp_path / "base"))
    assert found == weights_of("", pipe.components)
    assert set(found) == {k for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    pipe.to(torch.float16)
    halves = weights_of("", pipe.components)
    assert not set(halves.values()) & set(found.values())
    pipe.save_pretrained(tmp_path / "half")
    pipe.to(torch.float32)
    assert weights_on_disk(str(tmp_path / "half")) == halves == weights_of("", pipe.components)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_the_resolution_is_known_before_the_base_is_loaded(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base")
    config = settings(tmp_path, base=str(tmp_path / "base"), resolution=None)
    wanted = family_of(pipe.components).default_resolution
    assert resolution_of(config, None) == resolution_of(config, pipe.components) == wanted
    assert resolution_of(settings(tmp_path, resolution=48), None) == 48
    assert resolution_of(settings(tmp_path, base="nobody/nothing", resolution=None), None) is None


def test_every_tensor_counts(tmp_path):
    pipe = tiny_sd()
    before = weights_of("", pipe.components)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3
    after = weights_of("", pipe.components)
    assert {key for key in before if before[key] != after[key]} == {"unet"}


def test_bases_without_weights_at_hand(tmp_path):
    save_base(tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    for base in (tmp_path / "base", tmp_path, "nobody/nothing", "no such base"):
        assert weights_on_disk(str(base)) == {}


def test_a_hub_ids_download_is_looked_at(tmp_path, monkeypatch):
    pipe = save_base(tmp_path / "base")
    found = {"org/model": str(tmp_path / "base" / "model_index.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda base, name: found[base])
    assert weights_on_disk("org/model") == weights_of("", pipe.components)
    assert weights_on_disk("org/other") == {}


def test_what_was_learned_on_other_weights_is_refused(tmp_path):
    base = tmp_path / "base"
    changes = {"base": str(base), "checkpoint_every": 3}
    save_base(base)
    train(settings(tmp_path, "done", **changes), progress=False)
    with pytest.raises(Stop):
        train(settings(tmp_path, "cut", **changes), progress=False, on_step=crash)
    pipe = save_base(base, 1.1)
    for output in ("done", "cut"):
        for components in (None, pipe.components):
            with pytest.raises(SettingsError, match=r"the base's weights have changed \(unet\)"):
                train(settings(tmp_path, output, **changes), components, progress=False)
    pipe = save_base(base)
    whole = train(settings(tmp_path, "done", **changes), pipe.components, progress=False)
    resumed = train(settings(tmp_path, "cut", **changes), pipe.components, progress=False)
    assert same(tensors(whole), tensors(resumed))


def test_class_pictures_of_other_weights_are_not_taken(tmp_path):
    base = tmp_path / "base"
    for factor in (1.0, 1.1, 1.0):
        save_base(base, factor)
        config = settings(
            tmp_path,
            base=str(base),
            prior_weight=1.0,
            prior_count=1,
            validation_steps=1,
            steps=1,
            resume=False,
        )
        train(config, progress=False)
    folders = list((config.output / ".class_pictures").iterdir())
    assert len(folders) == 2
