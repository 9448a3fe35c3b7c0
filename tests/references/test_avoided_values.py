"""Avoided words in the values of reference tokens: what is removed, by attention head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from customize.families import family_of
from customize.references.adapter import LowRankUpdate
from customize.references.avoided_values import AvoidedText, TextValues
from customize.references.seams import seam_of
from customize.references.seams.attachment import AdaptedProjection, Attachment, RowTokens
from tests.references.test_seams import FAMILIES, WIDTH, make_call, random_adapter
from tests.tiny import tiny_sd

TEXT, HEADS, HEAD = 24, 3, 16


def linear(bias=False, seed=1):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Linear(TEXT, HEADS * HEAD, bias=bias)


def heads_of(values):
    """(rows, n, heads * width) -> (rows, heads, n, width)."""
    return torch.stack(values.chunk(HEADS, -1), dim=1)


@given(
    seed=st.integers(0, 10_000),
    words=st.integers(1, 3),
    strength=st.floats(0.0, 2.0),
    bias=st.booleans(),
)
def test_values_lose_the_words_by_head_and_nothing_else(seed, words, strength, bias):
    generator = torch.Generator().manual_seed(seed)
    layer = linear(bias, seed)
    text = torch.randn(2, words, TEXT, generator=generator)
    with torch.no_grad():
        plain = nn.functional.linear(text, layer.weight)  # differences of texts have no bias
    # Values that mostly consist of the words, in which the confidence is 1.
    mixed = torch.randn(2, 5, words, generator=generator)
    rest = 0.3 * torch.randn(2, 5, HEADS * HEAD, generator=generator)
    values = (mixed.sign() + mixed) @ plain + rest
    found = TextValues(layer, HEADS)
    directions = found.directions(text)
    changed = found.remove(values, directions, strength)
    for before, after, word in zip(
        heads_of(values).flatten(0, 1),
        heads_of(changed).flatten(0, 1),
        heads_of(plain).flatten(0, 1),
        strict=True,
    ):
        basis = torch.linalg.qr(word.T)[0]
        share = (before @ basis).square().sum(-1) / before.square().sum(-1)
        sure = share > 0.9
        inside, outside = before @ basis @ basis.T, before - before @ basis @ basis.T
        torch.testing.assert_close(after - after @ basis @ basis.T, outside, atol=1e-3, rtol=1e-3)
        expected = (1.0 - strength) * inside
        torch.testing.assert_close(
            (after @ basis @ basis.T)[sure], expected[sure], atol=2e-3, rtol=1e-3
        )


def test_values_that_do_not_show_the_word_stay_bit_for_bit():
    found = TextValues(linear(), HEADS)
    directions = found.directions(torch.randn(1, 1, TEXT))
    values = torch.randn(1, 7, HEADS * HEAD)
    by_head = heads_of(values)
    orthogonal = by_head - by_head @ directions.mT @ directions
    values = torch.cat(list(orthogonal.unbind(1)), dim=-1)
    assert torch.equal(found.remove(values, directions, 1.25), values)


def test_one_head_that_shows_the_word_is_changed_alone():
    layer = linear()
    found = TextValues(layer, HEADS)
    directions = found.directions(torch.randn(1, 1, TEXT))
    parts = [torch.zeros(4, HEAD) + 0.0 for _ in range(HEADS)]
    for head in range(HEADS):
        direction = directions[0, head]
        other = torch.randn(4, HEAD)
        other = other - other @ direction.T @ direction
        parts[head] = other + (
            3.0 * other.norm(dim=-1, keepdim=True) * direction if head == 1 else 0
        )
    values = torch.cat(parts, dim=-1)[None]
    changed = found.remove(values, directions, 1.0)
    before, after = heads_of(values)[0], heads_of(changed)[0]
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert (after[1] @ directions[0, 1].T).abs().max() < 1e-4


def test_words_without_values_change_nothing():
    found = TextValues(linear(), HEADS)
    values = torch.randn(2, 4, HEADS * HEAD)
    directions = found.directions(torch.zeros(2, 3, TEXT))
    assert torch.equal(found.remove(values, directions, 1.25), values)


def test_rows_have_words_of_their_own():
    found = TextValues(linear(), HEADS)
    one, two = torch.randn(1, TEXT), torch.randn(2, TEXT)
    padded = torch.stack([torch.cat([one, torch.zeros(1, TEXT)]), two])
    values = 10.0 * torch.randn(2, 6, HEADS * HEAD)
    together = found.remove(values, found.directions(padded), 1.0)
    for row, words in enumerate((one, two)):
        alone = found.remove(values[[row]], found.directions(words[None]), 1.0)
        torch.testing.assert_close(together[[row]], alone)
    assert not torch.equal(together, values)


def test_repeated_words_count_once():
    found = TextValues(linear(), HEADS)
    word = torch.randn(1, 1, TEXT)
    values = found._projection(word).repeat(1, 3, 1).detach()
    twice = found.directions(word.repeat(1, 2, 1))
    torch.testing.assert_close(
        found.remove(values, twice, 1.0),
        found.remove(values, found.directions(word), 1.0),
        atol=1e-5,
        rtol=0,
    )


def test_directions_are_those_of_the_base():
    layer, words = linear(), torch.randn(1, 2, TEXT)
    update = LowRankUpdate(HEADS * HEAD, TEXT, 2, 1.0)
    nn.init.normal_(update.lora_B.weight)
    adapted = AdaptedProjection(layer, update, Attachment(tiny_sd().unet, lambda a, _: a))
    expected = TextValues(layer, HEADS).directions(words)
    assert torch.equal(TextValues(adapted, HEADS).directions(words), expected)


def test_half_precision():
    layer = linear().to(torch.bfloat16)
    found = TextValues(layer, HEADS)
    words = torch.randn(1, 1, TEXT, dtype=torch.bfloat16)
    values = found._projection(words).detach().repeat(1, 2, 1)
    directions = found.directions(words)
    assert directions.shape == (1, HEADS, 1, HEAD)
    changed = found.remove(values, directions, 1.0)
    assert changed.dtype == torch.bfloat16
    assert changed.abs().max() < 0.05 * values.abs().max()


def values_of_tokens(family, adapter, row_tokens):
    """The values of reference tokens in each attention layer, and the prediction."""
    recorded = {}
    names = adapter.layers.attentions

    def record(name):
        return lambda _, __, output: recorded.__setitem__(name, output)

    predict = make_call(family)
    with (
        torch.no_grad(),
        seam_of(family).attached(family.denoiser, adapter) as attachment,
        attachment.condition(lambda _: row_tokens),
    ):
        for name in names:
            values = family.denoiser.get_submodule(name).processor.to_v_ip
            layer = values[0] if isinstance(values, nn.ModuleList) else values
            layer.register_forward_hook(record(name))
        prediction = predict()
        assert torch.equal(predict(), prediction)
    return recorded, prediction


@pytest.mark.parametrize("name", ["sd", "sdxl", "motion"])
def test_each_row_of_the_denoiser_avoids_its_own_words(name):
    family = FAMILIES[name]()
    adapter = random_adapter(family)
    torch.manual_seed(4)
    tokens = torch.randn(2, 4, WIDTH)
    width = family.denoiser.config.cross_attention_dim
    words = torch.stack([torch.zeros(2, width), torch.randn(2, width)])
    plain, before = values_of_tokens(family, adapter, RowTokens(tokens))
    avoided = RowTokens(tokens, None, AvoidedText(words, 1.25))
    changed, after = values_of_tokens(family, adapter, avoided)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-5
    layers_changed = 0
    for layer, values in plain.items():
        attention = family.denoiser.get_submodule(layer)
        found = TextValues(attention.to_v, attention.heads)
        expected = found.remove(values.reshape(2, 4, -1), found.directions(words), 1.25)
        torch.testing.assert_close(changed[layer].reshape(2, 4, -1), expected)
        assert torch.equal(changed[layer][0], values[0])
        layers_changed += not torch.equal(changed[layer], values)
    assert layers_changed


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_families_without_values_of_text_ignore_the_words(name):
    family = FAMILIES[name]()
    assert not seam_of(family).has_text_values
    adapter, tokens = random_adapter(family), torch.randn(2, 4, WIDTH)
    avoided = AvoidedText(torch.randn(2, 1, 32), 1.25)
    _, before = values_of_tokens(family, adapter, RowTokens(tokens))
    _, after = values_of_tokens(family, adapter, RowTokens(tokens, None, avoided))
    assert torch.equal(after, before)


def test_words_are_avoided_under_gradients_and_scales():
    family = family_of(tiny_sd().components)
    adapter = random_adapter(family)
    tokens = torch.randn(2, 4, WIDTH)
    words = torch.randn(2, 1, family.denoiser.config.cross_attention_dim)
    row_tokens = RowTokens(tokens, torch.tensor([1.0, 0.5]), AvoidedText(words, 1.0))
    predict = make_call(family)
    with (
        seam_of(family).attached(family.denoiser, adapter, 0.5) as attachment,
        attachment.condition(lambda _: row_tokens),
    ):
        with_gradients = predict()
        with torch.no_grad():
            torch.testing.assert_close(predict(), with_gradients.detach())
