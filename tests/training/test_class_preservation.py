"""Preservation losses against their formulas, and their gradients."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTextModel

from customize.concepts.concept_info import BasisInfo
from customize.core.preservation.distances import cosine_distance
from customize.errors import ConfigError, DataError, SettingsError
from customize.families import family_of
from customize.training import class_preservation
from customize.training.data.captions import replace_trigger
from customize.training.recipe import train
from customize.training.trainable import attach_trainable
from tests.tiny import tiny_flux, tiny_qwen_image, tiny_sd, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.tiny_video import tiny_wan
from tests.training.runs import (
    Stop,
    assert_unchanged,
    crash_at,
    make_pictures,
    same,
    settings,
    snapshot,
    tensors,
)

pytestmark = pytest.mark.usefixtures("short_padding")

WITH_CLIP = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
OTHERS = {
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
    "wan": lambda: tiny_wan("2.2-14b"),
}
EVERY = class_preservation.PRESERVATION_INTERVAL
ALL = {"class_text": 1.0, "context_text": 0.5, "output": 0.25, "context_output": 0.5}


class Kept:
    """A model in training with preservation targets, and changed tokens and adapters."""

    def __init__(self, stack, folder, make=tiny_sd, moved=True, **changes):
        changes = {"preserve": {"class_text": 1.0}} | changes
        self.config = settings(folder, **changes)
        self.family = family_of(make().components)
        for part in self.family.adaptable.values():
            part.requires_grad_(False)
        self.trainable = stack.enter_context(
            attach_trainable(self.family, [self.config], [None], BasisInfo(), {})
        )
        self.preserved = self.prepare()
        if moved:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in self.trainable.named_parameters().values():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def prepare(self):
        def encode(captions):
            return self.family.encode_prompts([self.trainable.expand_triggers(c) for c in captions])

        return class_preservation.compute_preservation_targets(
            [self.config], self.family, self.trainable, encode, ["a photo of <rex>"]
        )

    def gradients(self, step=0):
        self.preserved.text_loss(step).backward()
        return {
            name: float(parameter.grad.abs().max()) if parameter.grad is not None else 0.0
            for name, parameter in self.trainable.named_parameters().items()
        }


@pytest.fixture
def start_run(tmp_path):
    with ExitStack() as stack:
        yield lambda **changes: Kept(stack, tmp_path, **changes)


def hidden_states(model, ids):
    """Return the states of transformers' encoder for padded ids, with a mask for the padding."""
    ids = torch.tensor(ids)
    return model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@pytest.mark.parametrize("make", WITH_CLIP.values(), ids=WITH_CLIP)
def test_class_text_equals_the_papers_formula_on_all_encoders(start_run, make):
    """The loss is 1 - cos of the pooled features of both phrases in transformers' CLIP."""
    run = start_run(make=make)
    expected = []
    for dictionary in run.family.token_dictionaries():
        tokenizer, encoder = dictionary.tokenizer, dictionary.text_encoder
        length = tokenizer.model_max_length

        def pooled(text, tokenizer=tokenizer, encoder=encoder, length=length):
            ids = tokenizer(
                text, padding="max_length", max_length=length, return_tensors="pt"
            ).input_ids
            end = ids[0].tolist().index(tokenizer.eos_token_id)
            return encoder(ids).last_hidden_state[0, end]

        with torch.no_grad():
            new = tokenizer.convert_tokens_to_ids("<rex>")
            assert new > tokenizer.eos_token_id  # at which the legacy pooling would stop
            ours = pooled("a photo of <rex> <rex>_1")
            with run.trainable.adapters_disabled():
                base = pooled("a photo of a dog")
        expected.append(1 - F.cosine_similarity(ours, base, dim=0))
    actual = run.preserved.text_loss(0) / EVERY
    assert torch.isclose(actual, torch.stack(expected).mean(), atol=1e-5)
    assert actual > 1e-3


