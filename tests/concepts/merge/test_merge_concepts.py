"""Merging concepts by every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import customize
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.merge.merge_concepts import merge_concepts, plan_merge
from customize.concepts.types import Concept, Lora, LoraInfo
from customize.core.lowrank import LowRank, from_dense, to_dense
from customize.core.merges import MERGES
from customize.core.merges.fusion import fuse_recorded
from customize.core.merges.method import MergeMethod, RecordedInputs, Setting
from customize.errors import ConceptError, ConfigError
from tests.concepts.making import small


@pytest.fixture
def concepts() -> list[Concept]:
    rex = small(0)
    tom = small(1, name="tom", rank=3, alpha=6.0, method="lora", basis=None, slices={})
    # Tom does not change the text encoder.
    return [rex, replace(tom, updates={"unet": tom.updates["unet"]})]


@pytest.mark.parametrize(("method", "share"), [("sum", 1.0), ("average", 0.5)])
def test_sum_and_average_agree_with_dense_updates(concepts, method, share) -> None:
    weights = [1.0, -0.6]
    merged = merge_concepts(concepts, weights, method)
    assert set(merged) == {"unet", "text_encoder"}
    for component, updates in merged.items():
        for module, update in updates.items():
            expected = sum(
                share * weight * to_dense(concept.updates[component][module])
                for concept, weight in zip(concepts, weights, strict=True)
                if component in concept.updates
            )
            assert torch.allclose(to_dense(update), expected, atol=1e-5)
    assert merged["unet"]["mid.attn1.to_q"].rank == 5
    assert merged["text_encoder"].keys() == concepts[0].updates["text_encoder"].keys()


def test_invalid_merges_are_refused(concepts: list[Concept]) -> None:
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge_concepts([], [])
    with pytest.raises(ConfigError, match="1 weight for 2"):
        merge_concepts(concepts, [1.0])
    with pytest.raises(ConfigError, match="weight of tom is nan"):
        merge_concepts(concepts, [1.0, float("nan")])
    with pytest.raises(ConfigError, match="unknown merge method 'slerp'") as caught:
        merge_concepts(concepts, [1.0, 1.0], "slerp")
    assert all(method in str(caught.value) for method in MERGES)
    with pytest.raises(ConfigError, match="no setting seed"):
        merge_concepts(concepts, [1.0, 1.0], "ties", seed=1)
    with pytest.raises(ConceptError, match="two concepts are called rex"):
        merge_concepts([concepts[0], concepts[0]], [1.0, 1.0])


@pytest.mark.parametrize(
    "change", [{"family": "sd3"}, {"fingerprint": {"family": "sd", "denoiser": "other"}}]
)
def test_concepts_of_different_models_are_refused(concepts, change) -> None:
    with pytest.raises(ConceptError, match=r"rex was trained on sd .* and ann on"):
        merge_concepts([concepts[0], small(2, name="ann", **change)], [1.0, 1.0])


def test_updates_of_different_shape_are_refused_with_the_layer(concepts: list[Concept]) -> None:
    rex = concepts[0]
    update = rex.updates["unet"]["mid.attn1.to_q"]
    other = replace(
        rex,
        info=rex.info.model_copy(update={"name": "ann"}),
        updates={
            **rex.updates,
            "unet": {
                **rex.updates["unet"],
                "mid.attn1.to_q": replace(update, up=update.up[:4]),
            },
        },
    )
    with pytest.raises(ConceptError, match=r"unet\.mid\.attn1\.to_q"):
        merge_concepts([rex, other], [1.0, 1.0])


@pytest.mark.parametrize("method", ["magnitude", "dare", "ties"])
def test_pruning_applies_the_settings_to_every_layer(concepts, method) -> None:
    weights = [1.0, -0.6]
    merged = merge_concepts(concepts, weights, method, density=0.4)
    if method != "dare":
        updates = [concept.updates["unet"]["mid.attn1.to_q"] for concept in concepts]
        expected = MERGES[method].merge(updates, weights, density=0.4)
        assert torch.equal(to_dense(merged["unet"]["mid.attn1.to_q"]), to_dense(expected))
    zeros = [
        to_dense(u).eq(0).double().mean() for layers in merged.values() for u in layers.values()
    ]
    assert 0.2 < float(sum(zeros)) / len(zeros) < 0.9
    assert merged["text_encoder"].keys() == concepts[0].updates["text_encoder"].keys()


def test_dare_masks_differ_between_layers_and_seeds() -> None:
    up, down = torch.ones(6, 1), torch.ones(1, 7)
    layers = {"a.to_q": LowRank(up, down), "a.to_k": LowRank(up, down)}
    loras = [Lora(LoraInfo(name, "sd", "", 1), {"unet": layers}) for name in ("one", "two")]

    def dropped(**settings: int) -> list[torch.Tensor]:
        merged = merge_concepts(loras, [1.0, 1.0], "dare", **settings)
        return [to_dense(update).eq(0) for update in merged["unet"].values()]

    first, default, other = dropped(seed=0), dropped(), dropped(seed=1)
    assert all(map(torch.equal, first, default))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(*first)


@pytest.mark.parametrize(
    "method", [name for name, method in MERGES.items() if not method.needs_inputs]
)
def test_single_concept_is_unchanged_or_refused(concepts: list[Concept], method: str) -> None:
    if method not in ("sum", "average"):
        with pytest.raises(
            ConfigError, match=f"the merge {method} needs at least 2 concepts, not 1"
        ):
            merge_concepts(concepts[:1], [0.5], method)
        return
    merged = merge_concepts(concepts[:1], [0.5], method)
    for component, layers in merged.items():
        for module, update in layers.items():
            expected = 0.5 * to_dense(concepts[0].updates[component][module])
            torch.testing.assert_close(to_dense(update), expected)


def test_only_updates_of_higher_rank_are_truncated(concepts) -> None:
    wide = plan_merge(concepts, [1.0, 1.0], "ties")["unet"]["mid.attn1.to_q"]
    exact = to_dense(wide.compute())
    actual = wide.truncate()
    assert (wide.compute().rank, actual.rank) == (8, 5)
    best = torch.linalg.svdvals(exact)[5:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(to_dense(actual) - exact)
    assert float(error) == pytest.approx(float(best), rel=0.01)
    summed = plan_merge(concepts, [1.0, 1.0])["unet"]["mid.attn1.to_q"]
    assert torch.equal(to_dense(summed.truncate()), to_dense(summed.compute()))


def random_record(concept: Concept, seed: int) -> LayerInputs:
    """A record of a concept's UNet layers with random inputs of rank 2."""
    generator = torch.Generator().manual_seed(seed)

    def factors() -> dict[str, dict[str, torch.Tensor]]:
        return {
            "unet": {
                module: torch.randn(2, update.shape[1], generator=generator)
                for module, update in concept.updates["unet"].items()
            }
        }

    return LayerInputs("", factors(), factors())


