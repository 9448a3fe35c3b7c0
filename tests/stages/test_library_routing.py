"""Prompts that attach concepts of a library, on tiny pipelines."""

from __future__ import annotations

import gc
import re
import shutil
import warnings
from operator import attrgetter

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import customize
from customize.concepts.input_statistics import layer_inputs_path
from customize.concepts.io.write_concept import save_concept
from customize.concepts.tokens.layerwise_embeddings import layers_with_embeddings
from customize.concepts.types import Concept
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import family_of
from customize.pipeline.stage import CallContext
from customize.pipeline.state import get_state
from customize.stages import library_routing
from tests.pipeline.making import MAKERS, assert_same, concept, draw, everything, modular, user_lora
from tests.tiny import tiny_qwen_image, tiny_sd, tiny_sdxl

pytestmark = pytest.mark.usefixtures("quick_recordings")

NAMES = ("rex", "tom", "kit")


def fill(folder, pipe, names=NAMES):
    for index, name in enumerate(names):
        save_concept(concept(pipe, name, index=index), folder / name)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("library"), tiny_sd())


@pytest.fixture
def copied(library, tmp_path):
    """A copy of the library that a test may change."""
    return shutil.copytree(library, tmp_path / "copied")


def by_name(make, folder, names, prompt):
    """Draw with exactly these concepts, loaded by name."""
    pipe = make()
    if names:
        pipe.load_custom(*(folder / name for name in names))
    return draw(pipe, prompt)


def active(pipe):
    return [row.name for row in pipe.custom.rows]


def state_of(pipe):
    state = get_state(pipe)
    assert state is not None
    return state


CALLS = [
    ("a photo of <rex>", ["rex"]),
    ("<tom> on the beach", ["tom"]),
    ("a dog", []),
    ("<rex> and <TOM>", ["rex", "tom"]),
    ("<tom> with <kit> and <rex>", ["kit", "rex", "tom"]),
    ("a photo of <rex>", ["rex"]),
]


@pytest.mark.parametrize("make", [*MAKERS.values(), tiny_qwen_image], ids=[*MAKERS, "qwen_image"])
def test_prompts_attach_exactly_the_named_concepts(make, tmp_path):
    pipe = make()
    fill(tmp_path, pipe)
    draw(pipe, "a dog")  # the first call sets attributes of the pipeline
    before = everything(pipe)
    pipe.load_custom(library=tmp_path)
    for prompt, names in CALLS:
        picture = draw(pipe, prompt)
        assert active(pipe) == names
        assert np.array_equal(picture, by_name(make, tmp_path, names, prompt)), prompt
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert "library" not in pipe.custom.reports


def test_concepts_loaded_by_name_stay_attached(library):
    pipe = tiny_sd().load_custom(library / "tom", library=library, weights=[0.5])
    both = draw(pipe, "<rex> and <tom>")
    assert active(pipe) == ["tom", "rex"]
    other = tiny_sd().load_custom(library / "tom", library / "rex", weights=[0.5, 1.0])
    assert np.array_equal(both, draw(other, "<rex> and <tom>"))
    draw(pipe, "a dog")
    assert active(pipe) == ["tom"] and pipe.custom.rows[0].weight == 0.5
    draw(pipe, "<rex>")
    pipe.load_custom(library / "rex")  # now also loaded by name
    draw(pipe, "a dog")
    assert active(pipe) == ["tom", "rex"]
    pipe.unload_custom("tom")
    draw(pipe, "<tom>")
    assert active(pipe) == ["rex", "tom"]


def test_weighted_concepts_stay_attached_and_fused_ones_stay_fused(library):
    pipe = tiny_sd().load_custom(library / "tom", fuse=True, library=library)
    picture = draw(pipe, "<rex> and <tom>")
    assert [row.mode for row in pipe.custom.rows] == ["fused", "adapter, by the prompt"]
    other = tiny_sd().load_custom(library / "tom", fuse=True).load_custom(library / "rex")
    assert np.array_equal(picture, draw(other, "<rex> and <tom>"))
    pipe.load_custom(weights={"rex": 0.5})
    draw(pipe, "<kit>")
    assert [(row.name, row.weight) for row in pipe.custom.rows] == [
        ("tom", 1.0),
        ("rex", 0.5),
        ("kit", 1.0),
    ]


