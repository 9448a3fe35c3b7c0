"""The step that attaches concepts, in modular pipelines that are built from blocks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.modular_pipelines import ModularPipelineBlocks

from customize.api.modular_step import ConceptsStep
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.pipeline import attach
from tests.api.test_modular_step import CASES, Case, cases, draw, guided
from tests.pipeline.making import assert_same, concept, everything, modular

REPOSITORY = Path(__file__).parents[2] / "pipelines" / "concepts"


def with_step(case: Case, step: Any = None) -> tuple[Any, Any]:
    """A pipeline that begins with the step, and one of other, equal parts without it."""
    plain = guided(modular(case.make()), case, None)
    blocks = plain.blocks
    blocks.sub_blocks.insert("concepts", step or ConceptsStep(), 0)
    pipe = blocks.init_pipeline()
    parts = modular(case.make())
    pipe.update_components(**{key: getattr(parts, key) for key in parts.pretrained_component_names})
    assert type(pipe) is type(plain)
    return guided(pipe, case, None), plain


#: As with a step that attaches concepts, which comes too late for together= to be on by default.
UNROUTED = {"together": False}


@cases
def test_calls_draw_with_their_concepts(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    step = ModularPipelineBlocks.from_pretrained(str(REPOSITORY), trust_remote_code=True)
    assert type(step) is ConceptsStep
    pipe, plain = with_step(case, step)
    rex, tom = concept(plain), concept(plain, "tom", index=1)
    save_concept(rex, tmp_path / "rex")
    bare = draw(pipe)
    assert np.array_equal(bare, draw(plain))
    before = everything(pipe)
    both = draw(pipe, concepts=[rex, tom], concept_weights=[1.0, 0.5])
    plain.load_custom(rex, tom, weights=[1.0, 0.5])
    assert np.array_equal(both, draw(plain, **UNROUTED))
    assert np.array_equal(draw(pipe), both)  # as they stay
    alone = draw(pipe, concepts=str(tmp_path / "rex"))
    plain.unload_custom("tom")
    assert np.array_equal(alone, draw(plain))
    assert [(row.name, row.weight) for row in pipe.custom.rows] == [("rex", 1.0)]
    assert np.array_equal(draw(pipe, concepts=[]), bare)
    assert_same(before, everything(pipe))


def test_repeated_concepts_change_nothing_and_new_weights_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, plain = with_step(CASES["sdxl"])
    rex, tom = concept(plain), concept(plain, "tom", index=1)
    pipe.load_custom(rex, fuse=True)
    changes: list[Any] = []
    change = attach.apply_attachments
    monkeypatch.setattr(
        attach, "apply_attachments", lambda *args: (changes.append(args), change(*args))
    )
    calls: list[tuple[dict[str, Any], int, list[tuple[str, float, str]]]] = [
        ({}, 0, [("rex", 1.0, "fused")]),
        ({"concepts": [rex]}, 0, [("rex", 1.0, "fused")]),
        (
            {"concepts": [tom, rex], "concept_weights": {"tom": 0.5}},
            1,
            [("tom", 0.5, "adapter"), ("rex", 1.0, "fused")],
        ),
        ({"concepts": [tom, rex], "concept_weights": [0.5, 1.0]}, 1, []),
        (
            {"concepts": [tom, rex]},
            2,
            [("tom", 1.0, "adapter"), ("rex", 1.0, "fused")],
        ),
    ]
    for arguments, count, rows in calls:
        draw(pipe, **arguments)
        assert len(changes) == count
        attached = [(row.name, row.weight, row.mode) for row in pipe.custom.rows]
        assert attached == rows or not rows
    pipe.unet.delete_adapters("customize")
    draw(pipe, concepts=[tom, rex])
    assert pipe.custom.rows[0].mode == "adapter"


def test_invalid_concepts_stop_the_call_and_change_nothing() -> None:
    pipe, plain = with_step(CASES["sdxl"])
    rex = concept(plain)
    draw(pipe, concepts=[rex])
    before = everything(pipe)
    other = concept(plain, "rex", index=1)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"concepts": [other]}, ConceptError, "another concept called rex"),
        ({"concepts": 3}, ConfigError, "a int is not a concept"),
        ({"concepts": ["no such folder"]}, ConceptError, "no such folder"),
        ({"concepts": [rex, rex]}, ConceptError, "two concepts are called rex"),
        ({"concepts": [rex], "concept_weights": [1.0, 2.0]}, ConfigError, "2 weights"),
        ({"concept_weights": [1.0]}, ConfigError, "weights are given without concepts"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=rf"{message}.*Fix: "):
            draw(pipe, **arguments)
        assert_same(before, everything(pipe))


def test_triggers_are_checked_against_the_concepts_of_the_call() -> None:
    pipe, plain = with_step(CASES["sd3"])
    rex = concept(plain)

    def warned(**call: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(pipe, **call)
        return [str(warning.message) for warning in caught if "trigger" in str(warning.message)]

    assert warned(concepts=[rex], prompt="a photo of <rex>") == []
    assert warned(prompt="a photo of <rex>") == []
    (message,) = warned(concepts=[rex], prompt="a photo of <rexx>")
    assert "<rexx>" in message and "<rex>" in message.replace("<rexx>", "")


def test_step_without_models_is_refused() -> None:
    pipe = ConceptsStep().init_pipeline()
    with pytest.raises(PipelineError, match=r"no denoiser at all.*Fix: "):
        pipe(concepts=[concept(CASES["flux"].make())])


def test_inputs_are_documented() -> None:
    blocks = modular(CASES["flux"].make()).blocks
    blocks.sub_blocks.insert("concepts", ConceptsStep(), 0)
    assert {"concepts", "concept_weights", "prompt"} <= set(blocks.input_names)
    assert "concept_weights" in blocks.doc and blocks.model_name == "flux"
