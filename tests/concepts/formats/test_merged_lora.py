"""Parsing merged LoRAs: their updates, and the triggers of all their concepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customize.concepts.adapter import saved_module_name
from customize.concepts.formats.merged_lora import MERGED_HEADER
from customize.concepts.formats.open_adaptation import open_adaptation, open_without_pipeline
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library.library import Library, add_to_library
from customize.concepts.merge.merge_concepts import merge_concepts
from customize.concepts.merge.write_merged_lora import write_merged
from customize.concepts.tokens.subjects import (
    SUBJECTS_HEADER,
    Subject,
    subjects_from_header,
    subjects_to_header,
)
from customize.concepts.types import Lora
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import assert_close, dense_updates
from tests.concepts.making import small
from tests.pipeline.making import concept, draw
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tests.tiny_video import tiny_wan

PROMPT = "a photo of <rex> and <tom> on the beach"
WEIGHTS = [1.0, 0.8]


def two(pipe: Any) -> list[Any]:
    return [concept(pipe, "rex", index=0), concept(pipe, "tom", index=1)]


def layered(pipe: Any) -> list[Any]:
    """Two concepts, the first with embeddings for each cross-attention layer."""
    rex, tom = two(pipe)
    layers = len(family_of(pipe.components).cross_attention_layers())
    embeddings = {key: torch.randn(2, layers, r.shape[1]) for key, r in rex.embeddings.items()}
    info = rex.info.model_copy(update={"token_layers": layers})
    return [replace(rex, info=info, embeddings=embeddings), tom]


def by_file_names(made: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (component, saved_module_name(component, module)): delta
        for (component, module), delta in dense_updates(made).items()
    }


def folder(path: Path) -> Path:
    return path


def single(path: Path) -> Path:
    """A copy of the LoRA file, without the files beside it."""
    away = path.parent / "away"
    away.mkdir()
    return shutil.copy(lora_of(path), away / f"{path.name}.safetensors")


def lora_of(path: Path) -> Path:
    kohya = path / f"{path.name}.safetensors"
    return kohya if kohya.is_file() else path / "pytorch_lora_weights.safetensors"


WRITTEN = [
    (tiny_sd, "diffusers"),
    (tiny_sd, "kohya"),
    (tiny_sdxl, "diffusers"),
    (tiny_sdxl, "kohya"),
    (tiny_sd3, "diffusers"),
    (tiny_sd3, "kohya"),
    (tiny_flux, "diffusers"),
    (tiny_flux, "kohya"),
]


@pytest.mark.parametrize(("make", "layout"), WRITTEN)
def test_merged_lora_gives_the_images_of_its_concepts(
    make: Callable[[], Any], layout: str, tmp_path: Path
) -> None:
    pipe = make()
    concepts = two(pipe)
    family = family_of(pipe.components)
    write_merged(concepts, WEIGHTS, tmp_path / "duo", layout=layout, family=family)
    prompt = PROMPT if concepts[0].subjects else "a photo of a dog"
    plain = draw(pipe, prompt)
    expected = draw(pipe.load_custom(*concepts, weights=WEIGHTS, merge="sum"), prompt)
    pipe.unload_custom()
    for named in (folder, single, lora_of):
        pipe.load_custom(named(tmp_path / "duo"))
        assert [row.name for row in pipe.custom.rows] == ["duo"]
        assert pipe.custom.rows[0].trigger == "<rex> and <tom>"
        actual = draw(pipe, prompt)
        pipe.unload_custom()
        assert np.array_equal(draw(pipe, prompt), plain)
        assert np.abs(actual - expected).max() <= 1e-5 < np.abs(actual - plain).max()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("make", [two, layered])
def test_merged_updates_and_embeddings_equal_the_concepts(
    make: Callable[[Any], list[Any]], layout: str, tmp_path: Path
) -> None:
    pipe = tiny_sd()
    concepts = make(pipe)
    write_merged(concepts, WEIGHTS, tmp_path / "duo", layout=layout)
    actual = open_without_pipeline(tmp_path / "duo")
    assert isinstance(actual, Lora)
    assert actual.info.fingerprint == concepts[0].info.fingerprint
    expected = Lora(actual.info, merge_concepts(concepts, WEIGHTS))
    assert_close(dense_updates(actual), by_file_names(expected))
    assert [subject.trigger for subject in actual.subjects] == ["<rex>", "<tom>"]
    for subject, made in zip(actual.subjects, concepts, strict=True):
        assert subject.class_word == made.info.class_word
        assert subject.embeddings.keys() == made.embeddings.keys()
        for key, rows in made.embeddings.items():
            assert torch.equal(subject.embeddings[key], rows)


def test_layerwise_embeddings_are_restored(tmp_path: Path) -> None:
    pipe = tiny_sd()
    concepts = layered(pipe)
    write_merged(concepts, WEIGHTS, tmp_path / "duo")
    actual = draw(pipe.load_custom(tmp_path / "duo"), PROMPT)
    pipe.unload_custom()
    expected = draw(pipe.load_custom(*concepts, weights=WEIGHTS, merge="sum"), PROMPT)
    assert np.abs(actual - expected).max() <= 1e-5


def test_joined_kohya_layers_are_split_again(tmp_path: Path) -> None:
    """Also if only some of them change."""
    pipe = tiny_flux()
    rex = concept(pipe)
    part = {m: u for n, (m, u) in enumerate(rex.updates["transformer"].items()) if n % 2}
    some = replace(rex, updates={**rex.updates, "transformer": part})
    family = family_of(pipe.components)
    write_merged([some], [1.0], tmp_path / "duo", layout="kohya", family=family)
    assert_close(dense_updates(open_without_pipeline(tmp_path / "duo")), by_file_names(some))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_merged_lora_can_be_merged_again(layout: str, tmp_path: Path) -> None:
    pipe = tiny_sd()
    rex, tom, max_ = *two(pipe), concept(pipe, "max", index=2)
    write_merged([rex, tom], WEIGHTS, tmp_path / "duo", layout=layout)
    write_merged([open_without_pipeline(tmp_path / "duo"), max_], [0.5, 1.0], tmp_path / "trio")
    prompt = f"{PROMPT} with <max>"
    actual = draw(pipe.load_custom(tmp_path / "trio"), prompt)
    assert pipe.custom.rows[0].trigger == "<rex> and <tom> and <max>"
    pipe.unload_custom()
    pipe.load_custom(rex, tom, max_, weights=[0.5, 0.4, 1.0], merge="sum")
    assert np.abs(actual - draw(pipe, prompt)).max() <= 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_library_finds_a_merge_by_all_triggers(layout: str, tmp_path: Path) -> None:
    pipe = tiny_sd()
    concepts = two(pipe)
    write_merged(concepts, WEIGHTS, tmp_path / "duo", layout=layout)
    for source in (tmp_path / "duo", lora_of(tmp_path / "duo")):
        library = tmp_path / f"library-{source.suffix}"
        entry = add_to_library(library, source)
        assert entry.trigger_tokens == {"<duo>", "<rex>", "<tom>"} and not entry.error
        assert entry.family == "sd" and entry.rank == 4
        with pytest.raises(ConceptError, match="already has the concept duo"):
            add_to_library(library, source)
        save_concept(concepts[0], tmp_path / f"rex-{source.suffix}")
        with pytest.raises(
            ConceptError, match="already has the concept duo with the trigger <rex>"
        ):
            add_to_library(library, tmp_path / f"rex-{source.suffix}")
        pipe.load_custom(library=library)
        actual = draw(pipe, PROMPT)
        pipe.unload_custom()
        pipe.load_custom(*concepts, weights=WEIGHTS, merge="sum")
        assert np.abs(actual - draw(pipe, PROMPT)).max() <= 1e-5
        pipe.unload_custom()
        assert len(Library(library).entries) == 1


def test_a_pair_of_denoisers_needs_both_files(tmp_path: Path) -> None:
    pipe = tiny_wan("2.2-14b")
    write_merged(two(pipe), WEIGHTS, tmp_path / "duo")
    (tmp_path / "duo" / "pytorch_lora_weights_2.safetensors").unlink()
    with pytest.raises(ConceptError, match=r"lacks its updates of transformer_2.*weights_2"):
        open_adaptation(tmp_path / "duo")


def test_lora_file_of_a_concept_is_opened_as_the_concept(tmp_path: Path) -> None:
    rex = small()
    save_concept(rex, tmp_path / "rex")
    actual = open_adaptation(tmp_path / "rex" / "pytorch_lora_weights.safetensors")
    assert actual.info == rex.info and actual.source == tmp_path / "rex"


def test_merge_of_one_concept_can_be_renamed(tmp_path: Path) -> None:
    pipe = tiny_sd()
    rex = concept(pipe)
    write_merged([rex], [1.0], tmp_path / "small", rank=2)
    pipe.load_custom(rex, tmp_path / "small", names=[None, "other"], merge="sum")
    assert [row.trigger for row in pipe.custom.rows] == ["<rex>", "<other>"]
    pipe.unload_custom()
    with pytest.raises(ConceptError, match=r"same trigger <rex>.*small-2"):
        pipe.load_custom(rex, tmp_path / "small")
    pipe.load_custom(rex, tmp_path / "small", names=[None, "small-2"], merge="sum")
    pipe.unload_custom()
    write_merged(two(pipe), WEIGHTS, tmp_path / "duo")
    with pytest.raises(ConceptError, match=r"same trigger <rex>.*rex-2"):
        pipe.load_custom(rex, tmp_path / "duo")
    pipe.load_custom(rex, tmp_path / "duo", names=["rex-2", None], merge="sum")


def test_merge_of_another_base_is_refused(tmp_path: Path) -> None:
    write_merged(two(tiny_sd()), WEIGHTS, tmp_path / "duo")
    with pytest.raises(ConceptError, match="duo was learned on sd"):
        tiny_sd3().load_custom(tmp_path / "duo")


def test_two_subjects_of_one_trigger_are_refused(tmp_path: Path) -> None:
    pipe = tiny_sd()
    rex, tom = two(pipe)
    write_merged([rex, tom], WEIGHTS, tmp_path / "duo")
    with pytest.raises(ConceptError, match="rex and rex, have the same trigger <rex>"):
        write_merged([rex, open_without_pipeline(tmp_path / "duo")], WEIGHTS, tmp_path / "trio")
    assert not (tmp_path / "trio").exists()


DAMAGES = {
    "no JSON": "{",
    "no list": "{}",
    "no name": json.dumps([{"name": "../x", "trigger": "<x>", "class_word": "", "embeddings": {}}]),
    "numbers": "[1, 2]",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    write_merged(two(tiny_sd()), WEIGHTS, tmp_path / "duo")
    path = tmp_path / "duo" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | {SUBJECTS_HEADER: DAMAGES[damage]})
    with pytest.raises(ConceptError, match="trigger embeddings"):
        open_adaptation(tmp_path / "duo")


def test_inconsistent_row_ranges_are_refused(tmp_path: Path) -> None:
    write_merged(two(tiny_sd()), WEIGHTS, tmp_path / "duo", layout="kohya")
    path = tmp_path / "duo" / "duo.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    facts = json.loads(header[MERGED_HEADER])
    facts["layers"] = {k: [[*v[0][:2], 0, 10**6]] for k, v in facts["layers"].items()}
    save_file(load_file(path), path, header | {MERGED_HEADER: json.dumps(facts)})
    with pytest.raises(ConceptError, match="header and its updates disagree"):
        open_adaptation(path)


shapes = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)),
)


@given(shapes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.text("ab "))
def test_subjects_round_trip_through_the_header(
    shape: tuple[int, ...], dtype: Any, word: str
) -> None:
    rows = torch.randn(shape).to(dtype)
    subject = Subject("rex", "<rex>", word, {"text_encoder": rows, "text_encoder_2": rows[..., :1]})
    (actual,) = subjects_from_header(subjects_to_header([subject]), "here")
    assert (actual.name, actual.trigger, actual.class_word) == ("rex", "<rex>", word)
    assert actual.num_tokens == shape[0]
    assert actual.token_layers == (shape[1] if len(shape) == 3 else 0)
    for key, rows in subject.embeddings.items():
        assert actual.embeddings[key].dtype == dtype and torch.equal(actual.embeddings[key], rows)
