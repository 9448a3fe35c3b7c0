import gc
import json
import math
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.concepts.types import Concept
from customize.core.bases import BASES, down_projection
from customize.errors import (
    ConfigError,
    DataError,
    PipelineError,
    SettingsError,
    StorageError,
    TrainingError,
)
from customize.families import family_of
from customize.training import prepare_base
from customize.training.data import dataset
from customize.training.loop import learning_rate_factor
from customize.training.recipe import train
from tests.tiny import tiny_sd, tiny_sd3
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import (
    Stop,
    assert_unchanged,
    crash_at,
    make_pictures,
    picture,
    same,
    settings,
    snapshot,
    tensors,
)

pytestmark = pytest.mark.usefixtures("short_padding")


@pytest.fixture(params=TINY_FAMILIES)
def pipe(request):
    return TINY_FAMILIES[request.param]()


#: Family -> tensors of a run of 5 steps, which several tests compare with.
PLAIN_RUNS = {}


@pytest.fixture
def plain_run(pipe, request, tmp_path):
    family = request.node.callspec.params["pipe"]
    if family not in PLAIN_RUNS:
        torch.manual_seed(1)
        config = settings(tmp_path, "plain", steps=5)
        concept = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
        PLAIN_RUNS[family] = tensors(concept)
    return PLAIN_RUNS[family]


def test_concepts_with_the_same_seed_start_apart(tmp_path):
    first, second = (
        train(
            settings(tmp_path / name, name=name, method="lora", steps=1, learning_rate=1e-8),
            tiny_sd().components,
            progress=False,
        )
        for name in ("rex", "tom")
    )
    downs = [c.updates["unet"][next(iter(c.updates["unet"]))].down for c in (first, second)]
    rows = [c.embeddings["text_encoder"][:1] for c in (first, second)]
    for a, b in (downs, rows):
        assert abs(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))) < 0.6


@pytest.mark.parametrize("method", ["orthogonal", "lora"])
def test_the_loss_falls_and_the_model_is_restored(pipe, method, tmp_path):
    before = snapshot(pipe.components, pipe.config)
    losses = []
    # Without trained tokens, only the denoiser can learn.
    family = family_of(pipe.components, pipe.config)
    rate = 1e-2 if family.token_dictionaries() else 1e-1
    # The loss of 2 x 2 latents is mostly noise.
    latents, _ = family.encode_images(torch.zeros(1, 3, 32, 32))
    side = 32 if latents.shape[-1] > 2 else 128
    config = settings(tmp_path, method=method, steps=30, learning_rate=rate, resolution=side)
    concept = train(
        config,
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
        on_step=lambda _, loss: losses.append(loss),
    )
    values = [float(loss) for loss in losses]
    assert len(values) == 30
    assert np.mean(values[-10:]) < 0.96 * np.mean(values[:5])
    assert_unchanged(before, pipe.components, pipe.config)

    assert concept.info.method == method
    stored = load_concept(tmp_path / "out")
    assert stored.info == concept.info
    assert same(tensors(stored), tensors(concept))
    facts = concept.info.training
    assert facts["losses"][-1][0] == 30
    assert math.isclose(facts["losses"][0][1], np.mean(values[:5]), rel_tol=1e-5)
    assert facts["final_loss"] < facts["losses"][0][1]
    assert facts["seconds_per_step"] > 0 and facts["peak_memory_mb"] > 50
    assert facts["settings"]["learning_rate"] == rate


def test_orthogonal_trains_only_the_up_projections(tmp_path):
    concept = train(settings(tmp_path, matrix_scale=0.5), tiny_sd().components, progress=False)
    info = concept.info
    for updates in concept.updates.values():
        for update in updates.values():
            width = update.shape[1]
            columns = info.slices[str(width)]
            expected = down_projection(BASES["cosine"], width, columns, 0, 0.5)
            assert torch.equal(update.down, expected)
            assert update.up.abs().max() > 0


def test_lora_trains_both_projections(tmp_path):
    start = {}
    pipe = tiny_sd()

    def remember(done, loss):
        if not start:
            layers = dict(pipe.unet.named_modules())
            for name, module in layers.items():
                if name.endswith("lora_A.customize"):
                    start[name.removesuffix(".lora_A.customize")] = module.weight.clone()

    config = settings(tmp_path, method="lora", lr_schedule="cosine", warmup_steps=2)
    concept = train(config, pipe.components, progress=False, on_step=remember)
    assert not concept.info.slices
    for module, update in concept.updates["unet"].items():
        assert not torch.equal(update.down, start[module])


