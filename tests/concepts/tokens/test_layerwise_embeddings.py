"""Token embeddings of single cross-attention layers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customize.concepts.concept_info import parse_info
from customize.concepts.io import model_card
from customize.concepts.io.file_layout import EMBEDS_FILE, INFO_FILE, LAYERWISE_EMBEDS_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import write_folder, write_single_file
from customize.concepts.merge.write_merged_lora import write_merged
from customize.concepts.tokens.layerwise_embeddings import (
    contains_trigger,
    expand_for_layer,
    hook_cross_attention,
    hook_text_encoder,
    layer_vocabulary_entries,
    mean_rows,
    vocabulary_rows,
)
from customize.concepts.types import Concept
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.making import facts, same_tensors, small
from tests.tiny import CLIP_LENGTH, tiny_sd

LAYERS = 7  # cross-attention modules of tiny_sd


def layered(layers: int = 3, dtype: torch.dtype = torch.float32) -> Concept:
    plain = small()
    rows = torch.randn(2, layers, 6, generator=torch.Generator().manual_seed(5))
    info = plain.info.model_copy(update={"token_layers": layers})
    return replace(plain, info=info, embeddings={"text_encoder": rows.to(dtype)})


def test_entries_and_prompts_of_layers():
    assert layer_vocabulary_entries("<rex>", 2, 2) == [
        "<rex@0>",
        "<rex@0>_1",
        "<rex@1>",
        "<rex@1>_1",
    ]
    text = "a <rex> <rex>_1 and <TOM> <tom>_1, <REX> <rex>_1"
    worded = "a <rex@5> <rex@5>_1 and <TOM> <tom>_1, <rex@5> <rex@5>_1"
    assert expand_for_layer(text, ["<rex>"], 5) == worded
    assert contains_trigger("A <REX>", ["<rex>"]) and not contains_trigger("a rex", ["<rex>"])


def test_vocabulary_rows_are_the_mean_then_the_layers():
    rows = torch.arange(12.0).reshape(2, 3, 2)  # tokens, layers, width
    names, table = vocabulary_rows("<rex>", rows)
    assert names == ["<rex>", "<rex>_1", *layer_vocabulary_entries("<rex>", 2, 3)]
    assert torch.equal(table[:2], rows.mean(1))
    assert torch.equal(table[names.index("<rex@2>_1")], rows[1, 2])
    plain_names, plain = vocabulary_rows("<rex>", rows[:, 0])
    assert plain_names == ["<rex>", "<rex>_1"] and torch.equal(plain, rows[:, 0])


@torch.no_grad()
def test_text_encoder_accepts_ids_of_all_layers_while_hooked():
    pipe = tiny_sd()
    encoder, family = pipe.text_encoder, family_of(pipe.components)
    ids = pipe.tokenizer(
        ["a dog", "two red cups"] * LAYERS,
        padding="max_length",
        max_length=CLIP_LENGTH,
        return_tensors="pt",
    )
    arguments = {"attention_mask": ids.attention_mask, "output_hidden_states": True}
    expected = encoder(ids.input_ids, **arguments)
    hooks = hook_text_encoder(family)
    same = encoder(ids.input_ids, **arguments)
    assert torch.equal(same.last_hidden_state, expected.last_hidden_state)

    wide = ids.input_ids.reshape(2, -1)
    arguments["attention_mask"] = ids.attention_mask.reshape(2, -1)
    for output in (
        encoder(wide, **arguments),
        encoder(input_ids=wide, return_dict=False, **arguments),
    ):
        shape = (2, LAYERS * CLIP_LENGTH, 32)
        assert torch.equal(output[0], expected.last_hidden_state.reshape(shape))
        # The hidden states that clip_skip of diffusers selects.
        assert torch.equal(output[-1][-2], expected.hidden_states[-2].reshape(shape))
    for hook in hooks:
        hook.remove()
    with pytest.raises(ValueError, match="Sequence length"):
        encoder(wide)


@torch.no_grad()
def test_every_layer_reads_its_part_of_the_conditions():
    pipe = tiny_sd()
    unet, family = pipe.unet, family_of(pipe.components)
    names = family.cross_attention_layers()
    assert len(names) == LAYERS
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[name] = kwargs["encoder_hidden_states"]

        hooks.append(unet.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    generator = torch.Generator().manual_seed(0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([500, 20])
    one = torch.randn(2, CLIP_LENGTH, 32, generator=generator)
    before = family.predict(noisy, t, {"prompt_embeds": one})
    hooks = hook_cross_attention(family)
    for name in names:
        watch(name)
    assert torch.equal(family.predict(noisy, t, {"prompt_embeds": one}), before)
    repeated = {"prompt_embeds": one.repeat(1, LAYERS, 1)}
    assert torch.equal(family.predict(noisy, t, repeated), before)

    parts = torch.randn(LAYERS, 2, CLIP_LENGTH, 32, generator=generator)
    joined = torch.cat(list(parts), dim=1)
    different = family.predict(noisy, t, {"prompt_embeds": joined})
    assert not torch.allclose(different, before)
    for name, part in zip(names, parts, strict=True):
        assert torch.equal(seen[name], part)
    # Also beside the images of an IP-Adapter.
    attention, images = unet.get_submodule(names[2]), [torch.ones(2, 1, 4, 32)]
    ip: dict = {}
    attention.processor = lambda attn, x, encoder_hidden_states, **_: ip.update(
        given=encoder_hidden_states
    )
    attention(torch.zeros(2, 4, 32), encoder_hidden_states=(joined, images))
    assert torch.equal(ip["given"][0], parts[2]) and ip["given"][1] is images
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(dtype, tmp_path):
    concept = layered(dtype=dtype)
    write_folder(concept, tmp_path / "rex")
    loaded = load_concept(tmp_path / "rex")
    assert same_tensors(loaded, concept) and loaded.info == concept.info
    stock = load_file(tmp_path / "rex" / EMBEDS_FILE)
    assert list(stock) == ["<rex>"]
    assert torch.equal(stock["<rex>"], mean_rows(concept.embeddings["text_encoder"]))
    assert json.loads((tmp_path / "rex" / INFO_FILE).read_text())["token_layers"] == 3
    assert "in 3 layers" in model_card.concept_card(
        concept
    ) and "the mean over the layers" in model_card.concept_card(concept)

    write_single_file(concept, tmp_path / "rex.safetensors")
    assert same_tensors(load_concept(tmp_path / "rex.safetensors"), concept)
    write_merged([concept], [1.0], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "learned_embeds_rex.safetensors")
    assert torch.equal(merged["<rex>"], stock["<rex>"])

    write_folder(small(), tmp_path / "rex")
    assert not (tmp_path / "rex" / LAYERWISE_EMBEDS_FILE).exists()
    assert same_tensors(load_concept(tmp_path / "rex"), small())


def test_damaged_files_are_refused(tmp_path):
    concept = layered()
    rows = concept.embeddings["text_encoder"]
    path = write_folder(concept, tmp_path / "rex") / LAYERWISE_EMBEDS_FILE
    good = path.read_bytes()
    bad = {
        "the mean of": rows + 1.0,
        "differs from learned_embeds": rows[:, 0],
        "not that of the facts and tensors": rows.flip(1).contiguous(),  # of the same mean
    }
    for match, tensor in bad.items():
        save_file({"text_encoder": tensor.contiguous()}, path)
        with pytest.raises(ConceptError, match=match):
            load_concept(tmp_path / "rex")
    save_file({"text_encoder": rows, "other": rows + 1}, path)
    with pytest.raises(ConceptError, match="the keys text_encoder"):
        load_concept(tmp_path / "rex")
    path.write_bytes(good[:-9])
    with pytest.raises(ConceptError, match="the file is damaged"):
        load_concept(tmp_path / "rex")
    path.unlink()
    with pytest.raises(ConceptError, match="missing"):
        load_concept(tmp_path / "rex")
    path.write_bytes(good)
    assert same_tensors(load_concept(tmp_path / "rex"), concept)


def test_facts_and_embeddings_must_agree():
    concept = layered()
    with pytest.raises(ConceptError, match="do not fit 2 tokens in 4 layers"):
        replace(concept, info=facts(token_layers=4))
    with pytest.raises(ConceptError, match="do not fit 2 tokens"):
        replace(concept, info=facts())
    with pytest.raises(ConceptError, match="in 3 layers"):
        replace(small(), info=facts(token_layers=3))
    with pytest.raises(ConceptError, match="token_layers needs num_tokens"):
        parse_info(facts().model_dump() | {"num_tokens": 0, "token_layers": 3}, "here")