def test_published_pooling_equals_the_published_code(start_run):
    """transformers' legacy branch pools at the highest id, for the configurations that have an
    end-of-text id of 2; and the token's row is laid over rows and positions together."""
    run = start_run(preserve_pooling="published", num_tokens=1, train_text_encoder=False)
    (dictionary,) = run.family.token_dictionaries()
    tokenizer, encoder = dictionary.tokenizer, dictionary.text_encoder
    legacy = CLIPTextModel(encoder.config)
    legacy.load_state_dict(encoder.state_dict())
    legacy.eos_token_id = 2
    row = run.trainable.concepts[0].token_rows["text_encoder"].parameter
    new = tokenizer.convert_tokens_to_ids("<rex>")

    def interpolate_embedding(module, args, kwargs, out):
        ids = kwargs["input_ids"]
        return torch.where((ids == new)[..., None], row, out)

    legacy.embeddings.register_forward_hook(interpolate_embedding, with_kwargs=True)
    ours, base = (
        legacy(tokenizer(text, return_tensors="pt").input_ids).pooler_output
        for text in ("a photo of <rex>", "a photo of a dog")
    )
    actual = run.preserved.text_loss(0) / EVERY
    assert torch.isclose(actual, cosine_distance(ours, base)[0], atol=1e-5)
    # Independent of the words after the token.
    losses = []
    for pooling in ("published", "end"):
        for phrase in ("a {} on a beach", "a {} in the snow"):
            changes = {"preserve_pooling": pooling, "preserve_phrases": (phrase,)}
            run.config = run.config.model_copy(update=changes)
            one = run.prepare().phrases["text_encoder"]["class_text"]
            states = run.prepare().text_states["text_encoder"](one.ids, len(one.ids))
            losses.append(states[0, one.positions[0, 0]])
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    assert not torch.allclose(losses[2], losses[3], atol=1e-2)


def test_context_text_compares_the_words_around_the_concept(start_run):
    phrases = ("a photo of {} on the beach", "{} in the snow")
    run = start_run(preserve={"context_text": 1.0}, preserve_phrases=phrases, num_tokens=3)
    (dictionary,) = run.family.token_dictionaries()
    tokenizer, encoder = dictionary.tokenizer, dictionary.text_encoder

    def states(text):
        return encoder(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]

    expected = []
    expanded = "<rex> <rex>_1 <rex>_2"
    with torch.no_grad():
        for text, before in (("a photo of {} on the beach", 4), ("{} in the snow", 1)):
            ours = states(text.replace("{}", expanded))
            with run.trainable.adapters_disabled():
                base = states(text.replace("{}", "a dog"))
            after = len(ours) - before - 3
            assert len(base) == before + 2 + after
            a = torch.cat([ours[:before], ours[-after:]])
            b = torch.cat([base[:before], base[-after:]])
            expected.append(cosine_distance(a, b).mean())
    actual = run.preserved.text_loss(0) / EVERY
    assert torch.isclose(actual, torch.stack(expected).mean(), atol=1e-5)


def test_layerwise_tokens_are_pooled_layer_by_layer(start_run, tmp_path):
    """Layers are compared in turn, and each loss changes only the embeddings of its layer."""
    config = settings(tmp_path, preserve={"class_text": 1.0}, layerwise_tokens=True)
    family = family_of(tiny_sd().components)
    with attach_trainable(family, [config], [None], BasisInfo(), {}) as trainable:
        preserved = class_preservation.compute_preservation_targets(
            [config], family, trainable, None, []
        )
        layers = trainable.layers
        (phrases,) = preserved.phrases["text_encoder"].values()
        assert len(phrases.ids) == layers and len(set(map(tuple, phrases.ids.tolist()))) == layers
        rows = trainable.concepts[0].token_rows["text_encoder"].parameter
        moved = set()
        for step in range(layers):
            rows.grad = None
            preserved.text_loss(EVERY * step).backward()
            touched = rows.grad.unflatten(0, (layers, 2)).abs().amax((1, 2)) > 0
            assert 0 < int(touched.sum()) <= 2
            moved |= set(touched.nonzero()[:, 0].tolist())
        assert moved == set(range(layers))


