"""Validation of concepts and their facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from customize.concepts.concept_info import BasisInfo
from customize.concepts.types import Concept
from customize.core.lowrank import LowRank
from customize.errors import ConceptError
from tests.concepts.making import facts, small


@pytest.mark.parametrize("name", ["rex", "rex-2", "a_b", "7", "r" * 64])
def test_valid_names(name: str) -> None:
    assert facts(name=name, trigger=f"<{name}>").name == name


@pytest.mark.parametrize(
    "name", ["", "Rex", "../rex", "a/b", "a\\b", ".", "-a", "r" * 65, "rex\n", "a b", "é", "a.b"]
)
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        facts(name=name)
    with pytest.raises(ValidationError):
        facts(trigger=f"<{name}>")


def test_facts_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        facts().name = "tom"
    with pytest.raises(ValidationError, match="colour"):
        facts(colour="red")
    with pytest.raises(ValidationError, match="not finite"):
        facts(scores={"drift": [1.0, {"x": float("nan")}]})
    for scores in ({"\ud800": 1.0}, {"drift": ["\udfff"]}):
        with pytest.raises(ValidationError, match="not valid Unicode"):
            facts(scores=scores)
    assert facts(alpha=3.0).scale == 1.5
    assert "T" in facts().created


@pytest.mark.parametrize("values", [{"seed": -1}, {"seed": 2**64}, {"scale": 0.0}, {"kind": "x"}])
def test_invalid_bases_are_refused(values) -> None:
    with pytest.raises(ValidationError):
        BasisInfo(**values)


Q = "mid.attn1.to_q"


def with_update(concept: Concept, component: str, module: str, update: LowRank) -> Concept:
    products = dict(concept.updates) | {
        component: {**concept.updates.get(component, {}), module: update}
    }
    return replace(concept, updates=products)


def test_updates_must_match_the_facts() -> None:
    concept = small()
    q = concept.updates["unet"][Q]
    nan = q.up.clone()
    nan[0, 0] = float("nan")
    cases = [
        (replace(q, scale=2.0), "scale 2.0"),
        (replace(q, up=nan), "NaN"),
        (replace(q, up=q.up[:, :1], down=q.down[:1]), "rank 1"),
        (replace(q, up=q.up.double()), "float64"),
        (LowRank(q.up, torch.ones(2, 9)), "widths 6, 8, but the layers have 6, 9"),
    ]
    for update, message in cases:
        with pytest.raises(ConceptError, match=message):
            with_update(concept, "unet", Q, update)
    for component, module in (("unet", "../x"), ("unet", ""), ("un.et", "x"), ("unet", "a..b")):
        with pytest.raises(ConceptError, match="name of the layer is invalid"):
            with_update(concept, component, module, q)


def test_missing_layers_or_tokens_are_refused() -> None:
    concept = small()
    for products in ({}, {"unet": {}}):
        with pytest.raises(ConceptError, match="has no updates"):
            replace(concept, updates=products)
    with pytest.raises(ConceptError, match="2 tokens and 0 sets"):
        replace(concept, embeddings={})
    with pytest.raises(ConceptError, match="0 tokens and 1 set"):
        replace(concept, info=facts(num_tokens=0))
    with pytest.raises(ConceptError, match="3, 6"):
        replace(concept, embeddings={"text_encoder": torch.ones(3, 6)})


@pytest.mark.parametrize("name", ["load", "save"])
def test_methods_of_earlier_versions_name_their_replacement(name: str) -> None:
    message = rf"Concept\.{name} was replaced by customize\.{name}_concept\("
    for owner in (Concept, small()):
        assert not hasattr(owner, name)
        with pytest.raises(AttributeError, match=message):
            getattr(owner, name)


def test_basis_is_stored_by_its_original_keys() -> None:
    basis = BasisInfo(num_shared_directions=4, shared_directions="0123456789abcdef")
    stored = {"kind": "cosine", "seed": 0, "scale": 1.0, "avoid": 4, "shared": "0123456789abcdef"}
    assert basis.model_dump() == stored and list(basis.model_dump()) == list(stored)
    assert BasisInfo.model_validate(stored, strict=True) == basis
    assert BasisInfo.model_validate_json(basis.model_dump_json(), strict=True) == basis
    assert list(BasisInfo().model_dump()) == ["kind", "seed", "scale"]
