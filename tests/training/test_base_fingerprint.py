import shutil
from functools import partial

import pytest
import torch

from customize.errors import SettingsError
from customize.families import family_of
from customize.training.base_fingerprint import (
    resolution_before_loading,
    weight_digests,
    weight_digests_on_disk,
)
from customize.training.recipe import train
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny_llm import tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_wan
from tests.training.runs import Stop, crash_at, same, settings, tensors

pytestmark = pytest.mark.usefixtures("short_padding")


def save_base(folder, factor=1.0):
    """Save the tiny base with multiplied UNet weights, over an existing folder."""
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
    digests = weight_digests_on_disk(str(tmp_path / "base"))
    assert digests == weight_digests("", pipe.components)
    assert set(digests) == {k for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    pipe.to(torch.float16)
    halves = weight_digests("", pipe.components)
    assert not set(halves.values()) & set(digests.values())
    pipe.save_pretrained(tmp_path / "half")
    pipe.to(torch.float32)
    assert (
        weight_digests_on_disk(str(tmp_path / "half"))
        == halves
        == weight_digests("", pipe.components)
    )


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_the_resolution_is_known_before_the_base_is_loaded(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base")
    config = settings(tmp_path, base=str(tmp_path / "base"), resolution=None)
    expected = family_of(pipe.components).default_resolution
    assert (
        resolution_before_loading(config, None)
        == resolution_before_loading(config, pipe.components)
        == expected
    )
    assert resolution_before_loading(settings(tmp_path, resolution=48), None) == 48
    assert (
        resolution_before_loading(settings(tmp_path, base="nobody/nothing", resolution=None), None)
        is None
    )


def test_every_tensor_changes_the_digest(tmp_path):
    pipe = tiny_sd()
    before = weight_digests("", pipe.components)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3
    after = weight_digests("", pipe.components)
    assert {key for key in before if before[key] != after[key]} == {"unet"}


def test_bases_without_local_weights_have_no_digests(tmp_path):
    save_base(tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    for base in (tmp_path / "base", tmp_path, "nobody/nothing", "no such base"):
        assert weight_digests_on_disk(str(base)) == {}


def test_a_hub_ids_download_is_read(tmp_path, monkeypatch):
    pipe = save_base(tmp_path / "base")
    cache = {"org/model": str(tmp_path / "base" / "model_index.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda base, name: cache[base])
    assert weight_digests_on_disk("org/model") == weight_digests("", pipe.components)
    assert weight_digests_on_disk("org/other") == {}


def test_resuming_on_other_base_weights_is_refused(tmp_path):
    base = tmp_path / "base"
    changes = {"base": str(base), "checkpoint_every": 3}
    save_base(base)
    train(settings(tmp_path, "done", **changes), progress=False)
    with pytest.raises(Stop):
        train(settings(tmp_path, "cut", **changes), progress=False, on_step=crash_at(6))
    pipe = save_base(base, 1.1)
    for output in ("done", "cut"):
        for components in (None, pipe.components):
            with pytest.raises(SettingsError, match=r"the base's weights have changed \(unet\)"):
                train(settings(tmp_path, output, **changes), components, progress=False)
    pipe = save_base(base)
    whole = train(settings(tmp_path, "done", **changes), pipe.components, progress=False)
    resumed = train(settings(tmp_path, "cut", **changes), pipe.components, progress=False)
    assert same(tensors(whole), tensors(resumed))


def test_class_images_of_other_weights_are_not_used(tmp_path):
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


def wan(boundary_ratio):
    return tiny_wan("2.2-14b", boundary_ratio)


def shifted(shift):
    pipe = tiny_sd3()
    pipe.scheduler.set_shift(shift)
    return pipe


#: Setting of a model -> maker, two values, and the message.
CONFIGURED = {
    "wan": (wan, 0.875, 0.5, "boundary_ratio was 0.875 and is 0.5"),
    "krea2": (tiny_krea2, False, True, "is_distilled was False and is True"),
    "flux2": (tiny_flux2_klein, False, True, "is_distilled was False and is True"),
    "qwen_image_21": (tiny_qwen_image_21, [1.0, 0.5], [1.0, 0.2], "sample_sigmas was"),
    "sd": (tiny_sd, "epsilon", "v_prediction", "prediction_type was 'epsilon' and is"),
    "sd3": (shifted, 3.0, 5.0, "shift was 3.0 and is 5.0"),
}


# Attributes set on a scheduler are not saved.
PLACES = [(name, "memory") for name in CONFIGURED]
PLACES += [(name, "disk") for name in CONFIGURED if name != "sd3"]


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_resuming_on_another_base_configuration_is_refused(name, where, tmp_path):
    make, first, second, message = CONFIGURED[name]
    base = str(tmp_path / "base")

    def run(value, **changes):
        pipe = make(value)
        config = settings(tmp_path, base=base, checkpoint_every=4, steps=8, **changes)
        if where == "memory":
            arguments = {"components": pipe.components, "pipeline_config": pipe.config}
        else:
            shutil.rmtree(base, ignore_errors=True)
            pipe.save_pretrained(base)
            arguments = {}
        return partial(train, config, progress=False, **arguments)

    with pytest.raises(Stop):
        run(first)(on_step=crash_at(6))
    with pytest.raises(SettingsError, match=f"other settings: the base's {message}"):
        run(second)()
    run(first)()
    if where == "memory":  # no base is loaded for a finished concept
        with pytest.raises(SettingsError, match=f"other settings: the base's {message}"):
            run(second)()


@pytest.mark.parametrize("name", CONFIGURED)
def test_class_images_of_another_base_configuration_are_not_used(name, tmp_path):
    make, first, second, _ = CONFIGURED[name]
    changes = {"prior_weight": 1.0, "prior_count": 1, "validation_steps": 2, "steps": 1}
    config = settings(tmp_path, resume=False, **changes)
    for count, value in ((1, first), (1, first), (2, second)):
        pipe = make(value)
        train(config, pipe.components, progress=False, pipeline_config=pipe.config)
        assert len(list((config.output / ".class_pictures").iterdir())) == count
