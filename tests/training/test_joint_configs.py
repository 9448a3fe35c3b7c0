"""Several concepts in one run: their sum, batches, preservation, checkpoints and settings."""

import collections
import itertools
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import customize
from customize.concepts.concept_info import BasisInfo
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.read_concept import load_concept
from customize.concepts.slices.slice_reservations import read_reservations
from customize.core.bases import hashed_block, shared_columns
from customize.core.lowrank import to_dense
from customize.errors import ConfigError, DataError, SettingsError, StorageError
from customize.families import family_of
from customize.training import class_preservation
from customize.training.data.batches import compose_batch
from customize.training.joint_configs import PER_CONCEPT_SETTINGS, load_configs
from customize.training.recipe import train, train_jointly
from customize.training.trainable import attach_trainable
from tests.recording import record_in_one_step
from tests.tiny import tiny_sd, tiny_sdxl
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import (
    Stop,
    assert_unchanged,
    crash_at,
    make_pictures,
    make_various,
    picture,
    same,
    settings,
    snapshot,
    tensors,
)

ALL = {"class_text": 1.0, "context_text": 0.5, "output": 0.25}
BUSY = {"checkpoint_every": 4, "flip": True, "caption_dropout": 0.3, "batch_size": 3}


def two_configs(folder, rex=None, tom=None, **changes):
    """Return settings of a dog and a cat with separate images and output folders."""
    cat = {"name": "tom", "class_word": "cat", "output": folder / "tom"} | (tom or {})
    cats = folder / "cats"
    if not cats.exists():
        cats.mkdir(parents=True)
        for number in range(2):
            picture(number + 7).transpose(1).save(cats / f"{number}.png")
    dog = {"output": folder / "rex"} | (rex or {})
    values = [changes | dog, changes | {"images": cats} | cat]
    return [settings(folder, **changes) for changes in values]


def learn(pipe, configs, **more):
    return train_jointly(
        configs, pipe.components, progress=False, pipeline_config=pipe.config, **more
    )


def predict(pipe, prompt):
    """Return the prediction for a prompt with expanded triggers."""
    family = family_of(pipe.components, pipe.config)
    with torch.no_grad():
        mean, _ = family.encode_images(torch.zeros(1, 3, 32, 32))
        noisy = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        t = family.timesteps(torch.tensor([0.4]), mean.shape[1:])
        return family.predict(noisy, t, family.encode_prompts([prompt]))


@pytest.mark.parametrize("method", ["orthogonal", "lora"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "qwen_image"])
def test_the_sum_of_the_concepts_equals_the_trained_model(kind, method, tmp_path):
    pipe = TINY_FAMILIES[kind]()
    before = snapshot(pipe.components, pipe.config)
    tokens = bool(family_of(pipe.components, pipe.config).token_dictionaries())
    prompt = "<rex> <rex>_1 beside <tom> <tom>_1" if tokens else "<rex> beside <tom>"
    configs = two_configs(tmp_path, method=method, steps=6, rank=3)
    of_run = []

    def check_gradients(done, loss):
        if done == 6:
            of_run.append(predict(pipe, prompt))
            denoiser = family_of(pipe.components, pipe.config).denoiser
            of_run.append(
                {
                    name: sum(layer.get_delta_weight(one) for one in layer.active_adapters)
                    for name, layer in denoiser.named_modules()
                    if hasattr(layer, "get_delta_weight")
                }
            )

    rex, tom = learn(pipe, configs, on_step=check_gradients)
    assert_unchanged(before, pipe.components, pipe.config)
    drawn, changes = of_run
    key = family_of(pipe.components, pipe.config).denoiser_key
    assert set(changes) == set(rex.updates[key])
    for name, change in changes.items():
        whole = to_dense(rex.updates[key][name]) + to_dense(tom.updates[key][name])
        torch.testing.assert_close(whole, change.detach(), atol=1e-6, rtol=1e-5)

    base = predict(pipe, prompt)
    if not tokens:  # a prompt with unknown tokens would be another prompt
        assert not torch.allclose(base, drawn, atol=1e-4)
    customize.load_custom(pipe, tmp_path / "tom", tmp_path / "rex", merge="sum")
    torch.testing.assert_close(predict(pipe, prompt), drawn, atol=2e-5, rtol=1e-4)
    customize.load_custom(pipe, weights={"rex": 1.0, "tom": 0.0})
    assert not torch.allclose(predict(pipe, prompt), drawn, atol=1e-4)
    customize.unload_custom(pipe)
    # Each has changed, and is an ordinary concept by itself.
    for concept, name in ((rex, "rex"), (tom, "tom")):
        ups = [update.up for updates in concept.updates.values() for update in updates.values()]
        assert sum(float(up.abs().max()) > 0 for up in ups) > 0.8 * len(ups)
        assert same(tensors(load_concept(tmp_path / name)), tensors(concept))
        customize.load_custom(pipe, tmp_path / name)
        customize.unload_custom(pipe)


