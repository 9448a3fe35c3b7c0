"""Draw a video from a prompt and its rewriting: `python scripts/draw_rewritten_video.py`.

AnimateDiff draws on the bundled base. The storybook has no videos to train motion modules on, so
here they add nothing (their last layer is zero): each frame is a picture of its noise, and the
noise turns slowly from frame to frame. Writes the frames of the user's prompt above, those of its
rewriting below.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from PIL import Image
from torch import Tensor

import customize
from customize.evaluation.storybook_rates import GUIDANCE
from customize.storybook.bundled_assets import assets_folder

PROMPT = "crimson kitty wih spectacles at the seaside"
FRAMES, STEPS, SIDE, TURN = 8, 25, 128, math.pi / 6  # pixels of a shown frame; angle of the noise


def open_animatediff() -> Any:
    """AnimateDiff on the bundled base, with motion modules that add nothing."""
    base = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    config = base.unet.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=config.norm_num_groups,
    )
    for name, weight in adapter.named_parameters():
        if "proj_out" in name:
            weight.data.zero_()
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe = AnimateDiffPipeline(**{k: getattr(base, k) for k in names}, motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe.load_custom(customize.Rewriter.from_pretrained(assets_folder() / "rewriter"))


def turning_noise(seed: int, side: int) -> Tensor:
    """Noise (1, 4, FRAMES, side, side) that turns by `TURN` from the first frame to the last."""
    start, end = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(seed))
    angles = torch.linspace(0, TURN, FRAMES).view(-1, 1, 1, 1)
    return (start * angles.cos() + end * angles.sin()).transpose(0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/rewriting_video.png"))
    args = parser.parse_args()
    pipe = open_animatediff()
    side = pipe.unet.config.sample_size
    sheet = Image.new("RGB", (FRAMES * SIDE, 2 * SIDE))
    for row, rewrite in enumerate((False, True)):
        output = pipe(
            args.prompt,
            num_frames=FRAMES,
            height=side * pipe.vae_scale_factor,
            width=side * pipe.vae_scale_factor,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=turning_noise(args.seed, side),
            rewrite=rewrite,
        )
        print(output.prompts[0] if rewrite else args.prompt)
        for column, frame in enumerate(output.frames[0]):
            large = frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(large, (column * SIDE, row * SIDE))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)


if __name__ == "__main__":
    main()
