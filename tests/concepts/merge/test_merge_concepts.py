from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from customize.concepts.formats.lora import Lora, LoraInfo
from customize.concepts.merge.merge_concepts import METHODS, merge, plan_merge
from customize.concepts.types import Concept
from customize.core.lowrank import LowRank, to_dense
from customize.core.merges import MERGES
from customize.errors import ConceptError, ConfigError
from tests.concepts.making import small


@pytest.fixture
def concepts() -> list[Concept]:
    rex = small(0)
    tom = small(1, name="tom", rank=3, alpha=6.0, method="lora", basis=None, slices={})
    # Tom leaves the text encoder alone.
    return [rex, replace(tom, updates={"unet": tom.updates["unet"]})]


@pytest.mark.parametrize(("method", "share"), [("sum", 1.0), ("average", 0.5)])
def test_merging_is_the_weighted_sum_of_dense_updates(concepts, method, share) -> None:
    weights = [1.0, -0.6]
    merged = merge(concepts, weights, method)
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


def test_what_cannot_be_merged(concepts: list[Concept]) -> None:
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [])
    with pytest.raises(ConfigError, match="1 weights were given for 2"):
        merge(concepts, [1.0])
    with pytest.raises(ConfigError, match="weight of tom is nan"):
        merge(concepts, [1.0, float("nan")])
    with pytest.raises(ConfigError, match="no merge slerp") as caught:
        merge(concepts, [1.0, 1.0], "slerp")
    assert all(method in str(caught.value) for method in METHODS)
    with pytest.raises(ConfigError, match="no setting seed"):
        merge(concepts, [1.0, 1.0], "ties", seed=1)
    with pytest.raises(ConceptError, match="two concepts are called rex"):
        merge([concepts[0], concepts[0]], [1.0, 1.0])


@pytest.mark.parametrize(
    "change", [{"family": "sd3"}, {"fingerprint": {"family": "sd", "denoiser": "other"}}]
)
def test_concepts_of_different_models_are_refused(concepts, change) -> None:
    with pytest.raises(ConceptError, match=r"rex was learned on sd .* and ann on"):
        merge([concepts[0], small(2, name="ann", **change)], [1.0, 1.0])


def test_updates_of_different_shape_name_the_layer(concepts: list[Concept]) -> None:
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
        merge([rex, other], [1.0, 1.0])


@pytest.mark.parametrize("method", ["magnitude", "dare", "ties"])
def test_a_method_merges_each_layer_by_itself_with_its_settings(concepts, method) -> None:
    weights = [1.0, -0.6]
    merged = merge(concepts, weights, method, density=0.4)
    if method != "dare":
        updates = [concept.updates["unet"]["mid.attn1.to_q"] for concept in concepts]
        expected = MERGES[method](updates, weights, density=0.4)
        assert torch.equal(to_dense(merged["unet"]["mid.attn1.to_q"]), to_dense(expected))
    zeros = [to_dense(u).eq(0).double().mean() for own in merged.values() for u in own.values()]
    assert 0.2 < float(sum(zeros)) / len(zeros) < 0.9
    assert merged["text_encoder"].keys() == concepts[0].updates["text_encoder"].keys()


def test_each_layer_and_seed_drops_others() -> None:
    up, down = torch.ones(6, 1), torch.ones(1, 7)
    layers = {"a.to_q": LowRank(up, down), "a.to_k": LowRank(up, down)}
    loras = [Lora(LoraInfo(name, "sd", "", 1), {"unet": layers}) for name in ("one", "two")]

    def dropped(seed: int) -> list[torch.Tensor]:
        merged = merge(loras, [1.0, 1.0], "dare", seed=seed)
        return [to_dense(update).eq(0) for update in merged["unet"].values()]

    first, again, other = dropped(0), dropped(0), dropped(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(*first)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fusion"])
def test_one_concept_is_as_it_is_or_refused(concepts: list[Concept], method: str) -> None:
    if method not in ("sum", "average"):
        with pytest.raises(ConfigError, match=f"{method} merges several concepts"):
            merge(concepts[:1], [0.5], method)
        return
    merged = merge(concepts[:1], [0.5], method)
    for component, own in merged.items():
        for module, update in own.items():
            expected = 0.5 * to_dense(concepts[0].updates[component][module])
            torch.testing.assert_close(to_dense(update), expected)


def test_a_subject_and_a_style_are_balanced_over_all_layers(concepts: list[Concept]) -> None:
    rex, tom = concepts
    merged = merge([rex, tom], [1.0, 1.0], "subject_style")
    louder = {
        component: {m: LowRank(u.up * 100, u.down, u.scale) for m, u in own.items()}
        for component, own in rex.updates.items()
    }
    loud = merge([replace(rex, updates=louder), tom], [0.01, 1.0], "subject_style")
    for module, update in merged["unet"].items():
        torch.testing.assert_close(to_dense(loud["unet"][module]), to_dense(update))
        own = to_dense(rex.updates["unet"][module]), to_dense(tom.updates["unet"][module])
        shares = torch.linalg.lstsq(
            torch.stack([each.flatten() for each in own], 1), to_dense(update).flatten()
        ).solution
        assert float(shares.sum()) == pytest.approx(1.0, abs=1e-3) and float(shares.min()) > -1e-3
    # A layer that one of them leaves alone is the other's.
    for module, update in merged["text_encoder"].items():
        torch.testing.assert_close(to_dense(update), to_dense(rex.updates["text_encoder"][module]))
    with pytest.raises(ConfigError, match="3 were given"):
        merge([rex, tom, small(2, name="ann")], [1.0] * 3, "subject_style")


def test_what_is_wider_than_its_concepts_is_narrowed_and_nothing_else(concepts) -> None:
    wide = plan_merge(concepts, [1.0, 1.0], "ties")["unet"]["mid.attn1.to_q"]
    exact = to_dense(wide.compute())
    found = wide.truncate()
    assert (wide.compute().rank, found.rank) == (8, 5)
    best = torch.linalg.svdvals(exact)[5:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(to_dense(found) - exact)
    assert float(error) == pytest.approx(float(best), rel=0.01)
    summed = plan_merge(concepts, [1.0, 1.0])["unet"]["mid.attn1.to_q"]
    assert torch.equal(to_dense(summed.truncate()), to_dense(summed.compute()))