def test_concepts_record_the_other_concepts_of_the_run(tmp_path):
    configs = two_configs(tmp_path, tom={"trigger": "<kitty>", "caption": "a {} in a hat"}, steps=2)
    rex, tom = learn(tiny_sd(), configs)
    assert (rex.info.trained_with, tom.info.trained_with) == (["tom"], ["rex"])
    assert (rex.info.class_word, tom.info.class_word, tom.info.trigger) == ("dog", "cat", "<kitty>")
    others = rex.info.training["settings"]["together"]
    assert others["tom"]["trigger"] == "<kitty>" and others["tom"]["caption"] == "a {} in a hat"
    assert tom.info.training["settings"]["together"]["rex"]["class_word"] == "dog"
    assert tom.info.training["captions_share"] == ["hat"]
    assert rex.info.training["captions_share"] == []
    card = (tmp_path / "tom" / "README.md").read_text()
    assert "| Learned together with | rex: load all of them" in card
    alone = train(settings(tmp_path, "alone", steps=1), tiny_sd().components, progress=False)
    assert "learned_with" not in alone.info.training and "together" not in json.dumps(
        alone.info.training
    )
    assert "together" not in (tmp_path / "alone" / "README.md").read_text()


def test_the_order_of_concepts_does_not_change_the_result(tmp_path):
    first = learn(tiny_sd(), two_configs(tmp_path / "a", steps=4, batch_size=3))
    second = learn(tiny_sd(), two_configs(tmp_path / "b", steps=4, batch_size=3)[::-1])
    assert [c.info.name for c in first] == ["rex", "tom"]
    assert [c.info.name for c in second] == ["tom", "rex"]
    for a, b in zip(first, second[::-1], strict=True):
        assert same(tensors(a), tensors(b))


def test_a_single_concept_is_learned_as_by_train(tmp_path):
    (together,) = learn(tiny_sd(), [settings(tmp_path, "a", steps=4)])
    alone = train(settings(tmp_path, "b", steps=4), tiny_sd().components, progress=False)
    assert same(tensors(together), tensors(alone))
    with_tom, _ = learn(tiny_sd(), two_configs(tmp_path / "c", steps=4))
    assert not same(tensors(with_tom), tensors(alone))


# --- batches --------------------------------------------------------------------------------------


