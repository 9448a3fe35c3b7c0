"""Train a world's base from scratch, and its judges.

    scripts/train_storybook.py --preset cpu
    scripts/train_storybook.py --world stickers --start assets/storybook --bf16
    scripts/train_storybook.py --world stickers --stage judges --start BASE --vae-steps 0 --bf16

The storybook is a test world of eight classes (drawn); stickers are emoji by several artists on
coloured grounds, whose artwork `make stickers` installs. Judges are trained on drawings that the
autoencoder degraded: that of the run, or of BASE. Run the script again to resume from
`--folder`, which receives losses (log.jsonl) and samples (PNG).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from customize.errors import CustomizeError
from customize.stickers.subjects import CHOICES
from storybook_training import pretrain_base
from storybook_training.base_files import save_base
from storybook_training.contact_sheet import save_captioned_sheet
from storybook_training.worlds import WORLDS, World, open_world


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def choose_preset(args: argparse.Namespace, world: World) -> pretrain_base.Preset:
    """The preset, with the world's shares and what the command line changes."""
    given = {
        "scenes": args.scenes,
        "steps": args.steps,
        "vae_steps": args.vae_steps or None,
        "bf16": args.bf16 or None,
        "two": world.two if args.two is None else args.two,
        "wide": world.wide if args.wide is None else args.wide,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(pretrain_base.PRESETS[args.preset], **changes)


def save_sheet(world: World, preset: pretrain_base.Preset, path: Path) -> None:
    """Save a PNG of 40 training scenes, the last 10 of them wide, with their captions."""
    widths = [64] * 30 + [96] * 5 + [128] * 5
    scenes = [
        world.training_scene(preset.seed, k, preset.two, width) for k, width in enumerate(widths)
    ]
    captions = [world.caption(s, np.random.default_rng(k)) for k, s in enumerate(scenes)]
    save_captioned_sheet([world.draw(scene) for scene in scenes], captions, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=WORLDS, default="storybook")
    parser.add_argument(
        "--subjects",
        choices=CHOICES,
        default="common",
        help="of stickers: some 300 common ones (default), or all, for a GPU",
    )
    parser.add_argument(
        "--artwork", type=Path, help="of stickers: its folder (default: that of make stickers)"
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        help="only save a PNG of 40 training scenes with their captions",
    )
    parser.add_argument("--preset", choices=pretrain_base.PRESETS, default="cpu")
    parser.add_argument(
        "--folder",
        type=Path,
        help="for checkpoints, log, samples and results (default: runs/WORLD-PRESET)",
    )
    parser.add_argument("--stage", choices=("base", "judges", "all"), default="all")
    parser.add_argument(
        "--steps", type=positive, help="steps of the denoiser (default: the preset's)"
    )
    parser.add_argument(
        "--scenes", type=positive, help="square training scenes (default: the preset's)"
    )
    parser.add_argument("--start", type=Path, help="base to take the initial weights from")
    parser.add_argument(
        "--vae-steps",
        type=int,
        help="steps of the autoencoder (default: the preset's); 0: keep that of --start",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="train in bfloat16, faster on processors with bfloat16 matrix instructions",
    )
    parser.add_argument(
        "--two", type=share, help="share of square scenes with two things (default: the world's)"
    )
    parser.add_argument(
        "--wide",
        type=share,
        help="share of steps on wide scenes of one to three things (default: the world's)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all)")
    args = parser.parse_args()
    try:
        world = open_world(args.world, args.artwork, args.subjects)
    except CustomizeError as error:
        parser.exit(1, f"error: {error}\n")
    preset = choose_preset(args, world)
    if args.sheet:
        save_sheet(world, preset, args.sheet)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    args.folder = args.folder or Path("runs") / f"{world.name}-{args.preset}"
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.start and not (args.start / "model_index.json").is_file():
        parser.error(f"--start {args.start} contains no base model")
    if args.vae_steps == 0 and args.start is None:
        parser.error("--vae-steps 0 needs the autoencoder of a base: name one with --start")
    if args.vae_steps == 0:
        vae = AutoencoderKL.from_pretrained(args.start, subfolder="vae").to(args.device)
    else:
        vae = pretrain_base.train_vae(world, args.folder, preset, args.device, args.start)
    if args.stage in ("base", "all"):
        pipe = pretrain_base.train_denoiser(
            world, args.folder, preset, vae, args.device, args.start
        )
        save_base(pipe, args.folder / "base", world.attribution)
        print(f"the base model is in {args.folder / 'base'}")
    if args.stage in ("judges", "all"):
        figures = world.train_judges(args.folder / "judges", vae.cpu(), preset)
        print(f"the judges are in {args.folder / 'judges'}: {figures}")


if __name__ == "__main__":
    main()