@pytest.mark.parametrize("loss", ["class_text", "context_text"])
@pytest.mark.parametrize("make", WITH_CLIP.values(), ids=WITH_CLIP)
def test_gradients_reach_only_tokens_and_text_adapters(start_run, loss, make):
    run = start_run(make=make, preserve={loss: 1.0})
    gradients = run.gradients()
    denoisers = set(run.family.denoisers)
    for name, size in gradients.items():
        assert (size > 0) is (name.split("/")[1] not in denoisers), name
    frozen = [p for part in run.family.adaptable.values() for p in part.parameters()]
    trained = {id(p) for p in run.trainable.named_parameters().values()}
    assert all(p.grad is None for p in frozen if id(p) not in trained)


def test_losses_are_zero_before_the_first_step(start_run):
    """A concept of one token with the embedding of the class word equals the class."""
    run = start_run(num_tokens=1, caption="a photo of a {}", preserve=ALL, moved=False)
    for name in ("class_text", "context_text"):
        phrases = run.preserved.phrases["text_encoder"][name]
        assert len(phrases.ids) == (1 if name == "class_text" else len(class_preservation.PROMPTS))
    only = start_run(num_tokens=1, preserve_phrases=("a photo of a {}",), moved=False)
    assert only.preserved.text_loss(0) < 1e-5
    other = start_run(
        num_tokens=1, preserve_phrases=("a photo of a {}",), token_init="red", moved=False
    )
    assert other.preserved.text_loss(0) > 1e-4


def test_many_phrases_are_compared_in_turns(start_run):
    run = start_run(preserve={"context_text": 1.0})
    rows, encode = [], run.preserved.text_states["text_encoder"]

    def record_calls(ids, first):
        rows.append(ids.tolist())
        return encode(ids, first)

    run.preserved.text_states["text_encoder"] = record_calls
    has_loss = [run.preserved.text_loss(step) is not None for step in range(6 * EVERY)]
    assert has_loss == [step % EVERY == 0 for step in range(6 * EVERY)]
    assert [len(ids) for ids in rows] == [2] * 6
    assert len({tuple(ids) for batch in rows for ids in batch}) == len(class_preservation.PROMPTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of <rex>", "a photo of a dog"),
        ("a photo of <REX> and <rex>, <rex>", "a photo of a dog and a dog, a dog"),
        ("<rex> on a beach", "a dog on a beach"),
        ("a photo of a <rex> dog", "a photo of a dog"),
        ("a photo of <rex> dog", "a photo of a dog"),
        ("my <rex>  Dog sleeps", "my dog sleeps"),
        ("a small <rex> in the snow", "a small dog in the snow"),
        ("a <rex> dogs", "a dog dogs"),
        ("nothing", "nothing"),
    ],
)
def test_the_trigger_is_replaced_by_the_class_word(text, expected):
    assert replace_trigger(text, "<rex>", "dog") == expected


# --- in a run -------------------------------------------------------------------------------------


def learn(pipe, config, **more):
    return train(config, pipe.components, progress=False, pipeline_config=pipe.config, **more)


@pytest.mark.parametrize("make", [*WITH_CLIP.values(), *OTHERS.values()], ids=[*WITH_CLIP, *OTHERS])
def test_output_compares_the_class_prompt_with_the_base_model(make, tmp_path):
    """Nothing differs before the first step; later the answers to the class prompt are nearer to
    the base's than without, and the model ends as it was."""
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    first, losses = [], {}
    for weight in (0.0, 100.0):
        losses[weight] = []
        config = settings(tmp_path, f"w{weight:.0f}", preserve={"output": weight}, steps=8)
        learn(pipe, config, on_step=lambda _, loss, w=weight: losses[w].append(float(loss)))
        first.append(losses[weight][0])
    # Zero at the start, and positive later.
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    assert losses[100.0][EVERY] > losses[0.0][EVERY]
    assert_unchanged(before, pipe.components, pipe.config)


def record_calls(pipe):
    """Record the inputs and outputs of the UNet's following calls in a list."""
    calls = []
    forward = pipe.unet.forward

    def record(noisy, t, states, **kwargs):
        output = forward(noisy, t, states, **kwargs)
        calls.append((noisy.detach(), t, states.detach(), output[0].detach()))
        return output

    pipe.unet.forward = record
    return forward, calls


