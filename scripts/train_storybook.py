"""Make the storybook's base and judges from nothing: `scripts/train_storybook.py --preset cpu`.

Resumes from `--folder` whenever it is started again. Losses go to log.jsonl there, samples to PNG
files.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from customize.storybook import pretrain, train_judges


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=pretrain.PRESETS, default="cpu")
    parser.add_argument(
        "--folder",
        type=Path,
        help="checkpoints, log, samples, result; if not runs/storybook-PRESET",
    )
    parser.add_argument("--stage", choices=("base", "judges", "all"), default="all")
    parser.add_argument("--steps", type=positive, help="steps of the denoiser, if not the preset's")
    parser.add_argument("--start", type=Path, help="go on from this base's weights")
    parser.add_argument(
        "--vae-steps", type=int, help="steps of the autoencoder, if not the preset's; 0 keeps it"
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16: faster where the processor multiplies matrices in it",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads, if not all")
    args = parser.parse_args()
    preset = pretrain.PRESETS[args.preset]
    if args.steps:
        preset = replace(preset, steps=args.steps)
    if args.vae_steps:
        preset = replace(preset, vae_steps=args.vae_steps)
    if args.bf16:
        preset = replace(preset, bf16=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder = args.folder or Path("runs") / f"storybook-{args.preset}"
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.start and not (args.start / "model_index.json").is_file():
        parser.error(f"--start {args.start} is not a folder with a base model")
    if args.vae_steps == 0 and args.start is None:
        parser.error("--vae-steps 0 keeps the autoencoder of a base: name one with --start")
    if args.vae_steps == 0:
        vae = AutoencoderKL.from_pretrained(args.start, subfolder="vae").to(args.device)
    else:
        vae = pretrain.train_vae(args.folder, preset, args.device, args.start)
    if args.stage in ("judges", "all"):
        figures = train_judges.train_judges(
            args.folder / "judges",
            vae.cpu(),
            preset.judge_pictures,
            preset.judge_identities,
            preset.judge_steps,
        )
        print(f"the judges are in {args.folder / 'judges'}: {figures}")
    if args.stage in ("base", "all"):
        vae = vae.to(args.device)
        pipe = pretrain.train_denoiser(args.folder, preset, vae, args.device, args.start)
        pretrain.save_base(pipe, args.folder / "base")
        print(f"the base model is in {args.folder / 'base'}")


if __name__ == "__main__":
    main()