def test_disabled_and_fused_layers_raise_errors(library):
    pipe = tiny_sd().load_custom(library=library)
    draw(pipe, "<rex>")
    draw(pipe, "a dog")
    pipe.unet.disable_adapters()
    with pytest.raises(PipelineError, match="switched off"):
        draw(pipe, "<rex>")
    pipe.unet.enable_adapters()
    draw(pipe, "<rex>")
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(PipelineError, match="fused into one"):
        draw(pipe, "<tom>")


def test_removed_adapters_are_attached_again(library):
    pipe = tiny_sd().load_custom(library=library)
    picture = draw(pipe, "<rex>")
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe, "<rex>"), picture)
    pipe.load_lora_weights(user_lora(pipe), adapter_name="mine")
    draw(pipe, "a dog")
    pipe.unload_custom()
    other = tiny_sd()
    other.load_lora_weights(user_lora(other), adapter_name="mine")
    assert np.array_equal(draw(pipe, "a dog"), draw(other, "a dog"))


@pytest.mark.parametrize(
    "prompts",
    [
        {"prompt": ["a dog", "<rex>"]},
        {"prompt": "a dog", "prompt_2": "<rex>"},
        {"prompt": "a dog", "negative_prompt": "<rex>"},
        {"prompt": ["a dog"], "negative_prompt_2": ["a <rex> cat"]},
    ],
)
def test_all_prompt_arguments_attach_concepts(prompts, tmp_path):
    pipe = tiny_sdxl()
    save_concept(concept(pipe), tmp_path / "rex")
    pipe.load_custom(library=tmp_path)
    pipe(**prompts, num_inference_steps=1, height=32, width=32, output_type="latent")
    assert active(pipe) == ["rex"]


def test_a_batch_is_drawn_with_the_concepts_of_all_its_prompts(library):
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}

    def pictures(pipe):
        noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(prompt=["<rex>", "<tom>"], generator=noise, **call).images

    pipe = tiny_sd().load_custom(library=library)
    other = tiny_sd().load_custom(library / "rex", library / "tom")
    assert np.array_equal(pictures(pipe), pictures(other))


def test_calls_without_prompts_leave_attached_concepts(library):
    pipe = tiny_sd().load_custom(library=library)
    expected = draw(pipe, "<rex>")
    embeds, negative = pipe.encode_prompt("<rex>", "cpu", 1, True)
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    picture = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=noise, **call
    ).images[0]
    assert active(pipe) == ["rex"] and np.array_equal(picture, expected)


def test_attached_concepts_are_not_attached_again(library, monkeypatch):
    pipe = tiny_sd().load_custom(library=library)
    draw(pipe, "<rex> and <tom>")
    monkeypatch.setattr(library_routing, "apply_attachments", None)
    draw(pipe, "<tom> and <rex> on the beach")


def test_cached_sets_are_not_read_merged_or_wrapped_again(library, monkeypatch):
    pipe = tiny_sd().load_custom(library=library)
    expected = {prompt: draw(pipe, prompt, together=False) for prompt, _ in CALLS}
    layers = {name: id(module) for name, module in pipe.unet.named_modules()}
    vocabulary = pipe.tokenizer.get_vocab()
    monkeypatch.setattr(library_routing, "read_sources", None)
    monkeypatch.setattr("customize.pipeline.transaction.plan_merge", None)
    for prompt, names in CALLS:
        assert np.array_equal(draw(pipe, prompt, together=False), expected[prompt])
        assert active(pipe) == names
    assert {name: id(module) for name, module in pipe.unet.named_modules()} == layers
    assert pipe.tokenizer.get_vocab() == vocabulary


