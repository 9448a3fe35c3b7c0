"""load_custom(merge="fusion") on real, tiny pipelines."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import save_file

import customize
from customize.concepts.adapter import saved_module_name
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.core.lowrank import to_dense
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from customize.pipeline import transaction
from tests.pipeline.making import MAKERS, assert_same, concept, draw, everything, user_lora
from tests.tiny import tiny_sd

pytestmark = pytest.mark.usefixtures("quick_recordings")

FEW = ("a photo of {}", "a drawing of {} on a beach")
modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of two concepts with their records."""
    pipe, root = tiny_sd(), tmp_path_factory.mktemp("recorded")
    for index, name in enumerate(("rex", "tom")):
        folder = save_concept(concept(pipe, name, index=index), root / name)
        customize.record_inputs(pipe, folder, FEW).save(layer_inputs_path(folder))
    return root


@pytest.fixture
def pair(recorded, tmp_path):
    """A pipeline, and the folders of two concepts with their records."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return tiny_sd(), tmp_path / "rex", tmp_path / "tom"


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_recording_leaves_the_pipeline_unchanged(make):
    pipe = make()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    pipe.load_custom(rex, weights=[0.5])
    before = everything(pipe)
    record = customize.record_inputs(pipe, tom, FEW)
    assert_same(before, everything(pipe))
    # Every layer of the concept has read something, and as many channels as it takes.
    for factors in (record.concept, record.generic):
        for component, updates in tom.updates.items():
            assert len(factors[component]) == len(updates)
            for module, update in updates.items():
                rows = factors[component][saved_module_name(component, module)]
                assert rows.shape[1] == update.shape[1] and 0 < len(rows) <= 32
                assert 0.5 < float(rows.square().sum()) <= 1.0001


def test_concepts_of_one_run_are_summed_by_default(pair):
    pipe, *folders = pair
    assert pipe.load_custom(*folders).custom.merge == "fusion"
    pipe.unload_custom()
    learned = []
    for member, other in zip(map(load_concept, folders), ("tom", "rex"), strict=True):
        training = member.info.training | {"learned_with": [other]}
        info = member.info.model_copy(update={"training": training})
        learned.append(replace(member, info=info))
    assert pipe.load_custom(*learned).custom.merge == "sum"
    assert pipe.load_custom(merge="fusion").custom.merge == "fusion"
    pipe.unload_custom()
    third = save_concept(concept(pipe, "kit", index=2), folders[0].parent / "kit")
    customize.record_inputs(pipe, third, FEW).save(layer_inputs_path(third))
    assert pipe.load_custom(*learned, third).custom.merge == "fusion"


@modes
def test_fusion_preserves_both_concepts_on_their_inputs(pair, fuse):
    pipe, *folders = pair
    family = family_of(pipe.components)
    before, base = everything(pipe), draw(pipe)
    concepts = [load_concept(folder) for folder in folders]
    records = [LayerInputs.load(layer_inputs_path(folder)) for folder in folders]
    expected = merge_concepts(concepts, [1.0, 0.5], "fusion", records)
    summed = merge_concepts(concepts, [1.0, 0.5])
    pipe.load_custom(*folders, weights=[1.0, 0.5], merge="fusion", fuse=fuse)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = family.denoiser.get_submodule(name)
    if fuse:
        change = layer.weight - before["unet weights"][f"{name}.weight"]
    else:
        change = layer.get_delta_weight("customize")
    torch.testing.assert_close(change, to_dense(expected["unet"][name]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(change, to_dense(summed["unet"][name]), atol=1e-2)
    assert "merged by fusion" in repr(pipe.custom)
    assert np.abs(draw(pipe) - base).max() > 1e-3
    pipe.unload_custom()
    assert_same(before, everything(pipe))


def test_single_concepts_are_not_fused(pair):
    pipe, rex, tom = pair
    pipe.load_custom(rex)
    alone = draw(pipe)
    pipe.unload_custom()
    pipe.load_custom(rex, tom, merge="fusion")
    assert not np.array_equal(draw(pipe), alone)
    pipe.unload_custom("tom")
    assert np.array_equal(draw(pipe), alone)


def test_methods_persist_until_changed(pair):
    pipe, rex, tom = pair
    pipe.load_custom(rex, tom, merge="sum")
    summed = draw(pipe)
    pipe.load_custom(merge="fusion")
    fused = draw(pipe)
    assert not np.array_equal(fused, summed)
    pipe.load_custom(weights={"tom": 0.5})
    assert "merged by fusion" in repr(pipe.custom)
    pipe.load_custom(weights={"tom": 1.0}, merge="sum")
    assert np.array_equal(draw(pipe), summed)
    pipe.unload_custom()
    pipe.load_custom(rex, merge="fusion").load_custom(tom)
    assert np.array_equal(draw(pipe), fused)


def test_recorded_inputs_of_all_concepts_select_fusion(pair, tmp_path):
    pipe, rex, tom = pair
    pipe.load_custom(rex, tom, merge="fusion")
    fused = draw(pipe)
    pipe.unload_custom()
    pipe.load_custom(rex, tom)
    assert np.array_equal(draw(pipe), fused)
    assert "merged by fusion" in repr(pipe.custom)
    max_ = save_concept(concept(pipe, "max", index=2), tmp_path / "max")
    with pytest.warns(UserWarning, match="layer inputs of max are not recorded"):
        pipe.load_custom(max_)
    assert "merged by sum" in repr(pipe.custom)
    pipe.unload_custom("max")
    assert np.array_equal(draw(pipe), fused)


def test_fused_and_adapter_concepts_merge_jointly(pair):
    pipe, rex, tom = pair
    pipe.load_custom(rex, tom, merge="fusion")
    beside = draw(pipe)
    pipe.load_custom(weights={"tom": 1.0}, fuse=True)
    assert [row.mode for row in pipe.custom.rows] == ["adapter", "fused"]
    np.testing.assert_allclose(draw(pipe), beside, atol=2e-4)


def test_missing_inputs_are_recorded_on_the_pipeline(tmp_path, monkeypatch):
    pipe = tiny_sd()
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    before = everything(pipe)
    pipe.load_custom(rex, tom, merge="fusion")
    picture = draw(pipe)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    for single in (rex, tom):
        folder = save_concept(single, tmp_path / single.info.name)
        customize.record_inputs(pipe, single).save(layer_inputs_path(folder))
    monkeypatch.setattr(
        "customize.pipeline.record_inputs.record_layer_inputs", None
    )  # nothing is drawn any more
    pipe.load_custom(tmp_path / "rex", tmp_path / "tom", merge="fusion")
    # Half precision in the file is all that differs.
    np.testing.assert_allclose(draw(pipe), picture, atol=2e-2)


def test_inputs_of_another_concept_are_refused_without_change(pair):
    pipe, rex, tom = pair
    before = everything(pipe)
    layer_inputs_path(tom).write_bytes(layer_inputs_path(rex).read_bytes())
    with pytest.raises(ConceptError, match="is of another version of tom"):
        pipe.load_custom(rex, tom, merge="fusion")
    assert_same(before, everything(pipe))
    layer_inputs_path(tom).write_bytes(b"no record")
    with pytest.raises(ConceptError):
        pipe.load_custom(rex, tom, merge="fusion")
    assert_same(before, everything(pipe))


def test_errors_while_recording_change_nothing(monkeypatch):
    pipe = tiny_sd()
    pipe.load_custom(concept(pipe))
    before = everything(pipe)
    vae, real = pipe.vae, pipe.unet.forward

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.load_custom(concept(pipe, "tom", index=1), merge="fusion")
    monkeypatch.setattr(pipe.unet, "forward", real)
    del pipe.unet.forward
    assert pipe.vae is vae and "tom" not in repr(pipe.custom)
    assert_same(before, everything(pipe))


def test_errors_while_attaching_change_nothing(pair, monkeypatch):
    pipe, rex, tom = pair
    pipe.load_custom(rex)
    before = everything(pipe)
    real, calls = transaction.set_tokens, []

    def broken(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no more memory")
        real(*args)

    monkeypatch.setattr(transaction, "set_tokens", broken)
    with pytest.raises(RuntimeError, match="no more memory"):
        pipe.load_custom(tom, merge="fusion")
    assert_same(before, everything(pipe))
    assert pipe.custom.merge == "sum"


def test_invalid_arguments_are_refused(tmp_path):
    pipe = tiny_sd()
    before = everything(pipe)
    save_file(user_lora(pipe), tmp_path / "style.safetensors")
    rex = concept(pipe)
    with pytest.raises(ConfigError, match=r"unknown merge method 'slerp'.*choose from auto, sum"):
        pipe.load_custom(rex, merge="slerp")
    with pytest.raises(ConfigError, match="style says no words that call it"):
        pipe.load_custom(rex, tmp_path / "style.safetensors", merge="fusion")
    with pytest.raises(ConfigError, match=r"no \{\} for the concept's words"):
        customize.record_inputs(pipe, rex, ["a photo"])
    with pytest.raises(ConfigError, match=r"no \{\} for the concept's words"):
        customize.record_inputs(pipe, rex, [])
    with pytest.raises(ConfigError, match=r"reads \d+ tokens of a prompt.*<rex>.* are cut off"):
        customize.record_inputs(pipe, rex, ["a photo of {}", "in the snow " * 40 + "{}"])
    assert_same(before, everything(pipe))


def test_offloaded_models_need_inputs_recorded_before(pair):
    pipe, rex, tom = pair
    third = concept(pipe, "max", index=2)
    add_hook_to_module(pipe.unet, ModelHook())
    try:
        before = everything(pipe)
        with pytest.raises(PipelineError, match="offloaded"):
            pipe.load_custom(rex, tom, third, merge="fusion")
        assert_same(before, everything(pipe))
        pipe.load_custom(rex, tom, merge="fusion")  # whose records are there
        assert pipe.custom.merge == "fusion"
    finally:
        pipe.unload_custom()
        remove_hook_from_module(pipe.unet)
