"""Training of references: what each stage trains, resuming, data in memory, bad input."""

from __future__ import annotations

import json
import re
import shutil
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from customize.errors import ConfigError, DataError, PipelineError, SettingsError, StorageError
from customize.families import family_of
from customize.references.model import ReferenceModel
from customize.training.checkpoint import load_latest_checkpoint
from customize.training.references.group_dataset import ArrayGroups, GroupSample
from customize.training.references.load_models import (
    add_attributes,
    initial_digest,
    load_reference_model,
)
from customize.training.references.recipe import train_references
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.training.references.tiny_references import make_groups, make_metadata, settings, tensors
from tests.training.runs import Stop, assert_unchanged, crash_at, same, snapshot

PIPE = tiny_sd()
COMPONENTS = PIPE.components


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a first stage, beside its images."""
    folder = tmp_path_factory.mktemp("first")
    train_references(settings(folder, "first"), COMPONENTS, progress=False)
    return folder


def changed(before, after):
    """The names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_in_all_stages(name):
    return name.startswith(("encoder.final_layer.", "encoder.projector.")) or name.endswith(
        ("to_k_ref.weight", "to_v_ref.weight")
    )


def test_alignment_trains_all_but_the_mllm_and_the_lora(tmp_path):
    config = settings(tmp_path, weight_decay=0.1)
    family = family_of(COMPONENTS)
    before = tensors(load_reference_model(config, family))
    unchanged = snapshot(COMPONENTS)
    trained = train_references(config, COMPONENTS, progress=False)
    assert_unchanged(unchanged, COMPONENTS)
    names = changed(before, tensors(trained))
    assert names == {name for name in before if is_in_all_stages(name)}
    assert len(names) < len(before)
    assert same(tensors(ReferenceModel.from_pretrained(tmp_path / "out")), tensors(trained))


@pytest.mark.parametrize("stage", ["single", "multi"])
def test_later_stages_train_everything(stage, first):
    config = settings(first, stage, stage=stage, init=first / "first", learning_rate=1e-3)
    before = tensors(ReferenceModel.from_pretrained(first / "first"))
    after = tensors(train_references(config, COMPONENTS, progress=False))
    assert changed(before, after) == before.keys()
    # A step of AdamW changes a weight by about the learning rate.
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 10 * 1e-3


def test_references_know_the_attributes_that_they_were_trained_with(first):
    rows = [
        {"group": "a", "image": f"{k}.png", "caption": "a cup", "attribute": word}
        for k, word in enumerate(["colour", "shape ", ""])
    ]
    images = make_metadata(first / "named", rows)

    def train(name, stage, previous, images=images):
        config = settings(first, name, stage=stage, init=previous, steps=1, images=images)
        train_references(config, COMPONENTS, progress=False)
        return first / name, ReferenceModel.from_pretrained(first / name).config.attributes

    # Another stage than the last reads no attributes.
    single, known = train("named-single", "single", first / "first")
    assert known == ()
    multi, known = train("named-multi", "multi", single)
    assert known == ("colour", "shape")
    assert train("plain-multi", "multi", multi, first / "images")[1] == ("colour", "shape")
    # Those of samples in memory are unknown, unless the data set names them.
    model = ReferenceModel.from_pretrained(multi)
    add_attributes(model, make_arrays(model, settings(first, "x", init=multi)))
    assert model.config.attributes == ("colour", "shape")
    add_attributes(model, [])
    assert model.config.attributes is None is model.encoder.config.attributes
    add_attributes(model, make_arrays(model, settings(first, "x", init=multi)))
    assert model.config.attributes is None


def test_checkpoints_of_the_previous_stage_are_no_initial_weights(first):
    config = settings(first, "next", init=first / "first")
    before = initial_digest(config, None)
    checkpoints = first / "first" / ".checkpoints"
    checkpoints.mkdir()
    save_file({"weight": torch.ones(2)}, checkpoints / "step-000004.safetensors")
    assert before.count("/") == 1  # encoder and adapter
    assert initial_digest(config, None) == before
    shutil.rmtree(checkpoints)


def test_the_latest_stage_decides_how_many_references_a_model_reads(first):
    before = ReferenceModel.from_pretrained(first / "first").config.max_references
    config = settings(first, "next", init=first / "first", max_references=before - 1)
    model = load_reference_model(config, family_of(COMPONENTS))
    assert model.config.max_references == model.encoder.config.max_references == before - 1


def test_learning_rates_of_encoder_and_adapter(first):
    config = settings(
        first, "rates", init=first / "first", learning_rate=1e-6, adapter_learning_rate=1e-2
    )
    before = tensors(ReferenceModel.from_pretrained(first / "first"))
    after = tensors(train_references(config, COMPONENTS, progress=False))
    change = {k: float((after[k] - before[k]).abs().max()) for k in before}
    assert max(v for k, v in change.items() if k.startswith("encoder.")) < 1e-5
    assert min(v for k, v in change.items() if k.endswith("_ref.weight")) > 1e-3