def test_token_norms_stay_in_the_range_of_the_vocabulary(tmp_path):
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    config = settings(tmp_path, token_learning_rate=0.5, num_tokens=3)
    concept = train(config, pipe.components, progress=False)
    rows = concept.embeddings["text_encoder"]
    assert rows.shape == (3, 32)
    norms = table.norm(dim=1)
    assert bool((rows.norm(dim=1) <= norms.quantile(0.95) * 1.001).all())
    assert bool((rows.norm(dim=1) >= norms.quantile(0.05) * 0.999).all())
    dog = table[pipe.tokenizer("dog", add_special_tokens=False).input_ids[0]]
    assert not torch.allclose(rows[-1], dog, atol=1e-3)


def test_token_init_starts_the_first_token_at_a_word(tmp_path):
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    red, dog = (
        table[pipe.tokenizer(w, add_special_tokens=False).input_ids[0]] for w in ("red", "dog")
    )
    config = settings(tmp_path, token_init="red", token_learning_rate=1e-9, steps=1)
    rows = train(config, pipe.components, progress=False).embeddings["text_encoder"]
    cosine = torch.nn.functional.cosine_similarity(rows, torch.stack([red, dog]))
    assert bool((cosine > 0.99999).all())


def test_a_run_repeats_bit_for_bit_with_any_global_random_state(pipe, plain_run, tmp_path):
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = train(
        settings(tmp_path, "b", steps=5),
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert same(plain_run, tensors(second))
    third = train(
        settings(tmp_path, "c", seed=1, steps=5),
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
    )
    assert not same(plain_run, tensors(third))


def test_a_resumed_run_gives_the_uninterrupted_result(pipe, tmp_path):
    changes = {"steps": 6, "checkpoint_every": 2}
    changes |= {"flip": True, "caption_dropout": 0.3, "noise_offset": 0.1}
    whole = train(
        settings(tmp_path, "a", **changes),
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
    )
    config = settings(tmp_path, "b", **changes)
    before = snapshot(pipe.components, pipe.config)
    with pytest.raises(Stop):
        train(
            config,
            pipe.components,
            progress=False,
            pipeline_config=pipe.config,
            on_step=crash_at(5),
        )
    assert_unchanged(before, pipe.components, pipe.config)
    assert [p.name for p in (config.output / ".checkpoints").iterdir()] != []

    steps = []
    resumed = train(
        config,
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
        on_step=lambda done, _: steps.append(done),
    )
    assert steps == [5, 6]
    assert same(tensors(whole), tensors(resumed))


def test_validation_and_checkpoints_do_not_change_the_result(pipe, plain_run, tmp_path):
    config = settings(
        tmp_path,
        "b",
        steps=5,
        checkpoint_every=2,
        validation_prompts=("a photo of <rex> on the beach", "a dog"),
        validation_every=2,
        validation_steps=2,
    )
    busy = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert same(plain_run, tensors(busy))
    pictures = sorted((config.output / "validation").iterdir())
    assert [p.name for p in pictures] == ["step-2.png", "step-4.png", "step-5.png"]
    with Image.open(pictures[0]) as image:
        assert image.size == (64, 32)
    assert (config.output / "sample-2.png").is_file()


def test_gradient_checkpointing_and_uncached_latents_give_the_same(tmp_path):
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    plain = train(settings(tmp_path, "a", steps=5), pipe.components, progress=False)
    config = settings(tmp_path, "b", gradient_checkpointing=True, cache_latents=False, steps=5)
    saving = train(config, pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    a, b = tensors(plain), tensors(saving)
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_accumulated_batches_make_one_step(tmp_path):
    """At the first step only the noise differs, so losses are close, and not sums."""
    losses = {}
    for name, batch, accumulate in (("a", 12, 1), ("b", 3, 4)):
        step_losses = losses.setdefault(name, [])
        config = settings(
            tmp_path, name, batch_size=batch, gradient_accumulation=accumulate, steps=1
        )
        train(
            config,
            tiny_sd().components,
            progress=False,
            on_step=lambda _, loss, step_losses=step_losses: step_losses.append(float(loss)),
        )
    assert losses["a"][0] == pytest.approx(losses["b"][0], rel=0.1)


def calls_of(module, count=lambda args, kwargs: 1):
    """Count the calls of a module by a hook."""
    seen = []
    module.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(count(args, kwargs)), with_kwargs=True
    )
    return seen


def test_frozen_encoders_run_once(pipe, tmp_path):
    texts = calls_of(pipe.text_encoder)
    pictures = calls_of(pipe.vae.encoder)
    frozen = {"train_text_encoder": False, "train_tokens": False}
    config = settings(tmp_path, **frozen, caption_dropout=0.5, steps=4)
    concept = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert len(texts) == 2  # the caption and the empty caption
    assert len(pictures) == 3
    assert concept.info.num_tokens == 0 and not concept.embeddings
    assert list(concept.updates) == list(family_of(pipe.components).denoisers)


def test_captions_are_encoded_once_per_step_and_frozen_encoders_are_not_called(tmp_path):
    pipe = tiny_sd3()
    rows = calls_of(pipe.text_encoder, lambda args, kwargs: len(args[0]))
    rests = calls_of(pipe.text_encoder_3)
    config = settings(tmp_path, batch_size=6, steps=5)
    train(config, pipe.components, progress=False)
    assert rows[-5:] == [1] * 5
    assert len(rests) == 2


def test_class_images_are_drawn_by_the_base_without_adapters(pipe, tmp_path):
    config = settings(
        tmp_path, prior_weight=1.0, prior_count=5, validation_steps=2, steps=3, batch_size=2
    )
    prompts = calls_of(
        pipe.text_encoder, lambda args, kwargs: len(args[0] if args else kwargs["input_ids"])
    )
    before = snapshot(pipe.components, pipe.config)
    prompts.clear()
    concept = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    if family_of(pipe.components, pipe.config).token_dictionaries():
        assert prompts[-3:] == [2, 2, 2]  # the captions of concept and class
    else:
        # Frozen: class prompt and "" for generation; both captions and "" for training.
        assert prompts == [1] * 5
    assert_unchanged(before, pipe.components, pipe.config)
    (folder,) = (config.output / ".class_pictures").iterdir()
    names = [f"class-0000{i}.png" for i in range(5)]
    assert sorted(p.name for p in folder.iterdir()) == names
    plain = train(
        settings(tmp_path, "plain", steps=3),
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
    )
    assert not same(tensors(concept), tensors(plain))

    pictures = make_pictures(tmp_path / "dogs")
    config = settings(tmp_path, "given", prior_weight=1.0, prior_images=pictures, steps=2)
    train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert not (config.output / ".class_pictures").exists()


def test_class_images_of_another_prompt_are_not_used(tmp_path):
    drawn = {}
    for prompt in ("a photo of a dog", "a picture of a cat", "a photo of a dog"):
        config = settings(
            tmp_path,
            prior_weight=1.0,
            prior_count=1,
            prior_prompt=prompt,
            validation_steps=2,
            steps=1,
            resume=False,
        )
        train(config, tiny_sd().components, progress=False)
        files = sorted((config.output / ".class_pictures").rglob("*.png"))
        drawn.setdefault(prompt, {path: path.read_bytes() for path in files})
    dogs, both = drawn.values()
    assert len(dogs) == 1 and len(both) == 2 and len(set(both.values())) == 2
    assert len(files) == 2


def test_class_images_with_the_trigger_are_refused(tmp_path):
    dogs = make_pictures(tmp_path / "dogs")
    (dogs / "1.txt").write_text("a photo of <rex>")
    config = settings(tmp_path, prior_weight=1.0, prior_images=dogs)
    with pytest.raises(DataError, match=r"caption with the trigger <rex>: 1\.png"):
        train(config, {}, progress=False)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_trigger_beyond_the_encoders_length_is_refused(layerwise, tmp_path):
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    images = make_pictures(tmp_path / "images")
    (images / "1.txt").write_text("a dog " * 60 + "<rex>")
    with pytest.raises(DataError, match=r"the trigger is cut off"):
        train(settings(tmp_path, layerwise_tokens=layerwise), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    (images / "1.txt").write_text("<rex> " + "a dog " * 60)
    with pytest.warns(UserWarning, match=r"the caption .* the rest is cut off"):
        train(settings(tmp_path, steps=1), pipe.components, progress=False)
    config = settings(tmp_path, "drawn", validation_prompts=("a dog " * 60 + "<rex>",))
    with pytest.raises(DataError, match=r"the validation prompt .* the trigger is cut off"):
        train(config, pipe.components, progress=False)


def test_masked_areas_do_not_contribute_to_the_loss(tmp_path):
    """An all-white mask changes nothing; half a mask does."""
    make_pictures(tmp_path / "images")
    for name, half in (("white", 255), ("half", 0)):
        (tmp_path / name).mkdir()
        mask = np.full((32, 32), 255, np.uint8)
        mask[:, :16] = half
        for number in range(3):
            Image.fromarray(mask).save(tmp_path / name / f"{number}.png")
    pipe = tiny_sd()
    results = [
        tensors(train(settings(tmp_path, f"o{i}", steps=5, **c), pipe.components, progress=False))
        for i, c in enumerate(({}, {"masks": tmp_path / "white"}, {"masks": tmp_path / "half"}))
    ]
    assert all(torch.allclose(results[0][k], results[1][k], atol=1e-4) for k in results[0])
    assert not all(torch.allclose(results[0][k], results[2][k], atol=1e-3) for k in results[0])


def test_min_snr_and_timestep_density_change_the_result(tmp_path):
    pipe = tiny_sd(prediction="v_prediction")
    changes = (
        {},
        {"min_snr_gamma": 1.0},
        {"timestep_density": "logit_normal"},
        {"noise_offset": 0.5},
    )
    results = [
        tensors(train(settings(tmp_path, f"o{i}", steps=5, **c), pipe.components, progress=False))
        for i, c in enumerate(changes)
    ]
    assert all(not same(results[0], other) for other in results[1:])


def test_mixed_precision_keeps_the_adapter_in_float32(pipe, tmp_path):
    config = settings(tmp_path, mixed_precision="bf16", steps=5)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    before = snapshot(pipe.components, pipe.config)
    concept = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert_unchanged(before, pipe.components, pipe.config)
    learned = tensors(concept)
    assert {value.dtype for value in learned.values()} == {torch.float32}
    # Values that bfloat16 cannot represent.
    ups = [value for key, value in learned.items() if key.endswith(".up")]
    assert any(not torch.equal(up, up.bfloat16().float()) for up in ups)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    pipe = tiny_sd()
    weight = pipe.unet.conv_out.weight
    good = weight.detach().clone()

    def set_nan(done, loss):
        if done == 8:
            with torch.no_grad():
                weight.fill_(math.nan)

    config = settings(tmp_path, checkpoint_every=3)
    message = r"nan at step 9; the checkpoint of step 6 is kept.*rate"
    with pytest.raises(TrainingError, match=message):
        train(config, pipe.components, progress=False, on_step=set_nan)
    names = sorted(p.name for p in (config.output / ".checkpoints").iterdir())
    assert names == ["step-000003.safetensors", "step-000006.safetensors"]
    assert not (config.output / "concept.json").exists()
    with torch.no_grad():
        weight.copy_(good)
    resumed = train(config, pipe.components, progress=False)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(resumed).values())


def test_weights_that_are_not_finite_at_the_end_are_not_saved(tmp_path):
    pipe = tiny_sd()

    def set_nan(done, loss):
        if done == 12:
            for name, parameter in pipe.unet.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"after step 12 .* no longer finite.*learning rate"):
        train(settings(tmp_path), pipe.components, progress=False, on_step=set_nan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_photographs_are_shrunk_on_reading_and_freed(where, tmp_path, monkeypatch):
    images, sizes, alive = [], [], []
    read = dataset.read_training_images

    def record(*args, **kwargs):
        samples = read(*args, **kwargs)
        sizes.extend(sample.image.size for sample in samples)
        images.extend(weakref.ref(sample.image) for sample in samples)
        return samples

    def inspect_step(done, loss):
        gc.collect()
        alive.append(sum(image() is not None for image in images))

    monkeypatch.setattr(dataset, "read_training_images", record)
    dogs = make_pictures(tmp_path / "dogs", 2)
    (tmp_path / "images").mkdir()
    picture(0, side=300).save(tmp_path / "images" / "0.png")
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "base")
    config = settings(
        tmp_path, base=str(tmp_path / "base"), steps=2, prior_weight=1.0, prior_images=dogs
    )
    components = pipe.components if where == "memory" else None
    train(config, components, progress=False, on_step=inspect_step)
    assert sizes == [(32, 32)] * 3 and alive == [0, 0]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("make", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
def test_unneeded_models_are_freed(make, live, tmp_path, monkeypatch):
    parts, freed = {}, []
    load_pipeline = prepare_base.load_pipeline

    def record(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        modules = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
        parts.update({key: weakref.ref(module) for key, module in modules.items()})
        return pipe

    def inspect_step(done, loss):
        gc.collect()
        freed.append({key for key, part in parts.items() if part() is None})

    monkeypatch.setattr(prepare_base, "load_pipeline", record)
    make().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    config = settings(tmp_path, base=base, steps=1, train_tokens=live, train_text_encoder=live)
    train(config, progress=False, on_step=inspect_step)
    trained = family_of(make().components).text_encoders if live else {}
    assert freed == [set(parts) - {"unet", "transformer", "transformer_2"} - set(trained)]


def test_a_finished_concept_is_loaded_and_not_replaced_silently(tmp_path):
    pipe = tiny_sd()
    config = settings(tmp_path, checkpoint_every=6)
    first = train(config, pipe.components, progress=False)
    again = train(config, {}, progress=False)  # no model is needed
    assert same(tensors(first), tensors(again))

    other = settings(tmp_path, learning_rate=5e-3)
    with pytest.raises(SettingsError, match=r"learning_rate was 0.01 and is 0.005"):
        train(other, pipe.components, progress=False)
    assert same(tensors(load_concept(config.output)), tensors(first))

    anew = settings(tmp_path, learning_rate=5e-3, resume=False)
    assert not same(tensors(train(anew, pipe.components, progress=False)), tensors(first))


def test_settings_missing_in_a_finished_concept_have_their_defaults(tmp_path):
    pipe = tiny_sd()
    config = settings(tmp_path, steps=1)
    learned = train(config, pipe.components, progress=False)
    training = learned.info.training
    old = {k: v for k, v in training["settings"].items() if k not in ("buckets", "quantize")}
    info = learned.info.model_copy(update={"training": training | {"settings": old}})
    shutil.rmtree(config.output)
    save_concept(Concept(info, learned.updates, learned.embeddings), config.output)
    assert same(tensors(train(config, {}, progress=False)), tensors(learned))
    with pytest.raises(SettingsError, match=r"other settings: buckets was False and is True \("):
        train(settings(tmp_path, steps=1, buckets=True), pipe.components, progress=False)


def test_another_concept_or_other_files_in_the_output_are_refused_before_loading(tmp_path):
    train(settings(tmp_path, steps=1), tiny_sd().components, progress=False)
    with pytest.raises(StorageError, match="rex"):
        train(settings(tmp_path, name="tom", base="no/such base"), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="other files"):
        train(settings(tmp_path, "full"), progress=False)


def test_an_interrupted_replacing_run_resumes(tmp_path):
    pipe = tiny_sd()
    train(settings(tmp_path), pipe.components, progress=False)
    changes = {"learning_rate": 5e-3, "checkpoint_every": 4}
    with pytest.raises(Stop):
        config = settings(tmp_path, resume=False, **changes)
        train(config, pipe.components, progress=False, on_step=crash_at(6))
    steps = []
    config = settings(tmp_path, **changes)
    second = train(config, pipe.components, progress=False, on_step=lambda n, _: steps.append(n))
    assert steps[0] == 5
    whole = train(settings(tmp_path, "whole", **changes), pipe.components, progress=False)
    assert same(tensors(second), tensors(whole))
    assert same(tensors(train(config, {}, progress=False)), tensors(whole))


def test_a_run_interrupted_before_saving_still_draws_its_images(tmp_path):
    pipe = tiny_sd()
    config = settings(
        tmp_path, checkpoint_every=6, validation_prompts=("a photo of <rex>",), validation_steps=1
    )
    first = train(config, pipe.components, progress=False)
    sample = (config.output / "sample-1.png").read_bytes()
    for path in config.output.iterdir():
        if path.is_file():
            path.unlink()
    second = train(config, pipe.components, progress=False)
    assert same(tensors(first), tensors(second))
    assert (config.output / "sample-1.png").read_bytes() == sample


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    pipe = tiny_sd()
    config = settings(tmp_path, checkpoint_every=4)
    with pytest.raises(Stop):
        train(config, pipe.components, progress=False, on_step=crash_at(5))
    picture(9).save(tmp_path / "images" / "9.png")
    other = settings(tmp_path, checkpoint_every=4, rank=2)
    message = r"rank was 4 and is 2; the images have changed: 9\.png is new"
    with pytest.raises(SettingsError, match=message):
        train(other, pipe.components, progress=False)
    anew = settings(tmp_path, checkpoint_every=4, rank=2, resume=False)
    assert train(anew, pipe.components, progress=False).info.rank == 2


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"resolution": 36}, ConfigError, "multiple of 8"),
        ({"rank": 17}, ConfigError, "17"),
        (
            {"validation_prompts": ("a <rex>",), "validation_steps": 900},
            ConfigError,
            "500 noise levels, fewer than 900",
        ),
        ({"images": "/no/such/folder"}, DataError, "cannot be read"),
        ({"mixed_precision": "fp16"}, ConfigError, "not supported on the CPU"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"tracker": "aim"}, ConfigError, "aim is not installed"),
    ],
)
def test_invalid_settings_leave_the_model_unchanged(changes, error, match, tmp_path):
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(num_train_timesteps=500)
    before = snapshot(pipe.components)
    with pytest.raises(error, match=match):
        train(settings(tmp_path, **changes), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    assert not (tmp_path / "out").exists()


def test_min_snr_is_refused_for_flow_matching(tmp_path):
    pipe = tiny_sd3()
    before = snapshot(pipe.components)
    with pytest.raises(ConfigError, match="min-SNR"):
        train(settings(tmp_path, min_snr_gamma=5.0), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)


def test_unusable_bases_are_refused(tmp_path):
    with pytest.raises(PipelineError, match="cannot be loaded"):
        train(settings(tmp_path, base=str(tmp_path / "nothing")), progress=False)
    with pytest.raises(ConfigError, match="no such file"):
        train(settings(tmp_path, base="model.safetensors"), progress=False)
    with pytest.raises(PipelineError, match="no known model family"):
        train(settings(tmp_path), {"vae": tiny_sd().vae}, progress=False)
    pipe = tiny_sd()
    pipe.unet._hf_hook = object()
    with pytest.raises(PipelineError, match="offloaded"):
        train(settings(tmp_path), pipe.components, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
def test_a_base_from_a_folder_gives_the_result_of_its_components(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    loaded = train(settings(tmp_path, "a", base=base, steps=3), progress=False)
    in_memory = train(
        settings(tmp_path, "b", base=base, steps=3),
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
    )
    assert same(tensors(loaded), tensors(in_memory))


def test_the_learning_rate_factor_follows_the_schedule():
    assert [learning_rate_factor(s, 10, 4, "constant") for s in (0, 1, 3, 4, 9)] == [
        0.25,
        0.5,
        1,
        1,
        1,
    ]
    assert learning_rate_factor(7, 10, 4, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(7, 10, 4, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(9, 10, 0, "linear") == pytest.approx(0.1)


def test_training_facts_are_plain_json(tmp_path):
    concept = train(settings(tmp_path, steps=2), tiny_sd().components, progress=False)
    assert json.loads(json.dumps(concept.info.training)) == concept.info.training


def test_words_of_all_captions_are_recorded(tmp_path):
    config = settings(tmp_path, steps=1, caption="a photo of {}, a dog in a hat")
    concept = train(config, tiny_sd().components, progress=False)
    assert concept.info.class_word == "dog"
    assert concept.info.training["captions_share"] == ["hat"]


def test_a_second_run_into_a_folder_in_use_is_refused(tmp_path):
    pipe, second, refusals = tiny_sd(), tiny_sd(), []

    def run(parts):
        with pytest.raises(StorageError) as caught:
            train(settings(tmp_path, learning_rate=5e-3), parts, progress=False)
        refusals.append(str(caught.value))

    def on_step(step, loss):
        if step == 3:  # in another thread, and in this one
            thread = threading.Thread(target=run, args=(second.components,))
            thread.start()
            thread.join()
            run(second.components)

    concept = train(settings(tmp_path), pipe.components, progress=False, on_step=on_step)
    assert len(refusals) == 2
    assert all("another run writes to this folder" in message for message in refusals)
    assert same(tensors(load_concept(tmp_path / "out")), tensors(concept))
    assert not list(tmp_path.glob(".*"))
