"""Adding, training and removing tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.concepts.tokens.token_rows import (
    TrainableRows,
    add_tokens,
    clamp_norm_,
    expand_prompt,
    initial_rows,
    norm_range,
    remove_tokens,
    token_ids,
    vocabulary_entries,
)
from customize.errors import ConceptError, ConfigError
from customize.families import family_of
from customize.families.pipeline_components import TokenDictionary
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl

TRIGGERS = {"<rex>": ["<rex>", "<rex>_1"], "<tom>": ["<tom>", "<tom>_1", "<tom>_2"]}


@pytest.fixture
def dictionary() -> TokenDictionary:
    return family_of(tiny_sd().components).token_dictionaries()[0]


def state(dictionary: TokenDictionary) -> tuple[str, int, torch.Tensor, int, int]:
    embedding = dictionary.text_encoder.get_input_embeddings()
    return (
        dictionary.tokenizer.backend_tokenizer.to_str(),
        len(dictionary.tokenizer),
        embedding.weight.detach().clone(),
        embedding.num_embeddings,
        dictionary.text_encoder.config.vocab_size,
    )


def equal_states(a, b) -> bool:
    return a[0] == b[0] and a[1] == b[1] and torch.equal(a[2], b[2]) and a[3:] == b[3:]


def encode(dictionary: TokenDictionary, text: str) -> torch.Tensor:
    ids = dictionary.tokenizer(text, return_tensors="pt").input_ids
    return dictionary.text_encoder(ids).last_hidden_state


def test_vocabulary_entries_match_diffusers() -> None:
    assert vocabulary_entries("<rex>", 1) == ["<rex>"]
    assert vocabulary_entries("<rex>", 3) == ["<rex>", "<rex>_1", "<rex>_2"]
    with pytest.raises(ConfigError, match="number of tokens 0"):
        vocabulary_entries("<rex>", 0)


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("a photo of <rex>", "a photo of <rex> <rex>_1"),
        ("<rex>'s hat, <TOM>", "<rex> <rex>_1's hat, <tom> <tom>_1 <tom>_2"),
        ("a <trex> and <rex-2>", "a <trex> and <rex-2>"),
        ("<rex> <rex>_1", "<rex> <rex>_1"),
        ("<rex><rex>", "<rex> <rex>_1<rex> <rex>_1"),
        ("<rex>_1", "<rex>_1"),
        ("", ""),
    ],
)
def test_expand_prompt(prompt: str, expanded: str) -> None:
    assert expand_prompt(prompt, TRIGGERS) == expanded


@given(
    st.lists(
        st.sampled_from(["<rex>", "<tom>", "<rex>_1", "<tom>_2", " ", "a", "_1", "<", "<Rex>"])
    ).map("".join)
)
def test_expand_prompt_is_idempotent(prompt: str) -> None:
    once = expand_prompt(prompt, TRIGGERS)
    assert expand_prompt(once, TRIGGERS) == once


def test_longer_trigger_is_expanded_first() -> None:
    triggers = {"rex": ["rex", "rex_1"], "big rex": ["big rex", "big rex_1"]}
    assert expand_prompt("big rex", triggers) == "big rex big rex_1"


def test_expanded_prompt_has_one_id_per_entry(dictionary: TokenDictionary) -> None:
    ids = add_tokens(dictionary, TRIGGERS["<rex>"], torch.ones(2, 32))
    ids += add_tokens(dictionary, TRIGGERS["<tom>"], torch.ones(3, 32))
    prompt_ids = dictionary.tokenizer(
        expand_prompt("<rex> <tom>", TRIGGERS), add_special_tokens=False
    ).input_ids
    assert prompt_ids == ids == token_ids(dictionary, [*TRIGGERS["<rex>"], *TRIGGERS["<tom>"]])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("padding", [0, 5])
def test_tokens_are_removed_bit_for_bit_in_any_order(order, padding: int) -> None:
    dictionary = family_of(tiny_sd().components).token_dictionaries()[0]
    embedding = dictionary.text_encoder.get_input_embeddings()
    if padding:
        dictionary.text_encoder.resize_token_embeddings(len(dictionary.tokenizer) + padding)
    before, words = state(dictionary), encode(dictionary, "a photo of a dog")
    names = [vocabulary_entries(f"<{letter}>", 2) for letter in "abc"]
    rows = [torch.full((2, 32), float(number)) for number in range(3)]
    for entries, values in zip(names, rows, strict=True):
        add_tokens(dictionary, entries, values)
    left = [0, 1, 2]
    for number in order:
        assert torch.equal(encode(dictionary, "a photo of a dog"), words)
        for other in left:
            ids = dictionary.tokenizer(" ".join(names[other]), add_special_tokens=False).input_ids
            assert torch.equal(embedding.weight[ids], rows[other])
        remove_tokens(dictionary, names[number])
        left.remove(number)
    assert equal_states(state(dictionary), before)
    assert torch.equal(encode(dictionary, "a photo of a dog"), words)


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (["<rex>", "<rex>_1"], torch.ones(2, 31), "width 32"),
        (["<rex>", "<rex>_1"], torch.ones(3, 32), "2 tokens"),
        (["<rex>", "<rex>_1"], torch.full((2, 32), float("nan")), "not finite"),
        (["<rex>", "dog</w>"], torch.ones(2, 32), "dog</w> already exist"),
        (["<rex>", "<rex>"], torch.ones(2, 32), "already exist"),
    ],
)
def test_invalid_tokens_change_nothing(dictionary, names, rows, message: str) -> None:
    before = state(dictionary)
    with pytest.raises(ConceptError, match=message):
        add_tokens(dictionary, names, rows)
    assert equal_states(state(dictionary), before)


def test_removing_unknown_tokens_changes_nothing(dictionary: TokenDictionary) -> None:
    before = state(dictionary)
    with pytest.raises(ConceptError, match="<rex> are not in the vocabulary"):
        remove_tokens(dictionary, ["<rex>"])
    with pytest.raises(ConceptError, match="original vocabulary"):
        remove_tokens(dictionary, ["dog</w>"])
    assert equal_states(state(dictionary), before)


def test_initial_rows(dictionary: TokenDictionary) -> None:
    table = dictionary.text_encoder.get_input_embeddings().weight.detach()
    dog, cat = dictionary.tokenizer("dog cat", add_special_tokens=False).input_ids
    rows = initial_rows(dictionary, "dog cat", 40, seed=1)
    assert rows.shape == (40, 32) and rows.dtype == torch.float32 and not rows.requires_grad
    assert torch.allclose(rows[-1], (table[dog] + table[cat]) / 2)
    assert abs(float(rows[:-1].std() / table.std()) - 1) < 0.1
    assert torch.equal(rows, initial_rows(dictionary, "dog cat", 40, seed=1))
    assert not torch.equal(rows[0], initial_rows(dictionary, "dog cat", 40, seed=2)[0])
    assert torch.equal(initial_rows(dictionary, "dog", 1, seed=0)[0], table[dog])
    with pytest.raises(ConfigError, match="class word"):
        initial_rows(dictionary, " ", 2, seed=0)


def test_only_the_new_rows_train(dictionary: TokenDictionary) -> None:
    names = vocabulary_entries("<rex>", 2)
    add_tokens(dictionary, names, initial_rows(dictionary, "dog", 2, seed=0))
    dictionary.text_encoder.requires_grad_(False)
    table = dictionary.text_encoder.get_input_embeddings().weight
    before, drawn = table.detach().clone(), encode(dictionary, "a <rex> <rex>_1 on")
    rows = TrainableRows(dictionary, names)
    assert torch.equal(encode(dictionary, "a <rex> <rex>_1 on"), drawn)

    encode(dictionary, "a <rex> <rex>_1 on")[..., 0].sum().backward()
    assert rows.parameter.grad is not None and rows.parameter.grad.abs().sum(1).min() > 0
    assert table.grad is None
    with torch.no_grad():
        rows.parameter += 1.0
    moved = encode(dictionary, "a <rex> <rex>_1 on")
    assert not torch.equal(moved, drawn) and torch.equal(table, before)

    rows.write()
    rows.remove()
    assert torch.equal(encode(dictionary, "a <rex> <rex>_1 on"), moved)
    assert torch.equal(table[: -len(names)], before[: -len(names)])


def test_two_concepts_train_at_the_same_time(dictionary: TokenDictionary) -> None:
    rows = []
    for trigger in ("<rex>", "<tom>"):
        add_tokens(dictionary, [trigger], initial_rows(dictionary, "dog", 1, seed=0))
        rows.append(TrainableRows(dictionary, [trigger]))
    encode(dictionary, "<tom>")[..., 0].sum().backward()
    assert float(rows[0].parameter.grad.abs().sum()) == 0
    assert float(rows[1].parameter.grad.abs().sum()) > 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(-6, 6))
def test_norms_are_clamped_to_the_range_of_the_vocabulary(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.randn(50, 8, generator=generator)
    rows = torch.randn(3, 8, generator=generator) * 10**exponent
    directions = torch.nn.functional.normalize(rows)
    low, high = norm_range(vocabulary).tolist()
    inside = (rows.norm(dim=1) >= low) & (rows.norm(dim=1) <= high)
    expected = rows[inside].clone()
    clamp_norm_(rows, vocabulary)
    norms = rows.norm(dim=1)
    assert (norms >= low * (1 - 1e-5)).all() and (norms <= high * (1 + 1e-5)).all()
    assert torch.allclose(torch.nn.functional.normalize(rows), directions, atol=1e-5)
    assert torch.equal(rows[inside], expected)


def test_range_of_norms_excludes_the_trained_rows(dictionary: TokenDictionary) -> None:
    add_tokens(dictionary, ["<rex>"], torch.full((1, 32), 100.0))
    table = dictionary.text_encoder.get_input_embeddings().weight.detach()
    rows = TrainableRows(dictionary, ["<rex>"])
    rows.clamp_norm_()
    assert torch.allclose(rows.parameter.norm(), norm_range(table[:-1])[1])


def test_float32_rows_are_cast_to_a_half_precision_table() -> None:
    family = family_of(tiny_sd3(t5=False).components)
    for dictionary in family.token_dictionaries():
        dictionary.text_encoder.half().requires_grad_(False)
        width = dictionary.text_encoder.config.hidden_size
        add_tokens(dictionary, ["<rex>"], torch.randn(1, width))
        rows = TrainableRows(dictionary, ["<rex>"])
        ids = dictionary.tokenizer("<rex>", return_tensors="pt").input_ids
        output = dictionary.text_encoder.get_input_embeddings()(ids)
        assert rows.parameter.dtype == torch.float32 and output.dtype == torch.float16
        output.float().sum().backward()
        assert rows.parameter.grad is not None


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
def test_pooled_embedding_depends_on_words_after_a_new_token(make) -> None:
    family = family_of(make().components)
    pooled = "pooled_prompt_embeds"
    plain = family.encode_prompts(["a dog"])[pooled]
    for dictionary in family.token_dictionaries():
        add_tokens(dictionary, ["<rex>"], initial_rows(dictionary, "dog", 1, 0))
    short, long = family.encode_prompts(["a <rex>", "a <rex> wearing a hat"])[pooled]
    assert not torch.allclose(short, long)
    # The row is the class word's, so the prompt pools as with the word itself.
    assert torch.allclose(short, plain[0], atol=1e-6)
    for dictionary in family.token_dictionaries():
        remove_tokens(dictionary, ["<rex>"])
    assert torch.equal(family.encode_prompts(["a dog"])[pooled], plain)


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
def test_pooling_position_is_restored_beside_other_added_tokens(make) -> None:
    family = family_of(make().components)
    for dictionary in family.token_dictionaries():
        dictionary.tokenizer.add_tokens(["<mine>"])
        dictionary.text_encoder.resize_token_embeddings(len(dictionary.tokenizer))
        config = dictionary.text_encoder.config
        add_tokens(dictionary, ["<rex>"], initial_rows(dictionary, "dog", 1, 0))
        add_tokens(dictionary, ["<tom>"], initial_rows(dictionary, "dog", 1, 0))
        assert ends(dictionary) == {dictionary.tokenizer.eos_token_id}
        remove_tokens(dictionary, ["<rex>"])
        assert ends(dictionary) == {dictionary.tokenizer.eos_token_id}
        remove_tokens(dictionary, ["<tom>"])
        assert ends(dictionary) == {2} and config.eos_token_id == 2


def ends(dictionary) -> set[int]:
    encoder = dictionary.text_encoder
    owners = [m for m in encoder.modules() if hasattr(m, "eos_token_id")]
    return {owner.eos_token_id for owner in (*owners, encoder.config)}