def test_loss_falls(tmp_path):
    config = settings(
        tmp_path, steps=60, log_every=1, batch_size=4, learning_rate=3e-3, drop_both=0
    )
    losses = []
    train_references(
        config, COMPONENTS, on_step=lambda _, loss: losses.append(loss), progress=False
    )
    assert torch.stack(losses[-20:]).mean() < 0.98 * torch.stack(losses[:20]).mean()


@pytest.mark.parametrize("changes", [{}, {"buckets": True, "cache_latents": False}])
def test_interrupted_run_gives_the_uninterrupted_result(changes, tmp_path):
    make_groups(tmp_path / "images", (4, 2))
    Image.new("RGB", (64, 32), "red").save(tmp_path / "images" / "g0" / "0.png")
    changes = {"stage": "multi", "steps": 5, "gradient_accumulation": 2, **changes}
    whole = train_references(settings(tmp_path, "whole", **changes), COMPONENTS, progress=False)
    config = settings(tmp_path, "parts", checkpoint_every=2, **changes)
    with pytest.raises(Stop):
        train_references(config, COMPONENTS, progress=False, on_step=crash_at(3))
    assert load_latest_checkpoint(tmp_path / "parts" / ".checkpoints").step == 2
    steps = []
    parts = train_references(
        config, COMPONENTS, progress=False, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [3, 4, 5]
    assert same(tensors(whole), tensors(parts))
    # A finished run is loaded.
    steps.clear()
    again = train_references(
        config, COMPONENTS, progress=False, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [] and same(tensors(again), tensors(parts))


def test_resuming_with_other_settings_is_refused(tmp_path):
    config = settings(tmp_path, checkpoint_every=1)
    with pytest.raises(Stop):
        train_references(config, COMPONENTS, progress=False, on_step=crash_at(2))
    with pytest.raises(SettingsError, match="batch_size was 2 and is 3"):
        train_references(config.model_copy(update={"batch_size": 3}), COMPONENTS, progress=False)
    (tmp_path / "images" / "g0" / "0.txt").write_text("another caption")
    with pytest.raises(SettingsError, match=r"g0/0\.png is changed"):
        train_references(config, COMPONENTS, progress=False)
    (tmp_path / "images" / "g0" / "0.txt").write_text("a photo of dog 0")
    train_references(config, COMPONENTS, progress=False)
    with pytest.raises(SettingsError, match="seed was 0 and is 1"):
        train_references(config.model_copy(update={"seed": 1}), COMPONENTS, progress=False)
    other = config.model_copy(update={"seed": 1, "resume": False})
    train_references(other, COMPONENTS, progress=False)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["settings"]["seed"] == 1 and len(facts["losses"]) == 4


def test_continuing_other_references_is_refused(first):
    pipe = tiny_sdxl()
    config = settings(first, "sdxl", init=first / "first")
    with pytest.raises(ConfigError, match="for another denoiser of family sd"):
        train_references(config, pipe.components, pipeline_config=pipe.config, progress=False)
    pipe = tiny_z_image()
    with pytest.raises(PipelineError, match="read no reference tokens") as error:
        train_references(config, pipe.components, pipeline_config=pipe.config, progress=False)
    assert "sdxl" in error.value.fix
    assert not (first / "sdxl").exists()


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3, tiny_flux], ids=lambda make: make.__name__)
def test_other_families(make, tmp_path):
    pipe = make()
    config = settings(tmp_path, stage="single", steps=2, gradient_checkpointing=True)
    before = tensors(load_reference_model(config, family_of(pipe.components, pipe.config)))
    model = train_references(config, pipe.components, pipeline_config=pipe.config, progress=False)
    assert changed(before, tensors(model)) >= {k for k in before if is_in_all_stages(k)}
    assert model.config.family == family_of(pipe.components, pipe.config).name


def test_gradient_checkpointing_gives_the_same_result(tmp_path):
    plain = train_references(settings(tmp_path, stage="single"), COMPONENTS, progress=False)
    config = settings(tmp_path, "b", stage="single", gradient_checkpointing=True)
    again = train_references(config, COMPONENTS, progress=False)
    a, b = tensors(plain), tensors(again)
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
    assert not again.encoder.mllm.is_gradient_checkpointing
    assert not any(module.training for module in again.encoder.modules())


def make_arrays(model, config, groups=2, count=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (groups, count, 32, 32, 3), dtype=np.uint8)
    captions = [[["a dog", "one"] for _ in range(count)] for _ in range(groups)]
    mean = rng.standard_normal((groups, count, 4, 16, 16), dtype=np.float32)
    latents = (torch.from_numpy(mean), torch.zeros(groups, count, 4, 16, 16))
    return ArrayGroups(images, captions, latents, model.processor, config)


def test_data_in_memory(tmp_path):
    results = []
    for output in ("a", "b"):
        config = settings(tmp_path, output, stage="multi", images=None)
        model = load_reference_model(config, family_of(COMPONENTS))
        dataset = make_arrays(model, config)
        results.append(train_references(config, COMPONENTS, dataset, model, progress=False))
        assert results[-1] is model
    assert same(*map(tensors, results))


