"""BLIP and BLIP-2 against transformers' classes, one pair at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from customize.errors import ConfigError, PipelineError
from customize.evaluation.blip import Blip2Scorer, BlipScorer
from tests.evaluation.making import BLIP_LENGTH, pictures, pixels, save_blip, save_blip2

PROMPTS = ["a photo of a dog", "a striped cat on the beach", "two red cups"]
LONG = "a photo of " + "a dog and " * 20


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "placeholders"])
def blip2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BLIP-2 as its files were at first, and with placeholders of the image in the text."""
    return save_blip2(tmp_path_factory.mktemp("blip2"), placeholders=request.param)


def itm(logits: Tensor) -> Tensor:
    """The share of the second logit, written out."""
    return logits[:, 1].exp() / (logits[:, 0].exp() + logits[:, 1].exp())


@torch.no_grad()
def test_blip_equals_transformers(blip: Path) -> None:
    model = BlipForImageTextRetrieval.from_pretrained(blip).eval()
    tokenizer = AutoTokenizer.from_pretrained(blip)
    images = pictures(3)
    itc, matching = [], []
    for image, prompt in zip(images, PROMPTS, strict=True):
        text = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = {"pixel_values": pixels(blip, [image]), **text}
        itc.append(model(**inputs, use_itm_head=False).itm_score[:, 0])
        matching.append(itm(model(**inputs, use_itm_head=True).itm_score))
    actual = BlipScorer(blip).scores(images, PROMPTS)
    assert list(actual) == ["blip_itc", "blip_itm"]
    torch.testing.assert_close(actual["blip_itc"], torch.cat(itc))
    torch.testing.assert_close(actual["blip_itm"], torch.cat(matching))
    assert all(values.std() > 1e-3 for values in actual.values())


@torch.no_grad()
def test_blip_by_hand(blip: Path) -> None:
    model = BlipForImageTextRetrieval.from_pretrained(blip).eval()
    images = pictures(3)
    text = AutoTokenizer.from_pretrained(blip)(PROMPTS, padding=True, return_tensors="pt")
    assert text["attention_mask"].sum(1).tolist() == [7, 8, 5]
    text = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    seen = model.vision_model(pixel_values=pixels(blip, images)).last_hidden_state
    shown = model.vision_proj(seen[:, 0])
    text_features = model.text_proj(model.text_encoder(**text).last_hidden_state[:, 0])
    cosine = (shown * text_features).sum(-1) / shown.norm(dim=-1) / text_features.norm(dim=-1)
    both = model.text_encoder(**text, encoder_hidden_states=seen).last_hidden_state[:, 0]
    actual = BlipScorer(blip).scores(images, PROMPTS)
    torch.testing.assert_close(actual["blip_itc"], cosine)
    torch.testing.assert_close(actual["blip_itm"], itm(model.itm_head(both)))


@torch.no_grad()
def test_blip2_equals_transformers(blip2: Path) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(blip2).eval()
    processor = Blip2Processor.from_pretrained(blip2)
    images = pictures(3)
    itc, matching = [], []
    for image, prompt in zip(images, PROMPTS, strict=True):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        itc.append(model(**inputs).logits_per_image[:, 0])
        answer = model(**inputs, use_image_text_matching_head=True)
        matching.append(itm(answer.logits_per_image))
    actual = Blip2Scorer(blip2).scores(images, PROMPTS)
    assert list(actual) == ["blip2_itc", "blip2_itm"]
    torch.testing.assert_close(actual["blip2_itc"], torch.cat(itc))
    torch.testing.assert_close(actual["blip2_itm"], torch.cat(matching))
    assert all(values.std() > 1e-3 for values in actual.values())


@pytest.mark.parametrize("scorer", [BlipScorer, Blip2Scorer])
def test_each_image_is_scored_with_its_prompt(
    scorer: type[BlipScorer] | type[Blip2Scorer], tmp_path: Path
) -> None:
    made = scorer((save_blip if scorer is BlipScorer else save_blip2)(tmp_path))
    images = pictures(3)
    before = made.scores(images, PROMPTS)
    after = made.scores(images[::-1], PROMPTS[::-1])
    for name, values in before.items():
        torch.testing.assert_close(after[name].flip(0), values)
        assert not torch.allclose(made.scores(images, PROMPTS[::-1])[name][::2], values[::2])
    with pytest.raises(ConfigError, match="2 prompts for 3 images"):
        made.scores(images, PROMPTS[:2])


@pytest.mark.parametrize("scorer", [BlipScorer, Blip2Scorer])
def test_long_prompts_are_truncated(
    scorer: type[BlipScorer] | type[Blip2Scorer], tmp_path: Path
) -> None:
    made = scorer((save_blip if scorer is BlipScorer else save_blip2)(tmp_path))
    assert made.preprocessor.max_length == BLIP_LENGTH  # its positions, and not the tokenizer's 512
    images = pictures(1)
    cut = made.scores(images, [LONG])
    torch.testing.assert_close(made.scores(images, [LONG + "a cat"]), cut)
    short = made.scores(images, ["a photo of a dog and a dog and a cat"])
    assert all(not torch.allclose(short[name], values) for name, values in cut.items())


def test_captioning_models_are_refused(blip: Path, tmp_path: Path) -> None:
    """It is a BLIP as well, by its configuration."""
    for file in blip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = BlipConfig.from_pretrained(blip)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        PipelineError, match=r"lacks \d+ weights.*a complete BLIP image-text retrieval"
    ):
        BlipScorer(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("loader", "config", "millions"),
    [(BlipForImageTextRetrieval, BlipConfig, 224), (Blip2ForImageTextRetrieval, Blip2Config, 1115)],
)
def test_published_sizes_have_every_weight(loader: type, config: type, millions: int) -> None:
    """By the configurations' defaults, without memory."""
    with torch.device("meta"):
        model = loader(config())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    # No weight has two names, of which a file would have one.
    assert len({id(tensor) for tensor in model.parameters()}) == len(model.state_dict())