def test_output_is_the_squared_change_of_the_prediction(tmp_path):
    """The loss increases by the squared change, computed by stock calls."""
    pipe = tiny_sd()
    forward, calls = record_calls(pipe)
    losses = {}
    for weight in (0.0, 3.0):
        calls.clear()
        losses[weight] = []
        # Both are equal before, because the first step starts from the unchanged model.
        changes = {"preserve": {"output": weight}, "steps": EVERY + 1}
        config = settings(tmp_path, f"w{weight:.0f}", **changes)
        learn(pipe, config, on_step=lambda _, loss, w=weight: losses[w].append(float(loss)))
    noisy, t, states, both = calls[-2]
    again, t_again, base_states, base = calls[-1]
    assert len(noisy) == 4 and len(again) == 2
    assert torch.equal(noisy[:2], noisy[2:]) and torch.equal(noisy[2:], again)
    assert torch.equal(t[:2], t[2:]) and torch.equal(t[2:], t_again)
    with torch.no_grad():
        ids = pipe.tokenizer(
            "a photo of a dog", padding="max_length", max_length=24, return_tensors="pt"
        ).input_ids
        plain = pipe.text_encoder(ids)[0]
        answer = forward(again, t_again, plain.expand(2, -1, -1), return_dict=False)[0]
    assert torch.allclose(base_states, plain.expand(2, -1, -1), atol=1e-6)
    assert torch.allclose(base, answer, atol=1e-5)
    assert not torch.allclose(states[2:], base_states, atol=1e-6)  # the text adapter has changed
    change = float((both[2:] - base).square().mean())
    assert change > 0
    assert losses[3.0][:EVERY] == pytest.approx(losses[0.0][:EVERY], rel=1e-5)
    added = losses[3.0][EVERY] - losses[0.0][EVERY]
    assert added == pytest.approx(EVERY * 3.0 * change, rel=1e-2)


def test_context_output_is_the_squared_change_of_the_effect_of_a_context(tmp_path):
    """The loss increases by the squared change, computed by stock calls."""
    pipe = tiny_sd()
    forward, calls = record_calls(pipe)
    losses, phrases = {}, ("a photo of {} in a city",)
    for weight in (0.0, 3.0):
        calls.clear()
        changes = {"preserve": {"context_output": weight}} if weight else {"preserve": {}}
        changes |= {"preserve_phrases": phrases} if weight else {}
        losses[weight] = []
        config = settings(tmp_path, f"w{weight:.0f}", steps=1, **changes)
        learn(pipe, config, on_step=lambda _, loss, w=weight: losses[w].append(float(loss)))
    (noisy, t, _, plain), (again, t_again, _, in_context), (twice, t_twice, _, base) = calls
    assert torch.equal(noisy, again) and torch.equal(torch.cat([noisy] * 2), twice)
    assert torch.equal(t, t_again) and torch.equal(torch.cat([t] * 2), t_twice)

    def answer(text):
        ids = pipe.tokenizer(text, padding="max_length", max_length=24, return_tensors="pt")
        states = pipe.text_encoder(ids.input_ids)[0].expand(2, -1, -1)
        return forward(noisy, t, states, return_dict=False)[0]

    with torch.no_grad():
        shift = answer("a photo of a dog in a city") - answer("a photo of a dog")
    assert torch.allclose(base[2:] - base[:2], shift, atol=1e-5)
    change = float((in_context - plain - shift).square().mean())
    added = losses[3.0][0] - losses[0.0][0]
    assert change > 1e-6
    assert added == pytest.approx(EVERY * 3.0 * change, rel=1e-3)


@pytest.mark.parametrize("make", [*WITH_CLIP.values(), *OTHERS.values()], ids=[*WITH_CLIP, *OTHERS])
def test_context_output_works_in_every_family_and_changes_the_concept(make, tmp_path):
    """Triggers have other embeddings than the class word, so the loss is not zero."""
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    losses, learned = [], []
    for name, preserve in (("plain", {}), ("preserved", {"context_output": 1.0})):
        config = settings(tmp_path, name, preserve=preserve, steps=2)
        concept = learn(pipe, config, on_step=lambda _, loss: losses.append(float(loss)))
        learned.append(tensors(concept))
    assert losses[2] > losses[0] * (1 + 1e-6)
    assert not same(*learned)
    assert_unchanged(before, pipe.components, pipe.config)