def test_drawn_data(tmp_path):
    class Drawn:
        def __len__(self):
            return 100

        def sample(self, index, rng):
            shade = rng.randrange(256)
            latents = torch.full((4, 16, 16), shade / 128 - 1)
            image = Image.new("RGB", (32, 32), (shade,) * 3)
            return GroupSample((latents, 0 * latents), "a cup", [image] * rng.randint(1, 3), ())

    config = settings(tmp_path, images=None, validation_groups=2, validation_steps=2)
    train_references(config, COMPONENTS, Drawn(), progress=False)
    with Image.open(tmp_path / "out" / "validation" / "step-4.png") as sheet:
        assert sheet.height == 64


def test_validation_sheets(tmp_path):
    config = settings(
        tmp_path,
        stage="multi",
        validation_images=make_groups(tmp_path / "shown", (3, 3)),
        validation_groups=2,
        validation_every=2,
        validation_steps=2,
        validation_prompts=("a dog", "a cat", "a cup"),
    )
    plain = train_references(settings(tmp_path, "plain", stage="multi"), COMPONENTS, progress=False)
    drawn = train_references(config, COMPONENTS, progress=False)
    assert same(tensors(plain), tensors(drawn))
    folder = tmp_path / "out" / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2.png", "step-4.png"]
    with Image.open(folder / "step-4.png") as sheet:
        # Two references of 32 pixels, a gap, three images; two rows.
        assert sheet.size == (2 * 32 + 4 + 3 * 32, 2 * 32)


def test_groups_of_one_image_are_left_out_with_their_count(tmp_path, capsys):
    make_groups(tmp_path / "images", (1, 2, 1))
    train_references(settings(tmp_path, stage="multi", steps=1), COMPONENTS)
    assert re.search(r"4 images in 3 groups, of which 2 are alone", capsys.readouterr().out)
    make_groups(tmp_path / "alone", (1, 1))
    config = settings(tmp_path, "b", stage="multi", images=tmp_path / "alone")
    with pytest.raises(DataError, match="every group has one image"):
        train_references(config, COMPONENTS, progress=False)


def test_missing_inputs(tmp_path):
    config = settings(tmp_path, images=None)
    with pytest.raises(ConfigError, match="there are no training images"):
        train_references(config, COMPONENTS, progress=False)
    config = settings(tmp_path).model_copy(update={"mllm": None})
    with pytest.raises(ConfigError, match="neither an MLLM nor references"):
        train_references(config, COMPONENTS, progress=False)
    config = config.model_copy(update={"mllm": tmp_path / "images"})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        train_references(config, COMPONENTS, progress=False)
    config = settings(tmp_path, resolution=20)
    with pytest.raises(ConfigError, match="20 is not a multiple of 8"):
        train_references(config, COMPONENTS, progress=False)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="the folder holds other files"):
        train_references(settings(tmp_path), COMPONENTS, progress=False)


def test_arrays_that_do_not_fit(first):
    config = settings(first, "arrays", stage="multi", images=None, init=first / "first")
    model = ReferenceModel.from_pretrained(first / "first")
    latents = (torch.zeros(2, 1, 4, 16, 16),) * 2
    pixels = np.zeros((2, 1, 32, 32, 3), np.uint8)
    with pytest.raises(DataError, match="every group has one image"):
        ArrayGroups(pixels, [["x"], ["y"]], latents, model.processor, config)
    with pytest.raises(DataError, match="do not fit 2 groups of 1 image"):
        ArrayGroups(pixels, [["x"]], latents, model.processor, config)
    with pytest.raises(DataError, match="images are float32"):
        ArrayGroups(pixels.astype(np.float32), [["x"], ["y"]], latents, model.processor, config)


def test_sample_of_arrays_holds_out_the_target(first):
    config = settings(first, "x", stage="multi", images=None, init=first / "first")
    model = ReferenceModel.from_pretrained(first / "first")
    dataset = make_arrays(model, config, groups=2, count=3)
    all_patches = [
        model.processor.cut_images([Image.fromarray(dataset._images[1, k])])[0].values
        for k in range(3)
    ]
    captions = set()
    for seed in range(20):
        sample = dataset.sample(4, Random(seed))  # the second image of the second group
        captions.add(sample.caption)
        shown = [
            next(k for k in range(3) if torch.equal(all_patches[k], image.values))
            for image in sample.references
        ]
        assert sorted(shown) == [0, 2]
    assert captions == {"a dog", "one"}


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux], ids=lambda make: make.__name__)
def test_mixed_precision(make, tmp_path):
    pipe = make()
    config = settings(tmp_path, stage="single", mixed_precision="bf16", steps=2)
    before = tensors(load_reference_model(config, family_of(pipe.components, pipe.config)))
    losses = []
    model = train_references(
        config,
        pipe.components,
        pipeline_config=pipe.config,
        progress=False,
        on_step=lambda _, loss: losses.append(float(loss)),
    )
    after = tensors(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert changed(before, after) == before.keys()
    assert 0.1 < losses[0] < 10