def drawn(config, counts, turns, classes=(), groups=()):
    """Compose a batch with captions by concept, "2.0" for the first image of the third."""
    owned = [*counts, *classes]
    names = [f"{owner}.{number}" for owner, count in enumerate(owned) for number in range(count)]
    ends = itertools.accumulate(owned, initial=0)
    ranges = [range(start, end) for start, end in itertools.pairwise(ends)]
    split = len(counts)
    return [
        compose_batch(config, names, ranges[:split], ranges[split:], turn, groups)[2]
        for turn in range(turns)
    ]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 12),
    st.booleans(),
)
def test_batches_contain_equally_many_images_of_all_concepts(
    tmp_path_factory, counts, size, turns, more
):
    config = settings(tmp_path_factory.getbasetemp() / "shares", batch_size=size)
    classes = [2] * len(counts) if more else []
    batches = drawn(config, counts, turns, classes)
    # One half of each batch has concept images, the other class images.
    assert all(len(batch) == size * (2 if more else 1) for batch in batches)
    seen = collections.Counter(name.split(".")[0] for batch in batches for name in batch[:size])
    shares = [seen[str(owner)] for owner in range(len(counts))]
    assert sum(shares) == size * turns and max(shares) - min(shares) <= 1
    for owner, count in enumerate(counts):
        names = [n for batch in batches for n in batch[:size] if n.startswith(f"{owner}.")]
        for first in range(0, len(names) - count + 1, count):
            assert len(set(names[first : first + count])) == count
    for batch in batches:
        concepts, their_classes = ([int(n.split(".")[0]) for n in h] for h in (batch, batch[size:]))
        if more:
            assert [owner - len(counts) for owner in their_classes] == concepts[:size]


@given(st.integers(2, 3), st.integers(1, 4), st.lists(st.integers(0, 1), min_size=2, max_size=5))
def test_with_buckets_concepts_alternate_by_batch(tmp_path_factory, among, size, sizes):
    config = settings(tmp_path_factory.getbasetemp() / "sizes", batch_size=size, buckets=True)
    counts, groups = [len(sizes)] * among, sizes * among
    batches = drawn(config, counts, among * len(sizes), groups=groups)
    owners = [{int(name.split(".")[0]) for name in batch} for batch in batches]
    assert owners == [{turn % among} for turn in range(len(batches))]
    assert all(len({sizes[int(name.split(".")[1])] for name in batch}) == 1 for batch in batches)
    seen = collections.Counter(name for batch in batches for name in batch)
    assert set(seen.values()) == {size} and len(seen) == sum(counts)


def test_a_step_has_images_of_both_concepts(tmp_path):
    """A batch of two has an image of each concept, and both train each adapter."""
    pipe = tiny_sd()
    prompts = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda _, args: prompts.append(pipe.tokenizer.batch_decode(args[0]))
    )
    learn(pipe, two_configs(tmp_path, steps=3))
    hook.remove()
    for step in prompts[-3:]:
        assert len(step) == 2 and "<rex>" in step[0] and "<tom>" in step[1]


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def test_buckets_masks_and_class_images_of_both_concepts(make, tmp_path):
    make_various(tmp_path / "dogs")
    configs = two_configs(
        tmp_path,
        rex={
            "images": tmp_path / "dogs" / "images",
            "masks": tmp_path / "dogs" / "masks",
            "prior_images": make_pictures(tmp_path / "other dogs"),
        },
        tom={"prior_prompt": "a picture of a cat", "prior_count": 2},
        buckets=True,
        prior_weight=0.5,
        validation_steps=2,
        steps=6,
    )
    losses = []
    learn(make(), configs, on_step=lambda _, loss: losses.append(float(loss)))
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
    assert not (tmp_path / "rex" / ".class_pictures").exists()
    assert len(list((tmp_path / "tom" / ".class_pictures").rglob("*.png"))) == 2


def test_class_images_of_one_class_are_drawn_once(tmp_path):
    changes = {"prior_weight": 1.0, "validation_steps": 2, "steps": 2}
    dogs = {"class_word": "dog", "prior_count": 3}
    learn(tiny_sd(), two_configs(tmp_path, {"prior_count": 2}, dogs, **changes))
    assert len(list((tmp_path / "rex" / ".class_pictures").rglob("*.png"))) == 3
    assert not (tmp_path / "tom" / ".class_pictures").exists()
    named = make_pictures(tmp_path / "named")
    (named / "1.txt").write_text("a photo of <rex>")
    configs = two_configs(tmp_path / "b", tom={"prior_images": named}, prior_weight=1.0)
    with pytest.raises(DataError, match=r"caption with the trigger <rex>: 1\.png"):
        learn(tiny_sd(), configs)


# --- preservation ---------------------------------------------------------------------------------