def test_concepts_beyond_the_cache_size_are_read_again(library):
    pipe = tiny_sd()
    size = sum(path.stat().st_size for path in (library / "rex").glob("*.safetensors"))
    pipe.load_custom(library=library, library_cache=f"{1.2 * size / 2**30:.12f}GB")
    cache = state_of(pipe).update_cache
    for prompt, names in CALLS:
        assert np.array_equal(draw(pipe, prompt), by_name(tiny_sd, library, names, prompt))
        assert cache.size <= cache.limit
    pipe.load_custom(library=library, library_cache="0.000000001GB")
    for prompt, names in CALLS:
        assert np.array_equal(draw(pipe, prompt), by_name(tiny_sd, library, names, prompt))
        assert len(state_of(pipe).update_cache) == 0
        with pytest.MonkeyPatch.context() as patch:  # attached concepts are not read again
            patch.setattr(library_routing, "read_sources", None)
            draw(pipe, prompt)


def test_unknown_triggers_are_refused(library, tmp_path):
    pipe = tiny_sd().load_custom(library=library)
    draw(pipe, "<rex>")
    before = everything(pipe)
    with pytest.raises(
        ConfigError, match=r"names <Rexx>, and none of the 3 concepts .* it has <rex>"
    ):
        draw(pipe, "<Rexx> and <tom>")
    with pytest.raises(ConfigError, match="names <zebra>"):
        pipe(prompt="a dog", negative_prompt="<zebra>")
    assert active(pipe) == ["rex"]
    assert_same(before, everything(pipe))
    # Other characters and tokens of the vocabulary are not triggers.
    draw(pipe, "1 < 2 > 0, <3, <lora:x:0.5>, <|endoftext|>, < rex >, <>")
    (tmp_path / "empty").mkdir()
    pipe.load_custom(library=tmp_path / "empty")
    with pytest.raises(ConfigError, match="none of the 0 concepts of the library"):
        draw(pipe, "<rex>")
    draw(pipe, "a dog")


def test_tokens_of_the_user_are_not_triggers(library):
    pipe = tiny_sd()
    width = pipe.text_encoder.get_input_embeddings().weight.shape[1]
    for token in ("<mine>", "<rex>-style"):
        pipe.load_textual_inversion({token: torch.ones(width)}, token=token)
    expected = draw(pipe, "a <mine> and <rex>-style")
    pipe.load_custom(library=library)
    assert np.array_equal(draw(pipe, "a <mine> and <rex>-style"), expected)
    assert active(pipe) == []
    draw(pipe, "<rex> in <rex>-style")
    assert active(pipe) == ["rex"]


def test_triggers_of_lora_files_are_replaced_by_their_trigger_words(copied):
    words = {"modelspec.trigger_phrase": "red <wc> cup"}
    save_file(user_lora(tiny_sd()), copied / "Water.safetensors", words)
    save_file(user_lora(tiny_sd(), seed=3), copied / "in_blue.safetensors")
    pipe = tiny_sd().load_custom(library=copied)
    for prompt, source, replaced in (
        ("a dog, <water>", "Water.safetensors", "a dog, red <wc> cup"),
        ("a <WC> dog", "Water.safetensors", "a <WC> dog"),
        ("a dog <in_blue>", "in_blue.safetensors", "a dog in blue"),
    ):
        other = tiny_sd().load_custom(copied / source)
        assert np.array_equal(draw(pipe, prompt), draw(other, replaced)), prompt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, "<rex>, <water>")  # some layers are changed by one concept only
    assert active(pipe) == ["rex", "water"]
    pipe.unload_custom()
    # A LoRA loaded by name keeps its trigger words.
    pipe = tiny_sd().load_custom(copied / "Water.safetensors", library=copied)
    draw(pipe, "a <wc> dog")
    assert active(pipe) == ["water"]