def test_all_contexts_are_used_before_any_is_repeated(start_run):
    phrases = tuple(f"{{}} {where}" for where in ("in a city", "on a beach", "in space"))
    run = start_run(preserve={"context_output": 1.0}, preserve_phrases=phrases)
    used = [
        text for turn in range(6) for text in run.preserved.choose_context_prompts([0, 0], turn)
    ]
    expected = sorted(phrase.replace("{}", "<rex>") for phrase in phrases)
    assert [sorted(used[k : k + 3]) for k in range(0, 12, 3)] == [expected] * 4


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation_uses_all_contexts(accumulate, tmp_path, monkeypatch):
    asked = []
    in_context = class_preservation.PreservationTargets.choose_context_prompts

    def record(self, concepts, turn):
        prompts = in_context(self, concepts, turn)
        asked.extend(prompts)
        return prompts

    monkeypatch.setattr(class_preservation.PreservationTargets, "choose_context_prompts", record)
    phrases = tuple(f"{{}} {where}" for where in ("in a city", "on a beach", "in space"))
    changes = {"preserve": {"context_output": 1.0}, "preserve_phrases": phrases, "batch_size": 1}
    steps = 2 * EVERY + 1
    learn(tiny_sd(), settings(tmp_path, steps=steps, gradient_accumulation=accumulate, **changes))
    assert len(asked) == 3 * accumulate
    assert all(len(set(asked[k : k + 3])) == 3 for k in range(0, len(asked), 3))


def test_contexts_are_appended_to_the_caption(start_run):
    run = start_run(preserve={"context_output": 1.0}, caption="a picture in {} style")
    prompts = {run.preserved.choose_context_prompts([0], turn)[0] for turn in range(9)}
    assert "a picture in <rex> style wearing a hat" in prompts
    assert len(prompts) == 9


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux], ids=["sd", "flux"])
def test_all_losses_repeat_resume_and_restore_the_model(make, tmp_path):
    changes = {
        "preserve": ALL,
        "prior_weight": 0.5,
        "prior_images": make_pictures(tmp_path / "dogs"),
        "checkpoint_every": 2,
        "caption_dropout": 0.3,
        "gradient_accumulation": 2,
        "min_snr_gamma": 5.0 if make is tiny_sd else None,
        "layerwise_tokens": make is tiny_sd,
        "steps": 5,
    }
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    whole = learn(pipe, settings(tmp_path, "whole", **changes))
    assert_unchanged(before, pipe.components, pipe.config)

    cut = settings(tmp_path, "cut", **changes)
    with pytest.raises(Stop):
        learn(pipe, cut, on_step=crash_at(3))
    assert_unchanged(before, pipe.components, pipe.config)
    assert same(tensors(learn(pipe, cut)), tensors(whole))

    other = learn(pipe, settings(tmp_path, "plain", **{**changes, "preserve": {}}))
    assert not same(tensors(other), tensors(whole))
    assert whole.info.training["settings"]["preserve"] == ALL
    for name, value in (
        ("preserve", {**ALL, "output": 1.0}),
        ("preserve_phrases", ("a {}",)),
        ("preserve_pooling", "published"),
    ):
        with pytest.raises(SettingsError, match=f"{name} was .* and is "):
            learn(pipe, settings(tmp_path, "whole", **{**changes, name: value}))


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_text_losses_are_refused_without_a_trained_text_encoder(make, tmp_path):
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    config = settings(tmp_path, preserve={"class_text": 1.0, "context_text": 1.0})
    with pytest.raises(ConfigError, match=r"class_text and context_text cannot .* no gradient"):
        learn(pipe, config)
    assert_unchanged(before, pipe.components, pipe.config)
    assert not (tmp_path / "out").exists()


def test_phrases_beyond_the_encoders_length_are_refused(tmp_path):
    config = settings(
        tmp_path, preserve={"class_text": 1.0}, preserve_phrases=("a dog " * 60 + "{}",)
    )
    with pytest.raises(DataError, match=r"the phrase .* the trigger is cut off"):
        learn(tiny_sd(), config)