@pytest.fixture
def attach_both(tmp_path):
    """Two attached, changed concepts, and a function for their preservation targets."""

    @contextmanager
    def attached(**changes):
        configs = two_configs(tmp_path, preserve=ALL, **changes)
        family = family_of(tiny_sd().components)
        family.components["text_encoder"].requires_grad_(False)
        with (
            attach_trainable(family, configs, [0, 1], BasisInfo(), {}) as trainable,
            torch.no_grad(),
        ):
            generator = torch.Generator().manual_seed(0)
            for parameter in trainable.named_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

            def encode(texts):
                return family.encode_prompts([trainable.expand_triggers(text) for text in texts])

            def prepared(configs, captions=(), **preserve):
                changed = [c.model_copy(update={"preserve": preserve}) for c in configs]
                return class_preservation.compute_preservation_targets(
                    changed, family, trainable, encode, captions
                )

            yield configs, family, trainable, prepared

    return attached


def test_class_text_is_the_mean_over_concepts(attach_both):
    phrases = ("a photo of {}", "{} beside <tom>")
    with attach_both(rex={"preserve_phrases": phrases}) as (configs, family, trainable, prepared):
        (dictionary,) = family.token_dictionaries()

        def pooled(text):
            ids = dictionary.tokenizer(
                trainable.expand_triggers(text), return_tensors="pt"
            ).input_ids
            return dictionary.text_encoder(ids).last_hidden_state[0, -1]

        expected = []
        for named, plain in (
            ("a photo of <rex>", "a photo of a dog"),
            ("<rex> beside <tom>", "a dog beside a cat"),
            # One phrase of a concept has the weight of two of the other.
            *[("a photo of <tom>", "a photo of a cat")] * 2,
        ):
            ours = pooled(named)
            with trainable.adapters_disabled():
                base = pooled(plain)
            expected.append(1 - F.cosine_similarity(ours, base, dim=0))
        actual = (
            prepared(configs, class_text=1.0).text_loss(0)
            / class_preservation.PRESERVATION_INTERVAL
        )
        torch.testing.assert_close(actual, torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)
        assert actual > 1e-3


@pytest.mark.parametrize("pooling", ["end", "published"])
def test_joint_text_losses_are_the_mean_of_the_single_losses(pooling, attach_both):
    with attach_both(preserve_pooling=pooling) as (configs, _, _, prepared):
        for step in (0, 5 * class_preservation.PRESERVATION_INTERVAL):
            for loss in ("class_text", "context_text"):
                together = prepared(configs, **{loss: 1.0}).text_loss(step)
                alone = [prepared([config], **{loss: 1.0}).text_loss(step) for config in configs]
                torch.testing.assert_close(together, sum(alone) / 2, atol=1e-5, rtol=1e-4)
                assert abs(alone[0] - alone[1]) > 1e-4


def test_captions_are_compared_with_the_classes_of_all_their_concepts(attach_both):
    with attach_both() as (configs, _, _, prepared):
        captions = ["a photo of <rex>", "<tom> and <rex> on a beach", "a photo of <tom>"]
        preserved = prepared(configs, captions, output=1.0)
        expected = ["a photo of a dog", "a cat and a dog on a beach", "a photo of a cat"]
        with_class_words = class_preservation.with_class_words
        assert [with_class_words(configs, caption) for caption in captions] == expected
        assert list(preserved.conditions) == [*expected, ""]


