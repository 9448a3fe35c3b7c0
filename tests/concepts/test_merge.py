from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from customize.concepts.concept import Concept
from customize.concepts.merge import merge
from customize.core.lowrank import product
from customize.errors import ConceptError, ConfigError
from tests.concepts.making import small


@pytest.fixture
def concepts() -> list[Concept]:
    rex = small(0)
    tom = small(1, name="tom", rank=3, alpha=6.0, method="lora", basis=None, slices={})
    # Tom leaves the text encoder alone.
    return [rex, replace(tom, products={"unet": tom.products["unet"]})]


@pytest.mark.parametrize(("method", "share"), [("sum", 1.0), ("average", 0.5)])
def test_merging_is_the_weighted_sum_of_dense_updates(concepts, method, share) -> None:
    weights = [1.0, -0.6]
    merged = merge(concepts, weights, method)
    assert set(merged) == {"unet", "text_encoder"}
    for component, updates in merged.items():
        for module, update in updates.items():
            expected = sum(
                share * weight * product(concept.products[component][module])
                for concept, weight in zip(concepts, weights, strict=True)
                if component in concept.products
            )
            assert torch.allclose(product(update), expected, atol=1e-5)
    assert merged["unet"]["mid.attn1.to_q"].rank == 5
    assert merged["text_encoder"].keys() == concepts[0].products["text_encoder"].keys()


def test_what_cannot_be_merged(concepts: list[Concept]) -> None:
    with pytest.raises(ConceptError, match="nothing to merge"):
        merge([], [])
    with pytest.raises(ConfigError, match="1 weights were given for 2"):
        merge(concepts, [1.0])
    with pytest.raises(ConfigError, match="weight of tom is nan"):
        merge(concepts, [1.0, float("nan")])
    with pytest.raises(ConfigError, match="no merge ties"):
        merge(concepts, [1.0, 1.0], "ties")
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
    update = rex.products["unet"]["mid.attn1.to_q"]
    other = replace(
        rex,
        info=rex.info.model_copy(update={"name": "ann"}),
        products={
            **rex.products,
            "unet": {
                **rex.products["unet"],
                "mid.attn1.to_q": replace(update, up=update.up[:4]),
            },
        },
    )
    with pytest.raises(ConceptError, match=r"unet\.mid\.attn1\.to_q"):
        merge([rex, other], [1.0, 1.0])