def test_fusion_gets_the_generic_inputs_of_merged_and_preserved_concepts(concepts) -> None:
    records = [random_record(concept, seed) for seed, concept in enumerate(concepts)]
    preserved = [random_record(concepts[0], seed=2)]
    merged = merge_concepts(concepts, [1.0, -0.6], "fusion", records, preserved)
    for module in concepts[1].updates["unet"]:
        updates = [concept.updates["unet"][module] for concept in concepts]
        inputs = RecordedInputs(
            concepts=[record.concept["unet"][module] for record in records],
            preserved=[record.concept["unet"][module] for record in preserved],
            generic=[record.generic["unet"][module] for record in (*records, *preserved)],
        )
        expected = fuse_recorded(updates, [1.0, -0.6], inputs)
        assert torch.equal(to_dense(merged["unet"][module]), to_dense(expected))
    # Without records of the text encoder, its updates are summed.
    for module, update in merged["text_encoder"].items():
        torch.testing.assert_close(
            to_dense(update), to_dense(concepts[0].updates["text_encoder"][module])
        )


def median(updates: Sequence[LowRank], weights: Sequence[float], *, gain: float = 1.0) -> LowRank:
    dense = [weight * to_dense(u) for u, weight in zip(updates, weights, strict=True)]
    return from_dense(gain * torch.stack(dense).median(dim=0).values)


MEDIAN = MergeMethod(
    name="median",
    summary="the median of the updates",
    merge=median,
    settings=(Setting("gain", "Factor of the result", default=1.0, minimum=0.0, maximum=2.0),),
)


def test_registered_method_needs_no_other_change(concepts, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MERGES, "median", MEDIAN)
    merge = {"method": "median", "gain": 0.5}
    concepts = [concepts[0], concepts[1].renamed("tom")]
    customize.merge(*concepts, output=tmp_path / "duo", merge=merge)
    facts = json.loads((tmp_path / "duo" / "merged.json").read_text())
    assert (facts["method"], facts["settings"]) == ("median", {"gain": 0.5})
    layer = plan_merge(concepts, [1.0, 1.0], **merge)["unet"]["mid.attn1.to_q"]
    assert torch.equal(to_dense(layer.compute()), to_dense(median(layer.updates, [1, 1], gain=0.5)))
    for change, message in (
        ({"gain": 3.0}, "invalid gain 3.0 of the merge median: out of range"),
        ({"gian": 1.0}, "the merge median has no setting gian.*did you mean gain"),
        ({"method": "medain"}, "unknown merge method 'medain'.*did you mean median"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            customize.merge(*concepts, output=tmp_path / "new", merge={**merge, **change})
    with pytest.raises(ConfigError, match="the merge median needs at least 2 concepts, not 1"):
        customize.merge(concepts[0], output=tmp_path / "new", merge="median")