def test_captions_with_both_triggers_can_be_preserved(tmp_path):
    (tmp_path / "cats").mkdir()
    picture(3).save(tmp_path / "cats" / "0.png")
    (tmp_path / "cats" / "0.txt").write_text("<tom> and <rex> on a beach")
    pipe = tiny_sd()
    before = snapshot(pipe.components, pipe.config)
    rex, tom = learn(pipe, two_configs(tmp_path, preserve=ALL, layerwise_tokens=True, steps=7))
    assert_unchanged(before, pipe.components, pipe.config)
    assert rex.info.token_layers == tom.info.token_layers == 7
    assert tom.info.training["captions_share"] == ["beach"]


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [False, True])
def test_a_resumed_run_gives_the_uninterrupted_result(library, tmp_path):
    def configs(folder):
        shelf = {"library": tmp_path / folder} if library else {}
        busy = {**BUSY, "checkpoint_every": 3, "steps": 7}
        return two_configs(tmp_path / folder, preserve=ALL, **busy, **shelf)

    pipe = tiny_sd()
    before = snapshot(pipe.components, pipe.config)
    whole = learn(pipe, configs("whole"))
    with pytest.raises(Stop):
        learn(pipe, configs("cut"), on_step=crash_at(5))
    assert_unchanged(before, pipe.components, pipe.config)
    assert {claim.name for claim in read_reservations(tmp_path / "cut")} == {"rex", "tom"}
    steps = []
    resumed = learn(pipe, configs("cut")[::-1], on_step=lambda done, _: steps.append(done))
    assert steps == [4, 5, 6, 7]
    for a, b in zip(whole, resumed[::-1], strict=True):
        assert same(tensors(a), tensors(b)) and a.info.slices == b.info.slices
    assert read_reservations(tmp_path / "cut") == []

    again = train_jointly(configs("cut"), {}, progress=False)  # no model is needed
    assert [c.info.name for c in again] == ["rex", "tom"]
    assert all(same(tensors(a), tensors(b)) for a, b in zip(whole, again, strict=True))


def test_a_checkpoint_of_other_concepts_or_settings_is_refused(tmp_path):
    pipe = tiny_sd()
    with pytest.raises(Stop):
        learn(pipe, two_configs(tmp_path, **BUSY), on_step=crash_at(6))
    ace = settings(tmp_path, "ace", name="ace", **BUSY)
    refusals = [
        (
            two_configs(tmp_path, **{**BUSY, "learning_rate": 5e-3}),
            "learning_rate was 0.01 and is 0.005",
        ),
        (
            two_configs(tmp_path, tom={"class_word": "pet"}, **BUSY),
            "tom's class_word was 'cat' and is",
        ),
        (
            two_configs(tmp_path, {"caption": "my {}"}, **BUSY),
            "step 4 .* caption was .* is 'my {}'",
        ),
        ([*two_configs(tmp_path, **BUSY)[:1]], "together with it were tom and are none"),
        (
            [*two_configs(tmp_path, **BUSY), settings(tmp_path, "zoe", name="zoe", **BUSY)],
            "tom, zoe",
        ),
        ([ace, *two_configs(tmp_path, **BUSY)], "a checkpoint of another run with rex"),
    ]
    for configs, message in refusals:
        with pytest.raises(SettingsError, match=message):
            learn(pipe, configs)
    extra = make_pictures(tmp_path / "cats", 3)
    with pytest.raises(SettingsError, match=r"tom's images have changed: 2\.png is new"):
        learn(pipe, two_configs(tmp_path, tom={"images": extra}, **BUSY))


def test_finished_concepts_are_not_replaced_silently(tmp_path):
    pipe = tiny_sd()
    first = learn(pipe, two_configs(tmp_path, steps=3))
    for configs, message in (
        (
            two_configs(tmp_path, tom={"class_word": "pet"}, steps=3),
            "rex is already finished.*tom's class_",
        ),
        (two_configs(tmp_path, steps=4), "steps was 3 and is 4"),
        (two_configs(tmp_path, steps=3)[:1], "learned together with it were tom and are none"),
    ):
        with pytest.raises(SettingsError, match=message):
            learn(pipe, configs)
    # A concept of a single run does not belong to the joint run.
    train(settings(tmp_path, "alone/tom", name="tom", steps=3), pipe.components, progress=False)
    configs = two_configs(
        tmp_path, {"output": tmp_path / "new"}, {"output": tmp_path / "alone/tom"}, steps=3
    )
    with pytest.raises(SettingsError, match="tom is already finished"):
        learn(pipe, configs)
    # If one of the two is missing, the run is repeated for both.
    shutil.rmtree(tmp_path / "tom")
    again = learn(pipe, two_configs(tmp_path, steps=3))
    assert all(same(tensors(a), tensors(b)) for a, b in zip(first, again, strict=True))
    anew = learn(pipe, two_configs(tmp_path, steps=4, resume=False))
    assert not same(tensors(anew[1]), tensors(first[1]))


