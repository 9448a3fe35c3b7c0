"""load_custom and unload_custom on real, tiny pipelines of each family."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from peft import LoKrConfig

import customize
from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.merge_concepts import LayerMerge
from customize.concepts.tokens.token_rows import expand_prompt
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from tests.concepts.making import learn
from tests.pipeline.making import (
    MAKERS,
    PROMPT,
    assert_same,
    concept,
    draw,
    everything,
    table,
    user_lora,
)

both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])
TRIGGERS = {"<rex>": ["<rex>", "<rex>_1"], "<tom>": ["<tom>", "<tom>_1"]}


@both
@modes
def test_unloading_restores_everything_bit_for_bit(make, fuse):
    pipe = make()
    before, base = everything(pipe), draw(pipe)
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    assert pipe.load_custom(rex, tom, weights=[1.0, 0.5], fuse=fuse) is pipe
    with_both = draw(pipe)
    assert np.abs(with_both - base).max() > 1e-3
    if not fuse:
        family = family_of(pipe.components)
        name = next(iter(family.adapter_targets(family.denoiser_key)))
        layer = family.denoiser.get_submodule(name)
        old = before[f"{family.denoiser_key} weights"][f"{name}.weight"]
        assert torch.equal(layer.get_base_layer().weight, old)
    assert pipe.unload_custom("tom") is pipe
    with_rex = draw(pipe)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), base)
    pipe.load_custom(rex, fuse=fuse)
    assert np.array_equal(draw(pipe), with_rex)
    pipe.load_custom(tom, weights={"tom": 0.5}, fuse=fuse)
    assert np.array_equal(draw(pipe), with_both)
    assert not np.array_equal(with_rex, with_both)


@both
def test_adapter_and_fused_weight_are_the_exact_weighted_sum(make):
    pipe, fused = make(), make()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    weights = {"rex": 1.0, "tom": -0.5}
    family = family_of(pipe.components)
    before = {key: m.state_dict() for key, m in _models(family).items()}
    before = {key: {k: v.clone() for k, v in s.items()} for key, s in before.items()}
    pipe.load_custom(rex, tom, weights=weights)
    fused.load_custom(rex, tom, weights=weights, fuse=True)
    for key, model in _models(family).items():
        other = _models(family_of(fused.components))[key]
        for name, update in rex.updates[key].items():
            second = tom.updates[key][name]
            change = update.scale * update.up @ update.down
            change = change - 0.5 * second.scale * second.up @ second.down
            layer = model.get_submodule(name)
            torch.testing.assert_close(layer.get_delta_weight("customize"), change)
            expected = before[key][f"{name}.weight"] + change
            torch.testing.assert_close(other.get_submodule(name).weight, expected)
    np.testing.assert_allclose(draw(pipe), draw(fused), atol=2e-4)


@both
def test_triggers_expand_once_in_every_prompt_argument(make):
    pipe = make()
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    family = family_of(pipe.components)
    prompt, negative = "a photo of <rex> and <tom>", "a <TOM> in <rex>"
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    other = {}
    if family.name == "sd3":
        other = {"prompt_2": None, "prompt_3": None}
    encoded = pipe.encode_prompt(prompt=prompt, negative_prompt=negative, **options, **other)
    for embeds, text in zip(encoded, (prompt, negative), strict=False):
        expected = family.encode_prompts([expand_prompt(text, TRIGGERS)])["prompt_embeds"]
        assert torch.equal(embeds, expected)
    listed = pipe.encode_prompt(prompt=[prompt, "a dog"], **options, **other)[0]
    torch.testing.assert_close(listed[:1], encoded[0])
    ids = pipe.tokenizer(prompt).input_ids
    assert ids == pipe.tokenizer(expand_prompt(prompt, TRIGGERS)).input_ids
    assert [ids.count(i) for i in range(len(pipe.tokenizer) - 4, len(pipe.tokenizer))] == [1] * 4


def test_each_prompt_of_sd3_expands():
    pipe = MAKERS["sd3"]()
    rex = concept(pipe)
    pipe.load_custom(rex)
    plain = {"prompt": "a dog", "prompt_2": "a cat", "prompt_3": "a cup"}
    options = {"device": "cpu", "do_classifier_free_guidance": False}
    base = pipe.encode_prompt(**plain, **options)[0]
    for name in plain:
        one = pipe.encode_prompt(**plain | {name: "a <rex>"}, **options)[0]
        two = pipe.encode_prompt(**plain | {name: "a <rex> <rex>_1"}, **options)[0]
        assert torch.equal(one, two)
        assert not torch.equal(one, base)


@both
def test_changing_weights_and_loading_again(make):
    pipe, other = make(), make()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_custom(rex, tom)
    pipe.load_custom(weights={"rex": 0.25})
    pipe.load_custom(concept(pipe, "tom", index=1), weights=[2.0])
    other.load_custom(rex, tom, weights=[0.25, 2.0])
    assert np.array_equal(draw(pipe), draw(other))
    pipe.load_custom(rex)  # identical, without a weight: as it was
    assert [row.weight for row in pipe.custom.rows] == [0.25, 2.0]
    with pytest.raises(ConceptError, match="another concept called rex is attached"):
        pipe.load_custom(concept(pipe, "rex", index=3))
    pipe.load_custom(rex, fuse=True)
    assert [row.mode for row in pipe.custom.rows] == ["fused", "adapter"]
    np.testing.assert_allclose(draw(pipe), draw(other), atol=2e-4)


def test_paths_and_files(tmp_path):
    pipe, other = MAKERS["sd"](), MAKERS["sd"]()
    rex = concept(pipe)
    save_concept(rex, tmp_path / "rex")
    pipe.load_custom(str(tmp_path / "rex"))
    other.load_custom(tmp_path / "rex")
    assert np.array_equal(draw(pipe), draw(other))
    with pytest.raises(ConceptError):
        pipe.load_custom(tmp_path / "nothing")
    single = MAKERS["sd"]()
    single.load_custom(save_concept(rex, tmp_path / "rex.safetensors"))
    assert np.array_equal(draw(pipe), draw(single))


@both
def test_empty_calls_are_refused(make):
    pipe = make()
    with pytest.raises(ConfigError, match="nothing to load"):
        pipe.load_custom()
    pipe.load_custom(concept(pipe))
    before = everything(pipe)
    other = type(make())(**pipe.components)
    assert other.load_custom() is other  # as the pipelines of these models are customized
    assert_same(before, everything(pipe))
    pipe.unload_custom()
    with pytest.raises(ConfigError, match="nothing to load"):
        other.load_custom()


@both
@modes
def test_failed_calls_change_nothing(make, fuse):
    pipe = make()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    foreign = concept(MAKERS["sd3" if make is MAKERS["sd"] else "sd"](), "ann")
    pipe.load_custom(rex, weights=[0.5], fuse=fuse)
    before, picture = everything(pipe), draw(pipe)
    rows = pipe.custom.rows
    larger = tom.info.fingerprint | {"denoiser": "0" * 64}
    wider = {"widths": tom.info.fingerprint["widths"] | {"text_encoder": [8]}}
    attempts = [
        (ConceptError, "differs from this pipeline's", [tom, foreign], {}),
        (ConceptError, "differs", [concept(pipe, "tom", fingerprint=larger)], {}),
        (
            ConceptError,
            "widths",
            [concept(pipe, "a", fingerprint=tom.info.fingerprint | wider)],
            {},
        ),
        (ConceptError, "have the same trigger <rex>", [concept(pipe, "ann", trigger="<rex>")], {}),
        (ConceptError, "two concepts are called tom", [tom, tom], {}),
        (ConceptError, "another concept called rex", [tom, concept(pipe, index=2)], {}),
        (ConfigError, "1 weight for 2", [tom, rex], {"weights": [1.0]}),
        (ConfigError, "weight of tom is nan", [tom], {"weights": [float("nan")]}),
        (ConfigError, "weight of tom is '1'", [tom], {"weights": ["1"]}),
        (ConfigError, "neither attached nor", [tom], {"weights": {"ann": 1.0}}),
        (ConfigError, "weights are of type float", [tom], {"weights": 0.6}),
        (ConfigError, "is not a concept", [3], {}),
        (ConfigError, "does not name 1", [tom], {"names": "x"}),
        (ConceptError, "name", [tom], {"names": ["../x"]}),
        (ConceptError, "no/such/folder", ["no/such/folder.safetensors"], {}),
    ]
    for error, message, sources, options in attempts:
        with pytest.raises(error, match=message):
            pipe.load_custom(*sources, fuse=fuse, **options)
    with pytest.raises(ConfigError, match="no concept tom is attached"):
        pipe.unload_custom("rex", "tom")
    assert_same(before, everything(pipe))
    assert pipe.custom.rows == rows
    assert np.array_equal(draw(pipe), picture)


@both
@pytest.mark.parametrize(
    ("attached", "fuse", "step", "call"),
    [
        (False, False, "pipeline.transaction.attach_updates", 2),
        (True, False, "concepts.adapter.replace_factors", 2),
        (False, False, "pipeline.set_tokens.add_tokens", 1),
        (True, False, "pipeline.set_tokens.add_tokens", 1),
        (False, True, "pipeline.set_tokens.expand_triggers", 1),
        (True, True, "pipeline.set_tokens.expand_triggers", 1),
        (False, True, "pipeline.fuse_weights.add_weighted_sum", 5),
        (True, True, "pipeline.fuse_weights.add_weighted_sum", 5),
    ],
)
def test_failures_at_any_step_are_undone(make, attached, fuse, step, call, monkeypatch):
    pipe = make()
    if attached:
        pipe.load_custom(concept(pipe), fuse=fuse)
    before = everything(pipe)
    tom = concept(pipe, "tom", index=1)
    module, name = step.rsplit(".", 1)
    real = getattr(import_module(f"customize.{module}"), name)
    calls = []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise MemoryError("full")
        return real(*args, **kwargs)

    monkeypatch.setattr(f"customize.{step}", failing)
    with pytest.raises(MemoryError):
        pipe.load_custom(tom, fuse=fuse)
    assert_same(before, everything(pipe))
    monkeypatch.undo()
    pipe.load_custom(tom, fuse=fuse)
    assert len(pipe.custom.rows) == 1 + attached


@both
def test_unloading_merges_nothing(make, monkeypatch):
    pipe = make()
    before = everything(pipe)
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=1))
    monkeypatch.setattr(LayerMerge, "compute", None)
    pipe.unload_custom()
    assert_same(before, everything(pipe))


@both
def test_updates_that_a_cast_made_infinite_are_restored_and_removed(make, monkeypatch):
    """In float16 the update of rex is infinite, which is what an error must leave, bit for bit."""
    pipe = make()
    rex = concept(pipe)
    updates = {
        component: {
            module: replace(update, up=1e6 * update.up) for module, update in layers.items()
        }
        for component, layers in rex.updates.items()
    }
    pipe.load_custom(replace(rex, updates=updates))
    pipe.to(torch.float16)
    before = everything(pipe)
    with monkeypatch.context() as patched:
        patched.setattr("customize.pipeline.set_tokens.add_tokens", None)
        with pytest.raises(TypeError):
            pipe.load_custom(concept(pipe, "tom", index=1), weights={"rex": 1e-6})
    assert_same(before, everything(pipe))
    with pytest.raises(ConfigError, match=r"range of torch\.float16"):
        pipe.load_custom(concept(pipe, "tom", index=1))
    assert_same(before, everything(pipe))
    pipe.unload_custom()
    base = make()
    base.to(torch.float16)
    assert_same(everything(base), everything(pipe))


@both
def test_another_concept_of_the_same_name_is_refused(make):
    pipe = make()
    first, second = concept(pipe), concept(pipe, index=1)
    pipe.load_custom(first, second, names=[None, "rex2"])
    assert [(row.name, row.trigger) for row in pipe.custom.rows] == [
        ("rex", "<rex>"),
        ("rex2", "<rex2>"),
    ]
    ids = pipe.tokenizer("<rex> <rex2>", add_special_tokens=False).input_ids
    rows = torch.cat([first.embeddings["text_encoder"], second.embeddings["text_encoder"]])
    assert torch.equal(table(pipe.text_encoder)[ids], rows)
    pipe.unload_custom("rex")
    ids = pipe.tokenizer("<rex2>", add_special_tokens=False).input_ids
    assert torch.equal(table(pipe.text_encoder)[ids], rows[2:])


def test_tokens_already_in_the_vocabulary_are_refused():
    pipe = MAKERS["sd"]()
    pipe.load_textual_inversion({"<rex>": torch.ones(2, 32)})
    before = everything(pipe)
    with pytest.raises(ConceptError, match="brings the token <rex>, which the tokenizer has"):
        pipe.load_custom(concept(pipe))
    assert_same(before, everything(pipe))
    pipe.load_custom(concept(pipe), names=["rex2"])
    pipe.unload_custom()
    assert_same(before, everything(pipe))


def test_textual_inversions_of_users_are_preserved():
    pipe = MAKERS["sd"]()
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    pipe.load_custom(concept(pipe))
    pipe.load_textual_inversion({"<mine>": rows})
    pipe.unload_custom()
    other = MAKERS["sd"]()
    other.load_textual_inversion({"<mine>": rows})
    assert np.array_equal(draw(pipe, "a <mine>"), draw(other, "a <mine>"))
    assert len(pipe.tokenizer) == len(other.tokenizer)
    pipe.load_custom(concept(pipe))
    pipe.unload_textual_inversion()  # takes ours as well
    pipe.load_custom(weights={"rex": 1.0})
    other = MAKERS["sd"]()
    other.load_custom(concept(other))
    assert np.array_equal(draw(pipe), draw(other))


@both
def test_adapters_of_users_keep_working(make):
    pipe = make()
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    before, base = everything(pipe), draw(pipe)
    rex = concept(pipe)
    pipe.load_custom(rex)
    assert set(pipe.get_active_adapters()) == {"mine", "customize"}
    with_both = draw(pipe)
    fused = make()
    fused.load_lora_weights(user_lora(fused), adapter_name="mine")
    fused.load_custom(rex, fuse=True)
    np.testing.assert_allclose(draw(fused), with_both, atol=2e-4)
    pipe.unload_custom()
    fused.unload_custom()
    assert_same(before, everything(pipe))
    assert_same(before, everything(fused))
    assert np.array_equal(draw(pipe), base)

    pipe.load_custom(rex)
    pipe.load_lora_weights(user_lora(pipe, 5), adapter_name="late")
    assert pipe.custom.rows[0].mode == "adapter (not active)"  # as diffusers treats its own
    pipe.set_adapters(["mine", "customize"])
    assert np.array_equal(draw(pipe), with_both)
    assert pipe.custom.rows[0].mode == "adapter"
    pipe.delete_adapters("late")
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), base)

    pipe.load_custom(rex)
    pipe.unload_lora_weights()  # takes ours as well
    assert "removed" in pipe.custom.rows[0].mode
    pipe.unload_custom()
    assert np.array_equal(draw(pipe), draw(make()))


@both
def test_loaded_concepts_draw_as_the_training_model_did(make):
    learner, pipe = make(), make()
    _, adapter, learned = learn(learner)
    prompt = PROMPT
    if make is MAKERS["sd3"]:  # which expands nothing by itself
        prompt = expand_prompt(PROMPT, TRIGGERS)
    pipe.load_custom(learned)
    np.testing.assert_allclose(draw(pipe), draw(learner, prompt), atol=1e-4)
    before = everything(learner)
    with pytest.raises(ConceptError, match="the token <rex>, which the tokenizer has already"):
        learner.load_custom(learned)
    learner.load_custom(learned, names=["other"])  # its adapter is called otherwise
    learner.unload_custom()
    assert_same(before, everything(learner))
    adapter.remove()


def test_conflicting_adapters_are_named():
    pipe = MAKERS["sd"]()
    rex = concept(pipe)
    pipe.load_lora_weights(user_lora(pipe), adapter_name="customize")
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"an adapter named customize.*delete_adapters"):
        pipe.load_custom(rex)
    assert_same(before, everything(pipe))
    pipe = MAKERS["sd"]()
    pipe.unet.add_adapter(LoKrConfig(r=2, alpha=2, target_modules=["to_q"]), "lokr")
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"an adapter of another kind, Linear.*unload"):
        pipe.load_custom(rex)
    assert_same(before, everything(pipe))


@both
def test_conflicting_model_states_are_refused(make):
    pipe = make()
    rex = concept(pipe)
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    pipe.fuse_lora()
    before = everything(pipe)
    with pytest.raises(PipelineError, match=r"fused into its weight.*unfuse_lora"):
        pipe.load_custom(rex)
    assert_same(before, everything(pipe))
    pipe.unfuse_lora()
    pipe.disable_lora()
    with pytest.raises(PipelineError, match=r"switched off.*enable_lora"):
        pipe.load_custom(rex)
    pipe.enable_lora()
    pipe.load_custom(rex, fuse=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # leaves what was fused in the weights
    before = everything(pipe)
    with pytest.raises(PipelineError, match="changed by someone else"):
        pipe.unload_custom()
    assert_same(before, everything(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
@modes
def test_half_precision(make, fuse, dtype):
    pipe = make().to(dtype)
    before = everything(pipe)
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_custom(rex, tom, fuse=fuse)
    for model in _models(family_of(pipe.components)).values():
        assert {weight.dtype for weight in model.parameters()} == {dtype}
    if fuse:
        family = family_of(pipe.components)
        for name, update in rex.updates[family.denoiser_key].items():
            second = tom.updates[family.denoiser_key][name]
            old = before[f"{family.denoiser_key} weights"][f"{name}.weight"].float()
            change = update.scale * update.up @ update.down
            change = change + second.scale * second.up @ second.down
            fused = family.denoiser.get_submodule(name).weight.float()
            step = torch.finfo(dtype).eps
            assert ((fused - old - change).abs() <= step * (old + change).abs() + 1e-6).all()
    assert np.isfinite(draw(pipe)).all()
    pipe.unload_custom()
    assert_same(before, everything(pipe))


@both
@modes
def test_dtype_changes_between_loading_and_unloading(make, fuse):
    pipe = make()
    pipe.load_custom(concept(pipe), fuse=fuse)
    pipe.to(torch.bfloat16)
    assert {weight.dtype for weight in pipe.text_encoder.parameters()} == {torch.bfloat16}
    pipe.load_custom(concept(pipe, "tom", index=1), fuse=fuse)
    pipe.unload_custom()
    assert_same(everything(make().to(torch.bfloat16)), everything(pipe))


@both
def test_summary_is_a_table(make):
    pipe = make()
    assert repr(pipe.custom) == "no concepts attached"
    pipe.load_custom(concept(pipe), concept(pipe, "tom", index=0), weights=[1, 0.8])
    pipe.load_custom(concept(pipe, "ann", index=1), fuse=True)
    lines = [line.split() for line in repr(pipe.custom).splitlines()]
    model = ["on", family_of(pipe.components).name, "(cpu,", "float32),"]
    assert lines[0] == ["3", "concepts", *model, "merged", "by", "sum"]
    assert lines[1] == ["name", "trigger", "class", "weight", "rank", "slices", "mode"]
    assert lines[3] == ["rex", "<rex>", "dog", "1", "2", "shared", "with", "tom", "adapter"]
    assert lines[4] == ["tom", "<tom>", "dog", "0.8", "2", "shared", "with", "rex", "adapter"]
    assert lines[5] == ["ann", "<ann>", "dog", "1", "2", "disjoint", "fused"]


def test_unknown_pipelines_are_refused():
    with pytest.raises(PipelineError, match="a int is not a diffusers pipeline"):
        customize.load_custom(3, "x")
    pipe = MAKERS["sd"]()
    pipe.unet = None
    with pytest.raises(PipelineError, match="no known model family"):
        pipe.load_custom("x")
    assert repr(pipe.custom) == "no concepts attached"


def test_unloading_without_concepts_is_allowed():
    pipe = MAKERS["sd"]()
    before = everything(pipe)
    assert customize.unload_custom(pipe) is pipe
    assert_same(before, everything(pipe))
    with pytest.raises(ConfigError, match="no concept rex is attached"):
        pipe.unload_custom("rex")


def _models(family):
    return {family.denoiser_key: family.denoiser, **family.text_encoders}
