"""The tiny pipelines of other tests: reproducible, and can be saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.tiny import WORDS, clip_tokenizer, t5_tokenizer, tiny_sd, tiny_sd3, tiny_sdxl


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = "a photo of a red dog"
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt").images


def test_every_word_is_one_token() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(word).input_ids) == 2, word


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_pipelines_are_reproducible_and_can_be_saved(build, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    pipe = build()
    assert torch.equal(torch.random.get_rng_state(), state)
    picture = draw(pipe)
    assert picture.shape == (1, 3, 32, 32)
    assert torch.equal(draw(build()), picture)

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), picture)
