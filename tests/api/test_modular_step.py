"""Concepts on modular pipelines, held against the standard pipelines of the same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ComponentsManager
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.components_manager import custom_offload_with_hook

from customize.errors import ConceptError, PipelineError
from customize.families import family_of
from customize.pipeline import transaction
from customize.pipeline.state import customized_components
from tests.pipeline.making import assert_same, concept, everything, modular
from tests.tiny import (
    drawn,
    short_prompts,
    tiny_flux,
    tiny_flux3,
    tiny_qwen_image,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_wan

PROMPT = "a photo of <rex> and <tom> on the beach"
SCALE = 4.0


class Case(NamedTuple):
    """One family.

    Attributes:
        make: its standard pipeline, or its modular one where it has no other.
        plain, guided: what tells a standard one to draw without guidance, and with the scale SCALE.
        original: whether it counts the scale from the prompt's own answer.
    """

    make: Callable[[], Any]
    plain: dict[str, Any] | None
    guided: dict[str, Any] | None
    original: bool = False


CASES = {
    "sdxl": Case(tiny_sdxl, {"guidance_scale": 1.0}, {"guidance_scale": SCALE}),
    # Without a negative prompt diffusers' modular pipeline hands the model none to lead away from.
    "sd3": Case(
        tiny_sd3, {"guidance_scale": 1.0}, {"guidance_scale": SCALE, "negative_prompt": ""}
    ),
    # Its guidance is an input of the model, and the same either way.
    "flux": Case(tiny_flux, {}, {}),
    # diffusers' two pipelines differ in a line break of the system's message.
    "flux2-dev": Case(tiny_flux2, None, None),
    "flux2-klein": Case(tiny_flux2_klein, {"guidance_scale": 1.0}, {"guidance_scale": SCALE}),
    "flux3": Case(tiny_flux3, None, None),
    "qwen_image": Case(
        tiny_qwen_image,
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": SCALE, "negative_prompt": ""},
    ),
    "qwen_image_21": Case(
        tiny_qwen_image_21,
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": SCALE, "negative_prompt": ""},
    ),
    "z_image": Case(tiny_z_image, {"guidance_scale": 0.0}, {"guidance_scale": SCALE}, True),
    # The modular one always reads the layers of the published model.
    "krea2": Case(
        lambda: tiny_krea2(layers=range(2, 36, 3)),
        {"guidance_scale": 0.0},
        {"guidance_scale": SCALE},
        True,
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PAIRS = {name: case for name, case in CASES.items() if case.plain is not None}
pairs = pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
modes = pytest.mark.parametrize("fuse", [False, True], ids=["adapter", "fused"])


def guided(pipe: Any, case: Case, scale: float | None) -> Any:
    """The same modular pipeline with guidance of that scale, or without."""
    if "guider" in pipe.components and pipe.guider is not None:
        pipe.guider = ClassifierFreeGuidance(
            guidance_scale=scale or 1.0,
            use_original_formulation=case.original,
            enabled=scale is not None,
        )
    return pipe


def draw(pipe: Any, prompt: str | None = PROMPT, **extra: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return drawn(pipe, prompt, generator=noise, **call, **short_prompts(pipe), **extra)[0]


@pairs
@modes
def test_images_equal_those_of_the_standard_pipeline(case: Case, fuse: bool) -> None:
    standard, pipe = case.make(), modular(case.make())
    rex, tom = concept(standard), concept(standard, "tom", index=1)
    bare = draw(guided(pipe, case, None))
    assert np.array_equal(bare, draw(standard, **case.plain))
    for loaded in (standard, pipe):
        assert loaded.load_custom(rex, tom, weights=[1.0, 0.5], fuse=fuse) is loaded
    assert pipe.custom.rows == standard.custom.rows
    picture = draw(pipe)
    assert np.abs(picture - bare).max() > 0.01
    assert np.array_equal(picture, draw(standard, **case.plain))
    assert case.guided is not None
    negative = {key: text for key, text in case.guided.items() if key == "negative_prompt"}
    np.testing.assert_allclose(  # the two guide in one call of the denoiser, or in two
        draw(guided(pipe, case, SCALE), **negative), draw(standard, **case.guided), atol=1e-5
    )


@cases
@modes
def test_concepts_are_loaded_and_unloaded_one_by_one(case: Case, fuse: bool) -> None:
    pipe = guided(modular(case.make()), case, None)
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    bare = draw(pipe)
    before = everything(pipe)
    pipe.load_custom(rex, fuse=fuse)
    alone = draw(pipe)
    pipe.load_custom(tom, fuse=fuse)
    both = draw(pipe)
    pipe.load_custom(weights={"tom": 0.25})
    weaker = draw(pipe)
    pictures = [bare, alone, both, weaker]
    for index, picture in enumerate(pictures):
        assert all(np.abs(picture - other).max() > 1e-4 for other in pictures[:index])
    pipe.unload_custom("tom")
    assert [row.name for row in pipe.custom.rows] == ["rex"]
    assert np.array_equal(draw(pipe), alone)
    pipe.unload_custom()
    assert pipe.custom.rows == ()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), bare)


@cases
def test_triggers_expand_where_tokens_can_be_added(case: Case) -> None:
    pipe = guided(modular(case.make()), case, None)
    rex = concept(pipe)
    pipe.load_custom(rex)
    dictionaries = family_of(pipe.components).token_dictionaries()
    assert bool(rex.embeddings) == bool(dictionaries)
    for dictionary in dictionaries:
        tokenizer = dictionary.tokenizer
        ids = tokenizer("a <rex>", add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids)[1:] == ["<rex>", "<rex>_1"]


@pairs
@modes
def test_modular_and_standard_pipelines_share_concepts(case: Case, fuse: bool, tmp_path) -> None:
    standard = case.make()
    pipe = guided(modular(standard), case, None)
    rex, tom = concept(standard), concept(standard, "tom", index=1)
    bare = draw(pipe)
    assert np.array_equal(bare, draw(standard, **case.plain))  # and leaves the libraries' own notes
    before = everything(pipe), everything(standard)
    standard.load_custom(rex, fuse=fuse)
    assert pipe.custom.rows == standard.custom.rows and len(pipe.custom.rows) == 1
    assert np.array_equal(draw(pipe), draw(standard, **case.plain))
    pipe.load_custom(tom, fuse=fuse)
    assert [row.name for row in standard.custom.rows] == ["rex", "tom"]
    assert np.array_equal(draw(pipe), draw(standard, **case.plain))
    if not fuse:
        with pytest.raises(PipelineError, match=r"concepts rex, tom are attached beside.*Fix: "):
            pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
        assert not (tmp_path / "saved").exists()
        if hasattr(pipe, "fuse_lora"):
            with pytest.raises(PipelineError, match=r"unload_custom could not.*Fix: "):
                pipe.fuse_lora()
    standard.unload_custom()
    assert pipe.custom.rows == ()
    assert_same(before[0], everything(pipe))
    assert_same(before[1], everything(standard))
    assert np.array_equal(draw(pipe), bare)


@pairs
def test_sharing_only_some_components_is_refused(case: Case) -> None:
    standard = case.make()
    family = family_of(standard.components)
    key = family.denoiser_key
    other = modular(standard)
    other.update_components(**{key: getattr(case.make(), key)})
    before = everything(other)
    standard.load_custom(concept(standard))
    attached = everything(standard)
    if customized_components(family).keys() == {
        key
    }:  # so that they share nothing that concepts change
        other.load_custom(concept(standard, "tom", index=1))
        assert [row.name for row in standard.custom.rows] == ["rex"]
        assert_same(attached, everything(standard))
        other.unload_custom()
        assert_same(before, everything(other))
        return
    with pytest.raises(
        PipelineError, match=rf"attached through another pipeline.*its {key}.*Fix: "
    ):
        other.load_custom(concept(standard, "tom", index=1))
    assert other.custom.rows == ()
    assert_same(attached, everything(standard))
    standard.unload_custom()
    assert_same(before, everything(other))
    other.load_custom(concept(standard, "tom", index=1))


@modes
@pytest.mark.parametrize("model", ["2.1", "2.2-14b"])
def test_wan_from_prompt_embeddings(model: Any, fuse: bool) -> None:
    # diffusers' step that encodes Wan's prompts asks for ftfy, and for guidance.
    standard = tiny_wan(model)
    pipe = modular(standard, without=("text_encoder",))
    for name in ("guider", "guider_2"):
        if name in pipe.components:
            pipe.update_components(**{name: ClassifierFreeGuidance(enabled=False)})
    with torch.no_grad():
        states = family_of(standard.components, standard.config).encode_prompts([PROMPT])
    prompt = states | {"negative_prompt_embeds": torch.zeros_like(states["prompt_embeds"])}

    def both() -> np.ndarray:
        picture = draw(pipe, None, **prompt)
        assert np.array_equal(picture, draw(standard, None, **prompt, guidance_scale=1.0))
        return picture

    bare = both()
    before = everything(standard)
    pipe.load_custom(concept(standard), fuse=fuse)
    assert standard.custom.rows == pipe.custom.rows
    assert np.abs(both() - bare).max() > 1e-3
    pipe.unload_custom()
    assert_same(before, everything(standard))
    assert np.array_equal(both(), bare)


@cases
def test_failures_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = modular(case.make())
    rex, tom = concept(pipe), concept(pipe, "tom", index=1)
    before = everything(pipe)

    keep = transaction.set_state
    failures = iter([MemoryError])

    def fails_once(*args: Any) -> None:
        for error in failures:
            raise error
        keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "set_state", fails_once)
        with pytest.raises(MemoryError):
            pipe.load_custom(rex)
    assert_same(before, everything(pipe))
    pipe.load_custom(rex)
    attached = everything(pipe)
    foreign = concept(CASES["sdxl" if case.make is tiny_flux else "flux"].make(), "tim")
    with pytest.raises(ConceptError, match=r"the concept tim was learned on .* differs"):
        pipe.load_custom(tom, foreign)
    assert_same(attached, everything(pipe))


@cases
@modes
def test_offloading_component_managers_stay_enabled(case: Case, fuse: bool) -> None:
    manager = ComponentsManager()
    pipe = guided(modular(case.make(), components_manager=manager), case, None)
    plain = guided(modular(case.make()), case, None)
    rex, bare = concept(plain), draw(plain)
    # As enable_auto_cpu_offload does, which asks for free memory that a CPU does not tell.
    hooks = [
        custom_offload_with_hook(name, part, torch.device("cpu"))
        for name, part in manager.components.items()
        if isinstance(part, torch.nn.Module)
    ]
    assert np.array_equal(draw(pipe), bare)
    before = everything(pipe)
    for customized in (pipe, plain):
        customized.load_custom(rex, fuse=fuse)
    assert np.array_equal(draw(pipe), draw(plain))
    pipe.load_custom(weights={"rex": 0.5})
    assert hooks and all(hook.model._hf_hook is hook.hook for hook in hooks)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), bare)


def test_pipelines_of_one_manager_share_concepts() -> None:
    manager = ComponentsManager()
    pipe = modular(tiny_sdxl(), components_manager=manager, collection="sdxl")
    rex = concept(pipe)
    other = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = manager.get_components_by_names(list(pipe.pretrained_component_names))
    other.update_components(**parts)
    other.load_custom(rex)
    assert pipe.custom.rows == other.custom.rows
    pipe.unload_custom()
    assert other.custom.rows == ()


def test_text_encoding_pipelines_share_concepts() -> None:
    pipe = modular(tiny_sdxl())
    whole = diffusers.StableDiffusionXLAutoBlocks().sub_blocks
    text = SequentialPipelineBlocks.from_blocks_dict(
        {"text": whole["text_encoder"]}
    ).init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text.update_components(**{name: getattr(pipe, name) for name in names})
    rex = concept(pipe)
    with pytest.raises(PipelineError, match=r"CLIPTextModel.*steps only.*has the denoiser too"):
        text.load_custom(rex)
    assert text.custom.rows == ()
    pipe.load_custom(rex)
    state = text(prompt=PROMPT)
    expected = family_of(pipe.components).encode_prompts([PROMPT])
    for name, value in expected.items():
        assert torch.equal(state.get(name), value)
    pipe.unload_custom()
    assert not torch.equal(text(prompt=PROMPT, output="prompt_embeds"), state.prompt_embeds)


def test_unloaded_components_are_requested() -> None:
    pipe = diffusers.ZImageAutoBlocks().init_pipeline()
    with pytest.raises(PipelineError, match=r"transformer: None.*Fix: load.*load_components\(\)"):
        pipe.load_custom(concept(tiny_z_image()))


def test_removed_text_encoders_are_restored() -> None:
    pipe = modular(tiny_sdxl())
    freed = pipe.text_encoder
    before = everything(pipe)
    pipe.load_custom(concept(pipe))
    pipe.unload_components("text_encoder")
    pipe.unload_custom()
    pipe.update_components(text_encoder=freed)
    assert_same(before, everything(pipe))


@cases
def test_pipelines_saved_with_fused_concepts_load_again(case: Case, tmp_path) -> None:
    pipe = guided(modular(case.make()), case, None)
    pipe.load_custom(concept(pipe), fuse=True)
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    again = diffusers.ModularPipeline.from_pretrained(str(tmp_path / "saved"))
    again.load_components()
    again.set_progress_bar_config(disable=True)
    parts = family_of(again.components).token_dictionaries()
    for dictionary in parts:
        assert {"<rex>", "<rex>_1"} <= dictionary.tokenizer.get_vocab().keys()
    key = family_of(pipe.components).denoiser_key
    ours, theirs = (getattr(saved, key).state_dict() for saved in (pipe, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