def test_a_run_that_could_not_save_all_concepts_resumes_saving(tmp_path):
    """The folder of the second concept is in use after the first was saved."""
    pipe, (rex, tom) = tiny_sd(), two_configs(tmp_path, steps=4, checkpoint_every=4)
    whole = learn(pipe, two_configs(tmp_path / "whole", steps=4, checkpoint_every=4))

    def block_folder(done, loss):
        if done == 4:
            (tom.output / "notes.doc").write_text("")

    with pytest.raises(StorageError, match="the folder holds other files"):
        learn(pipe, [rex, tom], on_step=block_folder)
    assert (rex.output / "concept.json").exists() and not (tom.output / "concept.json").exists()
    (tom.output / "notes.doc").unlink()
    steps = []
    concepts = learn(pipe, [rex, tom], on_step=lambda done, _: steps.append(done))
    assert steps == []
    assert all(same(tensors(a), tensors(b)) for a, b in zip(whole, concepts, strict=True))


def test_a_run_without_a_checkpoint_leaves_no_files(tmp_path):
    configs = two_configs(tmp_path, library=tmp_path, **BUSY)
    with pytest.raises(Stop):
        learn(tiny_sd(), configs, on_step=crash_at(2))
    assert not (tmp_path / "rex").exists() and not (tmp_path / "tom").exists()
    assert read_reservations(tmp_path) == []


# --- slices ---------------------------------------------------------------------------------------


def columns_in_common(a, b):
    return [shared_columns(a.info.slices[width], b.info.slices[width]) for width in a.info.slices]


