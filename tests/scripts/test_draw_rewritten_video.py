"""The script that draws a video from a prompt and its rewriting."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline

from customize.storybook.bundled_assets import assets_folder
from draw_rewritten_video import FRAMES, PROMPT, TURN, open_animatediff, turning_noise


def test_frames_are_pictures_of_the_base_and_of_the_rewriting():
    pipe = open_animatediff()
    base = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    noise = turning_noise(3, 16)
    assert noise.shape == (1, 4, FRAMES, 16, 16)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    output = pipe(PROMPT, num_frames=FRAMES, latents=noise, rewrite=True, **call)
    assert output.prompts != [PROMPT]
    expected = base(output.prompts, latents=noise[:, :, 0], **call).images
    np.testing.assert_allclose(output.frames[0][:1], expected, atol=1e-4)


def test_noise_turns_from_frame_to_frame_and_stays_noise():
    noise = turning_noise(5, 64)[0]
    assert abs(float(noise.std()) - 1) < 0.05
    steps = (noise[:, 1:] - noise[:, :-1]).square().mean((0, 2, 3)).sqrt()
    expected = TURN / (FRAMES - 1)
    torch.testing.assert_close(steps, torch.full_like(steps, expected), rtol=0.05, atol=0)