def test_concepts_of_other_models_are_refused(copied):
    sdxl = tiny_sdxl()
    save_concept(concept(sdxl, "ann"), copied / "ann")
    save_concept(concept(sdxl, "rex"), copied / "rex-xl")
    larger = concept(tiny_sd(), "big").info.fingerprint | {"denoiser": "0" * 64}
    save_concept(concept(tiny_sd(), "big", fingerprint=larger), copied / "big")
    pipe = tiny_sd().load_custom(library=copied)
    assert "6 concepts, 3 of them for this model" in pipe.custom.reports["library"]
    for trigger in ("<ann>", "<big>"):
        with pytest.raises(ConceptError, match="differs from this pipeline's sd model"):
            draw(pipe, trigger)
    assert np.array_equal(draw(pipe, "<rex>"), by_name(tiny_sd, copied, ["rex"], "<rex>"))
    sdxl.load_custom(library=copied)
    assert np.array_equal(draw(sdxl, "<rex>"), by_name(tiny_sdxl, copied, ["rex-xl"], "<rex>"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rex: (rex / "concept.json").write_text("{"), "cannot be read: .* not valid JSON"),
        (lambda rex: (rex / "pytorch_lora_weights.safetensors").unlink(), "missing"),
        (lambda rex: (rex / "learned_embeds.safetensors").write_bytes(b"x" * 99), "damaged"),
        (lambda rex: _overwrite_entry(rex, float("nan")), "NaN"),
        (lambda rex: shutil.copytree(rex, rex.parent / "rex-2"), "calls 2 concepts .* rex, rex-2"),
        (lambda rex: _lora(rex, 0), "is empty"),
        (lambda rex: _lora(rex, 2, float("nan")), "NaN"),
        (lambda rex: shutil.rmtree(rex), "none of the 2 concepts of the library"),
    ],
)
def test_unusable_concepts_are_refused_and_change_nothing(copied, spoil, message):
    pipe = tiny_sd().load_custom(library=copied)
    picture = draw(pipe, "<tom>")
    before = everything(pipe)
    spoil(copied / "rex")
    with pytest.raises((ConceptError, ConfigError), match=message):
        draw(pipe, "<rex> and <tom>")
    assert active(pipe) == ["tom"]
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe, "<tom>"), picture)


def _overwrite_entry(rex, value):
    path = rex / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def _lora(rex, rank, value=1.0):
    shutil.rmtree(rex)
    tensors = user_lora(tiny_sd())
    for key, tensor in tensors.items():
        side = 0 if "lora_A" in key else 1
        tensors[key] = (tensor * value).narrow(side, 0, rank).contiguous()
    save_file(tensors, rex.parent / "rex.safetensors")


def test_changed_files_are_read_again(copied):
    pipe = tiny_sd().load_custom(library=copied)
    draw(pipe, "<rex> and <tom>")
    shutil.rmtree(copied / "rex")
    save_concept(concept(pipe, "rex", index=2), copied / "rex.safetensors")
    picture = draw(pipe, "<rex>")
    other = tiny_sd().load_custom(copied / "rex.safetensors")
    assert np.array_equal(picture, draw(other, "<rex>"))
    save_concept(concept(pipe, "new", index=1), copied / "new")
    draw(pipe, "<new>")
    assert active(pipe) == ["new"]


def test_sets_with_recorded_inputs_are_fused(copied):
    recording = tiny_sd()
    for name in NAMES:
        made = customize.record_inputs(recording, copied / name, ["a photo of {}"])
        made.save(layer_inputs_path(copied / name))
    pipe = tiny_sd().load_custom(library=copied)
    for names in (["rex", "tom"], ["kit", "tom"], ["rex", "tom"]):
        prompt = " and ".join(f"<{name}>" for name in names)
        other = tiny_sd().load_custom(*(copied / name for name in names), merge="fusion")
        assert np.array_equal(draw(pipe, prompt), draw(other, prompt))
        assert pipe.custom.merge == "fusion"
    (copied / "rex" / "layer_inputs.safetensors").unlink()
    with pytest.warns(UserWarning, match="summed, not fused"):
        draw(pipe, "<rex> and <kit>")
    assert pipe.custom.merge == "sum"


