"""Initial weights from a base with other words."""

from __future__ import annotations

import torch

from customize.storybook import bundled_models
from scripts.storybook_training.base_files import load_start, save_base

WORDS = ("apple", "red", "tiger")


def parts(words, length):
    tokenizer = bundled_models.make_tokenizer(words, length)
    return bundled_models.make_text_encoder(tokenizer), tokenizer


def test_shared_tokens_and_positions_are_loaded(tmp_path):
    torch.manual_seed(0)
    text_encoder, tokenizer = parts(WORDS, 8)
    unet = bundled_models.make_unet()
    pipe = bundled_models.make_pipeline(bundled_models.make_vae(), text_encoder, tokenizer, unet)
    save_base(pipe, tmp_path, "drawn by hand")
    assert (tmp_path / "ATTRIBUTION.md").read_text() == "drawn by hand"

    own, own_tokenizer = parts(("moon", "red"), 12)
    own_unet = bundled_models.make_unet()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    load_start(tmp_path, own_unet, own, own_tokenizer)
    for name, value in own_unet.state_dict().items():
        assert torch.equal(value, unet.state_dict()[name].half().float()), name
    after, source = own.state_dict(), text_encoder.state_dict()
    ids, known = own_tokenizer.get_vocab(), tokenizer.get_vocab()
    for name, value in after.items():
        expected = source[name].half().float()
        if "token_embedding" in name:
            for token in ("red</w>", "a</w>", own_tokenizer.eos_token):
                assert torch.equal(value[ids[token]], expected[known[token]])
            assert torch.equal(value[ids["moon</w>"]], before[name][ids["moon</w>"]])
        elif "position_embedding" in name:
            assert torch.equal(value[:8], expected)
            assert torch.equal(value[8:], before[name][8:])
        else:
            assert torch.equal(value, expected), name


def test_words_outside_the_list_are_spelled():
    _, tokenizer = parts(WORDS, 32)
    assert [tokenizer.tokenize(word) for word in WORDS] == [[f"{word}</w>"] for word in WORDS]
    pieces = tokenizer.tokenize("zebra tigers")
    assert "".join(pieces) == "zebra</w>tigers</w>"
    assert len(tokenizer("a red tiger " * 20, truncation=True).input_ids) == 32