def test_slices_of_a_library_are_disjoint(tmp_path):
    pipe, library = tiny_sd(), tmp_path / "library"
    old = settings(tmp_path, name="old", library=library, output=library / "old", steps=1)
    others = [train(old, pipe.components, progress=False)]
    outputs = [{"output": library / name} for name in ("rex", "tom")]
    # The requested index is used, and the other concept gets another.
    outputs[1]["slice"] = 1
    others += learn(pipe, two_configs(tmp_path, *outputs, library=library, steps=1))
    assert [c.info.slices["16"][0] // 4 for c in others] == [0, 2, 1]
    for number, a in enumerate(others):
        for b in others[:number]:
            assert columns_in_common(a, b) == [(), ()]


def test_names_with_equal_hashed_slices_get_disjoint_slices(tmp_path):
    def overlaps(name, width):
        return hashed_block(name, width, 4) == hashed_block("rex", width, 4)

    names = [f"n{number}" for number in range(200)]
    narrow = next(name for name in names if overlaps(name, 16) and not overlaps(name, 32))
    apart = next(name for name in names if not overlaps(name, 16) and not overlaps(name, 32))
    for name in (narrow, apart):
        changes = {"name": name, "output": tmp_path / name}
        rex, other = learn(
            tiny_sd(), two_configs(tmp_path, {"output": tmp_path / f"{name}-rex"}, changes)
        )
        assert columns_in_common(rex, other) == [(), ()]
        first, second = sorted((rex, other), key=lambda concept: concept.info.name)
        for width, columns in first.info.slices.items():
            assert tuple(columns) == hashed_block(first.info.name, int(width), 4)
        is_hashed = all(
            tuple(columns) == hashed_block(second.info.name, int(width), 4)
            for width, columns in second.info.slices.items()
        )
        assert is_hashed is (name == apart)
        chosen = second.info.training["settings"]["slice"]
        assert (chosen is None) is (name == apart)


# --- written files ------------------------------------------------------------------------------


def test_concepts_have_their_own_validation_images_and_recordings(tmp_path, monkeypatch):
    record_in_one_step(monkeypatch)
    pipe = tiny_sd()
    configs = two_configs(
        tmp_path,
        {"validation_prompts": ("<rex> and <tom>",)},
        {"validation_prompts": ("<tom>", "a cat"), "validation_every": 2},
        validation_steps=2,
        steps=4,
        record_inputs=True,
        num_shared_directions=4,
    )
    rex, tom = learn(pipe, configs)
    assert rex.info.basis == tom.info.basis and rex.info.basis.shared_directions
    assert columns_in_common(rex, tom) == [(), ()]
    shown = {name: sorted((tmp_path / name).rglob("*.png")) for name in ("rex", "tom")}
    assert [p.name for p in shown["rex"]] == ["sample-1.png", "step-4.png"]
    assert [p.name for p in shown["tom"]] == [
        *("sample-1.png", "sample-2.png", "step-2.png", "step-4.png")
    ]
    # The layer inputs of each concept alone.
    for name in ("rex", "tom"):
        recorded = LayerInputs.load(layer_inputs_path(tmp_path / name))
        other = customize.record_inputs(pipe, tmp_path / name)
        for kind in ("concept", "generic"):
            for component, layers in getattr(recorded, kind).items():
                for module, rows in layers.items():
                    again = getattr(other, kind)[component][module]
                    torch.testing.assert_close(rows.T @ rows, again.T @ again, atol=3e-3, rtol=0)


# --- settings -------------------------------------------------------------------------------------


def test_all_joint_config_problems_are_reported_at_once(tmp_path):
    rex, tom = two_configs(tmp_path)
    for configs, *messages in (
        (
            [rex, two_configs(tmp_path, rank=2, steps=5, seed=1)[1]],
            "3 settings",
            "rank",
            "steps",
            "seed",
        ),
        ([rex, tom, two_configs(tmp_path, rank=2)[1]], "name is 'tom'", "rank belongs to the run"),
        (two_configs(tmp_path, tom={"trigger": "<rex>"}), "trigger is '<rex>' for two concepts"),
        (two_configs(tmp_path, {"slice": 1}, {"slice": 1}), "slice is 1 for two concepts"),
        (
            two_configs(tmp_path, tom={"output": tmp_path / "rex"}),
            "neither folder may be inside the other",
        ),
        (two_configs(tmp_path, tom={"output": tmp_path / "rex" / "x"}), "may be inside the other"),
        (
            two_configs(tmp_path, tom={"class_word": "<rex> cat"}),
            "of tom has the trigger of rex",
        ),
        ([], "no concept to learn"),
    ):
        with pytest.raises(ConfigError) as caught:
            train_jointly(configs, {}, progress=False)
        assert all(text in str(caught.value) for text in messages), str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cats", "images"]
    assert set(type(rex).model_fields) >= PER_CONCEPT_SETTINGS


def test_other_files_inherit_shared_settings_of_the_first(tmp_path):
    rex, tom = tmp_path / "rex.yaml", tmp_path / "tom.yaml"
    rex.write_text(
        "{base: b, images: r, output: o/rex, name: rex, class_word: dog, rank: 4, slice: 2,"
        " caption: 'my {}', prior_weight: 1}"
    )
    tom.write_text("{images: t, output: o/tom, name: tom, class_word: cat, prior_count: 7}")
    first, second = load_configs(rex, [tom], steps="5", token_init="red")
    assert (second.base, second.rank, second.steps, second.prior_weight) == ("b", 4, 5, 1.0)
    assert (first.caption, second.caption, second.slice) == ("my {}", "a photo of {}", None)
    assert (first.token_init, second.token_init) == ("red", "random")
    assert (first.prior_count, second.prior_count) == (100, 7)
    tom.write_text("{images: t, output: o/tom, name: tom, class_word: cat, rank: 8, steps: 9}")
    with pytest.raises(ConfigError, match=r"rank belongs .* is 4 for rex and 8 for tom"):
        load_configs(rex, [tom], steps=5)
    assert load_configs(rex, [tom], steps=5, rank=8)[1].steps == 5
    tom.write_text("{nme: tom}")
    with pytest.raises(ConfigError, match=r"'nme' is not a setting(.|\n)*tom\.yaml"):
        load_configs(rex, [tom])
    assert load_configs(rex, [])[0].name == "rex"