def test_inputs_are_recorded_once_per_concept(library, monkeypatch):
    pipe = tiny_sd().load_custom(library / "kit", library=library, merge="fusion")
    drawn_for = []
    real = customize.pipeline.merge_plan.record_concepts

    def counted(family, state, concepts, *arguments):
        drawn_for.extend(concept.info.name for concept in concepts)
        return real(family, state, concepts, *arguments)

    monkeypatch.setattr("customize.pipeline.merge_plan.record_concepts", counted)
    for prompt in ("<rex>", "a dog", "<tom>", "<rex>", "<rex> and <tom>"):
        draw(pipe, prompt)
    assert sorted(drawn_for) == ["kit", "rex", "tom"]


def test_modular_pipelines_use_libraries(tmp_path):
    pipe = tiny_sdxl()
    fill(tmp_path, pipe)
    blocks = modular(pipe).load_custom(library=tmp_path)
    for prompt, names in CALLS[:4]:
        picture = draw(blocks, prompt)
        assert active(blocks) == names
        assert np.array_equal(
            picture,
            draw(
                modular(tiny_sdxl().load_custom(*(tmp_path / name for name in names)))
                if names
                else modular(tiny_sdxl()),
                prompt,
            ),
        )
    blocks.unload_custom()
    assert type(blocks).__call__ is type(modular(tiny_sdxl())).__call__


def test_pipelines_with_shared_components_share_the_library(library):
    pipe = tiny_sd().load_custom(library=library)
    other = StableDiffusionImg2ImgPipeline(**pipe.components).load_custom()
    assert other.custom.reports == pipe.custom.reports
    picture = draw(pipe, "<rex>")
    call = {"image": torch.zeros(1, 3, 32, 32), "num_inference_steps": 2, "strength": 1.0}
    other(prompt="<tom>", **call)
    assert active(pipe) == active(other) == ["tom"]
    assert np.array_equal(draw(pipe, "<rex>"), picture)
    other.unload_custom()
    assert "library" not in pipe.custom.reports
    assert draw(pipe, "<rex>") is not None and active(pipe) == []


def test_the_library_is_reported_and_saving_is_refused(library, tmp_path):
    pipe = tiny_sd().load_custom(library=library)
    draw(pipe, "<rex> and <kit>")
    text = repr(pipe.custom)
    assert re.search(r"library: .*, 3 concepts, 3 of them .* named kit, rex; .* of 2 GB", text)
    assert text.count("adapter, by the prompt") == 2
    draw(pipe, "a dog")
    with pytest.raises(PipelineError, match="concepts of a library"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_custom()
    pipe.save_pretrained(tmp_path / "saved")


def test_invalid_libraries_are_refused_and_change_nothing(library, tmp_path):
    pipe = tiny_sd().load_custom(library / "rex")
    before = everything(pipe)
    for arguments, message in (
        ({"library": tmp_path / "none"}, "library cannot be read"),
        ({"library": 3}, "not a library"),
        ({"library": library, "library_cache": "much"}, "library_cache"),
        ({"library": library, "weights": {"ann": 1.0}}, "ann"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe.load_custom(**arguments)
        assert "library" not in pipe.custom.reports
    assert_same(before, everything(pipe))


@pytest.mark.parametrize(
    "step", ["concepts.adapter.replace_factors", "pipeline.set_tokens.add_tokens"]
)
def test_failed_calls_are_rolled_back(library, step, monkeypatch):
    pipe = tiny_sd().load_custom(library=library)
    picture = draw(pipe, "<rex>")
    before = everything(pipe)

    def fail(*args, **kwargs):
        monkeypatch.undo()
        raise MemoryError("full")

    monkeypatch.setattr(f"customize.{step}", fail)
    with pytest.raises(MemoryError):
        draw(pipe, "<tom>")
    assert active(pipe) == ["rex"]
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe, "<rex>"), picture)


@pytest.mark.parametrize("has_library", [True, False])
@pytest.mark.parametrize("step", ["set_tokens.add_tokens", "attach.set_state"])
def test_failed_loading_restores_the_previous_library(
    library, copied, step, has_library, monkeypatch
):
    pipe = tiny_sd()
    if has_library:
        pipe.load_custom(library=library)
        picture = draw(pipe, "<rex>")
        cache = state_of(pipe).get_setting(library_routing.LibraryCache)
    before, names = everything(pipe), [row.name for row in pipe.custom.rows]
    real = attrgetter(step)(customize.pipeline)
    errors: list[MemoryError] = []

    def fail_once(*args):
        if errors:
            raise errors.pop()
        real(*args)

    for sources in ([copied / "kit"], []) if step == "attach.set_state" else ([copied / "kit"],):
        errors[:] = [MemoryError("full")]
        monkeypatch.setattr(f"customize.pipeline.{step}", fail_once)
        with pytest.raises(MemoryError):
            pipe.load_custom(*sources, library=copied, library_cache="1GB")
    assert [row.name for row in pipe.custom.rows] == names
    if has_library:
        assert state_of(pipe).get_setting(library_routing.LibraryCache) is cache
        assert np.array_equal(draw(pipe, "<rex>"), picture)
    else:
        assert get_state(pipe) is None and not pipe.custom.reports
    if not has_library or step == "set_tokens.add_tokens":  # tokens of a library remain
        assert_same(before, everything(pipe))


def test_half_precision_and_inference_mode(library):
    pipe = tiny_sd().to(torch.bfloat16).load_custom(library=library)
    other = tiny_sd().to(torch.bfloat16).load_custom(library / "tom")
    with torch.inference_mode():
        draw(pipe, "<rex>")
        picture = draw(pipe, "<tom>")
    assert np.array_equal(picture, draw(other, "<tom>"))
    pipe.to(torch.float32)
    draw(pipe, "<rex>")
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters())


