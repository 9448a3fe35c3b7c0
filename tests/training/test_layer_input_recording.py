"""Layer inputs that a run records beside its concept."""

import pytest
import torch

import customize
import customize.errors
from customize.concepts.input_statistics import (
    LayerInputs,
    contexts_of,
    digest_updates,
    fill_prompts,
    layer_inputs_path,
    record_layer_inputs,
)
from customize.concepts.io.read_concept import load_concept
from customize.families import family_of
from customize.training.layer_input_recording import (
    MAX_CAPTIONS,
    class_prompts,
    concept_prompts,
)
from customize.training.recipe import train
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3
from tests.training.runs import same, settings, snapshot, tensors

pytestmark = pytest.mark.usefixtures("quick_recordings")

FAMILIES = {
    "sd": (tiny_sd, {"layerwise_tokens": True, "caption": "a picture of {}"}),
    "sd3": (tiny_sd3, {"method": "lora"}),
}


def test_prompts_are_the_caption_in_contexts_and_some_captions(tmp_path):
    config = settings(tmp_path, caption="a sticker of {}")
    captions = [f"a sticker of <rex> on a {k} background" for k in range(20)]
    prompts = concept_prompts(config, [*captions, *captions, "a sticker of a dog"])
    varied = fill_prompts("<rex>", contexts_of("a sticker of {}"))
    assert prompts[: len(varied)] == varied and "a sticker of <rex> on a beach" in varied
    assert prompts[len(varied) :] == [captions[k * 20 // MAX_CAPTIONS] for k in range(MAX_CAPTIONS)]
    plain = class_prompts(config, prompts)
    assert plain[0] == "a sticker of a dog" and not any("<rex>" in prompt for prompt in plain)
    # Captions that name another concept of the run are left out, and repeated ones.
    others = concept_prompts(
        config, ["<rex> and <tom>", "a sticker of <rex> on a beach"], ["<tom>"]
    )
    assert others == varied


def test_a_run_records_with_its_captions(tmp_path, monkeypatch):
    pipe = tiny_sd()
    config = settings(tmp_path, record_inputs=True)
    for number, path in enumerate(sorted(config.images.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"<rex> the dog number {number}")
    seen = []

    def record(family, layers, prompts, *args, **kwargs):
        seen.append(list(prompts))
        return record_layer_inputs(family, layers, prompts, *args, **kwargs)

    monkeypatch.setattr("customize.training.layer_input_recording.record_layer_inputs", record)
    train(config, pipe.components, progress=False)
    with_trigger, plain = seen
    assert "<rex> the dog number 0" in with_trigger and "a photo of <rex>" in with_trigger
    assert "a dog the dog number 0" in plain and len(plain) == len(with_trigger)


@pytest.mark.parametrize(("make", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_the_recording_equals_that_of_a_pipeline(tmp_path, make, changes):
    pipe = make()
    changes = changes | {"resolution": family_of(pipe.components).default_resolution}
    before = snapshot(pipe.components, pipe.config)
    plain = train(settings(tmp_path, "plain", **changes), pipe.components, progress=False)
    assert not layer_inputs_path(tmp_path / "plain").exists()
    config = settings(tmp_path, record_inputs=True, **changes)
    concept = train(config, pipe.components, progress=False)
    # Recording changes neither the concept nor the model.
    assert same(tensors(plain), tensors(concept))
    after = snapshot(pipe.components, pipe.config)
    assert before.keys() == after.keys()
    recorded = LayerInputs.load(layer_inputs_path(config.output))
    assert recorded.digest == digest_updates(load_concept(config.output).updates)
    other = customize.record_inputs(pipe, config.output)
    for kind in ("concept", "generic"):
        one, two = getattr(recorded, kind), getattr(other, kind)
        assert {c: set(m) for c, m in one.items()} == {c: set(m) for c, m in two.items()}
        assert {c: set(m) for c, m in one.items()} == {
            c: set(m) for c, m in concept.updates.items()
        }
        for component, layers in one.items():
            for module, rows in layers.items():
                again = two[component][module]
                # Half precision on disk.
                torch.testing.assert_close(rows.T @ rows, again.T @ again, atol=2e-3, rtol=0)


def test_a_model_without_trained_tokens_is_recorded(tmp_path):
    pipe = tiny_flux()
    config = settings(tmp_path, record_inputs=True, steps=2)
    concept = train(config, pipe.components, progress=False)
    recorded = LayerInputs.load(layer_inputs_path(config.output))
    assert {c: set(m) for c, m in recorded.concept.items()} == {
        c: set(m) for c, m in concept.updates.items()
    }


def test_a_failed_recording_is_warned_of_and_the_concept_kept(tmp_path, monkeypatch):
    pipe = tiny_sd()

    def broken(*args, **kwargs):
        raise customize.errors.ConceptError("the inputs of the layer have the energy nan")

    monkeypatch.setattr("customize.training.layer_input_recording.record_layer_inputs", broken)
    config = settings(tmp_path, record_inputs=True)
    with pytest.warns(UserWarning, match="energy nan"):
        train(config, pipe.components, progress=False)
    assert load_concept(config.output).info.name == "rex"
