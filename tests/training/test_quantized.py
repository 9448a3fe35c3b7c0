"""Training on a quantized denoiser."""

import json

import numpy as np
import pytest
import torch
from PIL import ImageChops
from safetensors import safe_open

import customize  # noqa: F401  (for load_custom)
from customize.base import quantization
from customize.base.quantization import quantize_model
from customize.concepts.io.read_concept import load_concept
from customize.errors import ConfigError, SettingsError
from customize.families import family_of
from customize.training import prepare_base
from customize.training.recipe import train
from tests.base.test_quantization import LIBRARIES, kind_param, kinds
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3
from tests.tiny_video import tiny_wan
from tests.training.runs import Stop, assert_unchanged, crash_at, same, settings, snapshot, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_sd().save_pretrained(folder)
    return str(folder)


#: Other kinds use the same code and are slower.
once = pytest.mark.parametrize(
    "kind", [kind_param(kind, *[pytest.mark.slow] * (kind != "nf4")) for kind in LIBRARIES]
)


@once
def test_a_concept_learned_on_a_quantized_base_fits_the_full_base(kind, base, tmp_path):
    losses = []
    changes = {"base": base, "steps": 30, "gradient_checkpointing": True, "validation_steps": 2}
    changes |= {"validation_prompts": ("<rex>",), "validation_every": 5}
    concept = train(
        settings(tmp_path, "a", quantize=kind, **changes),
        progress=False,
        on_step=lambda _, loss: losses.append(float(loss)),
    )
    assert np.mean(losses[-10:]) < 0.96 * np.mean(losses[:5])
    plain = train(settings(tmp_path, "b", **changes), progress=False)
    a, b = tensors(concept), tensors(plain)
    assert a.keys() == b.keys() and not same(a, b)
    assert all(a[key].shape == b[key].shape and a[key].dtype == torch.float32 for key in a)
    # The same direction, because rounding changes the concept little.
    ups = [torch.cat([x[key].flatten() for key in a if key.endswith(".up")]) for x in (a, b)]
    assert float(torch.cosine_similarity(*ups, dim=0)) > 0.7

    assert concept.info.fingerprint == plain.info.fingerprint
    with (
        safe_open(tmp_path / "a" / "pytorch_lora_weights.safetensors", "pt") as left,
        safe_open(tmp_path / "b" / "pytorch_lora_weights.safetensors", "pt") as right,
    ):
        assert left.keys() == right.keys()
    pipe = tiny_sd()
    call = {"num_inference_steps": 3, "height": 32, "width": 32}

    def drawn():
        return pipe("<rex>", generator=torch.Generator().manual_seed(1), **call).images[0]

    before = drawn()
    pipe.load_custom(tmp_path / "a")
    assert ImageChops.difference(before, drawn()).getbbox() is not None


@once
@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3, lambda: tiny_wan("2.2-14b")])
def test_other_families_train_quantized(make, kind, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base")
    changes = {"base": str(tmp_path / "base"), "steps": 3, "mixed_precision": "bf16"}
    changes |= {"prior_weight": 1.0, "prior_count": 2, "validation_steps": 2}
    concept = train(settings(tmp_path, quantize=kind, **changes), progress=False)
    assert set(family_of(pipe.components, pipe.config).denoisers) <= concept.updates.keys()
    for updates in concept.updates.values():
        moved = [float(update.up.abs().max()) > 0 for update in updates.values()]
        assert sum(moved) > 0.5 * len(moved)


@once
def test_a_resumed_run_gives_the_uninterrupted_result(kind, base, tmp_path):
    changes = {"base": base, "quantize": kind, "checkpoint_every": 4}
    whole = train(settings(tmp_path, "a", **changes), progress=False)
    config = settings(tmp_path, "b", **changes)
    with pytest.raises(Stop):
        train(config, progress=False, on_step=crash_at(10))
    with pytest.raises(SettingsError, match=f"quantize was '{kind}' and is 'none'"):
        train(config.model_copy(update={"quantize": "none"}), progress=False)
    resumed = train(config, progress=False)
    assert same(tensors(whole), tensors(resumed))
    assert (
        json.loads((tmp_path / "b" / "concept.json").read_text())["training"]["settings"][
            "quantize"
        ]
        == kind
    )
    with pytest.raises(SettingsError, match="quantize was"):
        train(config.model_copy(update={"quantize": "none"}), progress=False)


@kinds
def test_a_quantized_model_in_memory_is_trained_unchanged(kind, tmp_path):
    pipe = tiny_sd()
    quantize_model(pipe.unet, kind, torch.float32, torch.device("cpu"))
    family = family_of(pipe.components)

    @torch.no_grad()
    def prediction():
        noisy = torch.ones(1, 4, 16, 16)
        return family.predict(noisy, torch.tensor([500]), family.encode_prompts(["a dog"]))

    before = prediction(), [name for name, _ in pipe.unet.named_modules()]
    concept = train(settings(tmp_path, "a", steps=4), pipe.components, progress=False)
    assert torch.equal(prediction(), before[0])
    assert [name for name, _ in pipe.unet.named_modules()] == before[1]
    tiny_sd().save_pretrained(tmp_path / "base")
    config = settings(tmp_path, "b", base=str(tmp_path / "base"), quantize=kind, steps=4)
    assert same(tensors(concept), tensors(train(config, progress=False)))
    assert load_concept(tmp_path / "a").updates.keys() == concept.updates.keys()


def test_unavailable_quantization_is_refused_before_loading(tmp_path, monkeypatch):
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    with pytest.raises(ConfigError, match="a model in memory is not quantized for training"):
        train(settings(tmp_path, quantize="nf4"), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)

    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare_base, "load_pipeline", lambda *_: pytest.fail("base was loaded"))
    for kind, library in (("nf4", "bitsandbytes"), ("torchao_float8", "torchao")):
        with pytest.raises(ConfigError, match=f"{kind} needs {library}, which is not installed"):
            train(settings(tmp_path, quantize=kind), progress=False)
