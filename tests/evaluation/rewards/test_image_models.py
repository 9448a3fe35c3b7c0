"""Rewards of CLIP, BLIP and PickScore, and the aesthetic head, against transformers' classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipForImageTextRetrieval,
    CLIPModel,
)

from customize.errors import ConfigError, PipelineError
from customize.evaluation.rewards import load_reward
from customize.evaluation.rewards.aesthetic import HEAD_FILE
from tests.evaluation.making import pictures, pixels, save_blip, save_blip2, save_clip
from tests.evaluation.rewards.making import PROMPTS, save_aesthetic, videos

SAVE: dict[str, Callable[[Path], Path]] = {
    "clip": save_clip,
    "pick_score": save_clip,
    "aesthetic": save_aesthetic,
    "blip_itm": save_blip,
    "blip2_itm": save_blip2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


def clip_logits(folder: Path) -> tuple[Tensor, float]:
    """Logits of three pictures and their prompts by CLIPModel itself, and its logit scale."""
    model = CLIPModel.from_pretrained(folder).eval()
    text = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    output = model(pixel_values=pixels(folder, pictures(3)), **text)
    return output.logits_per_image.diagonal(), model.logit_scale.exp().item()


def expected(name: str, folder: Path) -> Tensor:
    """Scores of three pictures, one computation for each reward."""
    if name in ("clip", "pick_score"):
        logits, scale = clip_logits(folder)
        return logits / scale if name == "clip" else logits
    if name == "aesthetic":
        model, head = CLIPModel.from_pretrained(folder).eval(), load_file(folder / HEAD_FILE)
        pooled = model.vision_model(pixel_values=pixels(folder, pictures(3))).pooler_output
        embedded = model.visual_projection(pooled)
        unit = embedded / embedded.norm(dim=-1, keepdim=True)
        return (unit * head["weight"][0]).sum(-1) + head["bias"][0]
    loader: Any = BlipForImageTextRetrieval if name == "blip_itm" else Blip2ForImageTextRetrieval
    model, scores = loader.from_pretrained(folder).eval(), []
    for image, prompt in zip(pictures(3), PROMPTS, strict=True):
        if name == "blip_itm":
            text = AutoTokenizer.from_pretrained(folder)(
                prompt, return_tensors="pt", return_token_type_ids=False
            )
            answer = model(pixel_values=pixels(folder, [image]), **text).itm_score
        else:
            inputs = Blip2Processor.from_pretrained(folder)(
                images=image, text=prompt, return_tensors="pt"
            )
            answer = model(**inputs, use_image_text_matching_head=True).logits_per_image
        scores.append(answer.softmax(-1)[0, 1])
    return torch.stack(scores)


@torch.no_grad()
@pytest.mark.parametrize("name", SAVE)
def test_scores_equal_transformers(name: str, saved: dict[str, Path]) -> None:
    reward = load_reward(name, saved[name])
    scores = reward(pictures(3), PROMPTS)
    torch.testing.assert_close(scores, expected(name, saved[name]))
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    assert reward.name == name and scores.std() > 1e-4
    # A video has the mean of its frames.
    clip = videos(1, 4)[0]
    torch.testing.assert_close(reward([clip], PROMPTS[:1])[0], reward(clip, PROMPTS[:1] * 4).mean())


def test_aesthetic_scores_read_no_prompts(saved: dict[str, Path]) -> None:
    reward, images = load_reward("aesthetic", saved["aesthetic"]), pictures(3)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))


def test_pick_score_is_the_scaled_cosine(saved: dict[str, Path]) -> None:
    cosines = load_reward("clip", saved["clip"])(pictures(3), PROMPTS)
    scores = load_reward("pick_score", saved["clip"])(pictures(3), PROMPTS)
    scale = load_file(saved["clip"] / "model.safetensors")["logit_scale"].exp()
    torch.testing.assert_close(scores, scale * cosines)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "aesthetic head cannot be loaded"),
        ({"weight": torch.zeros(1, 12)}, "its tensors are.*bias"),
        ({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, r"\(1, 768\).*weight \(1, 12\)"),
        ({"weight": torch.zeros(1, 12), "bias": torch.tensor([torch.nan])}, "not finite"),
        ({"weight": torch.zeros(1, 12, dtype=torch.long), "bias": torch.zeros(1)}, "not finite"),
        (b"no tensors", "header is longer than the file"),
    ],
)
def test_damaged_heads_are_refused(
    head: dict[str, Tensor] | bytes | None, message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    for file in saved["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(head, bytes):
        (tmp_path / HEAD_FILE).write_bytes(head)
    elif head is not None:
        save_file(head, tmp_path / HEAD_FILE)
    with pytest.raises(PipelineError, match=message):
        load_reward("aesthetic", tmp_path)


def test_pickled_heads_are_not_read(saved: dict[str, Path], tmp_path: Path) -> None:
    for file in saved["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    head = {"weight": torch.zeros(1, 12), "bias": torch.zeros(1)}
    torch.save(head, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(PipelineError, match=r"aesthetic head cannot be loaded.*safetensors"):
        load_reward("aesthetic", tmp_path)


def test_aesthetic_needs_a_model() -> None:
    with pytest.raises(ConfigError, match=f"no published model.*CLIP ViT-L/14.*{HEAD_FILE}"):
        load_reward("aesthetic")