def test_layerwise_embeddings_are_added_and_removed_with_their_concept(copied):
    plain = concept(tiny_sd(), "lay", index=3)
    layers = len(layers_with_embeddings(family_of(tiny_sd().components)))
    noise = torch.Generator().manual_seed(0)
    rows = {
        key: torch.randn(2, layers, value.shape[1], generator=noise)
        for key, value in plain.embeddings.items()
    }
    info = plain.info.model_copy(update={"token_layers": layers})
    save_concept(Concept(info, plain.updates, rows), copied / "lay")
    pipe = tiny_sd().load_custom(library=copied)
    for prompt, names in (("<lay>", ["lay"]), ("<rex>", ["rex"]), ("<lay> <rex>", ["lay", "rex"])):
        assert np.array_equal(draw(pipe, prompt), by_name(tiny_sd, copied, names, prompt))


def _tensor_memory():
    gc.collect()
    tensors = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def switch(pipe, number):
    host = CallContext(pipe, state_of(pipe), {})
    with torch.no_grad(), library_routing.STAGE.run(host, {"prompt": f"<{NAMES[number % 3]}>"}):
        pass


@pytest.mark.slow
def test_memory_is_constant_over_1000_library_loads(library):
    pipe = tiny_sd()

    def cycle(number):
        pipe.load_custom(library=library)
        switch(pipe, number)
        pipe.unload_custom()

    for number in range(6):
        cycle(number)
    before = _tensor_memory()
    for number in range(1000):
        cycle(number)
    assert _tensor_memory() == before


@pytest.mark.slow
def test_memory_is_constant_over_1000_concept_switches(library):
    pipe = tiny_sd()
    size = sum(path.stat().st_size for path in (library / "rex").glob("*.safetensors"))
    # The cache fits one and a half concepts, so each is read again.
    pipe.load_custom(library=library, library_cache=f"{1.5 * size / 2**30:.12f}GB")
    for number in range(6):
        switch(pipe, number)
    before = _tensor_memory()
    for number in range(1002):
        switch(pipe, number)
    assert _tensor_memory() == before


def test_unused_factors_are_freed(library):
    pipe = tiny_sd().load_custom(library=library)
    draw(pipe, "<rex>")
    draw(pipe, "a dog")
    layers = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]
    assert layers and not any(layer.lora_B["customize"].weight.numel() for layer in layers)
    assert not any("customize" in layer.active_adapters for layer in layers)
