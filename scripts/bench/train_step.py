"""Step time and peak memory of our training loop against diffusers' DreamBooth LoRA example.

Both train adapters of the same rank on the same attention projections of the same base, at the same
resolution and batch size, without gradient checkpointing, in full precision. Theirs has its best
flags: if only the denoiser trains, prompts are encoded once (--pre_compute_text_embeddings); for
the autoencoder, which it runs at each step, there is no such flag. With --script FILE the example
itself runs (examples/dreambooth/train_dreambooth_lora.py of the diffusers repository), else a
reimplementation of its steps.

Each run is a process of its own; sides take turns. A step is the mean over a run's steps after the
warm-up, and a figure the median over runs; the CPU time beside it is affected less by other load.
Memory is the peak of the whole process (on a GPU, of its tensors), preparation included.
`step_time_ratio` and `peak_memory_ratio` are ours over theirs in the worst case: both methods, with
and without the text encoder, on both bases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ROOT, parser, report, spread

from customize.evaluation.result_file import usable_cores

SIDES = {"ours, orthogonal": "orthogonal", "ours, lora": "lora", "theirs": "lora"}


@dataclass(frozen=True)
class Setting:
    """A base to train on, and its settings."""

    name: str
    base: Path
    resolution: int
    batch: int
    rank: int


def write_pictures(folder: Path, side: int) -> Path:
    """Write eight images of a concept at the training resolution.

    Batch sizes divide eight, as otherwise the example's last batch of an epoch is smaller.
    """
    from PIL import Image

    from customize.storybook.example_concepts import make_concept

    folder.mkdir()
    pictures = make_concept("rex", "dog", seed=6, count=8).images()
    for index, picture in enumerate(pictures):
        picture.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def make_wide(folder: Path) -> Path:
    """A random base with the widths of Stable Diffusion 1.5's first levels, but few layers.

    The autoencoder has a quarter of the real width, so that its share of a step, which the example
    pays and ours does not, is not overstated beside the small UNet.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    from customize.storybook.bundled_models import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=1,
            sample_size=128,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=3,
                num_attention_heads=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(320, 640),
            layers_per_block=1,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def theirs_is(args: argparse.Namespace) -> str:
    """The side of `_train_sides.py` that represents the example."""
    return "script" if args.script else "loop"


def run_side(args: argparse.Namespace, setting: Setting, label: str, text: bool) -> dict[str, Any]:
    """Run one side once, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "side": theirs_is(args) if label == "theirs" else "ours",
            "script": str(args.script),
            "method": SIDES[label],
            "text": text,
            "base": str(setting.base),
            "images": str(write_pictures(Path(folder) / "images", setting.resolution)),
            "output": str(Path(folder) / "out"),
            "resolution": setting.resolution,
            "batch": setting.batch,
            "rank": setting.rank,
            "steps": args.steps,
            "warmup": 2,
            "threads": args.threads,
            "device": args.device,
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("_train_sides.py")), json.dumps(job)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{label} on {setting.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, setting: Setting, text: bool) -> list[dict[str, Any]]:
    """All sides of one case in turns: a row per side, with its ratios to theirs."""
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in SIDES}
    for turn in range(args.repeats):
        for label in list(SIDES)[:: 1 if turn % 2 else -1]:
            runs[label].append(run_side(args, setting, label, text))

    def median(label: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[label])

    return [
        {
            "base": setting.name,
            "trained": "denoiser and text encoder" if text else "denoiser",
            "side": f"theirs, {theirs_is(args)}" if label == "theirs" else label,
            "step_s": spread([run["step_s"] for run in results]),
            "step_cpu_s": median(label, "step_cpu_s"),
            "peak_mib": spread([run["peak_mib"] for run in results]),
            "first_step_after_s": median(label, "first_step_after_s"),
            "step_ratio": median(label, "step_s") / median("theirs", "step_s"),
            "peak_ratio": median(label, "peak_mib") / median("theirs", "peak_mib"),
        }
        for label, results in runs.items()
    ]


def main() -> None:
    import torch

    flags = parser(__doc__)
    flags.add_argument("--base", type=Path, default=ROOT / "assets/storybook")
    flags.add_argument("--script", type=Path, help="train_dreambooth_lora.py of diffusers, to run")
    flags.add_argument(
        "--repeats", type=int, help="runs of each side in each case (default: 3, quick 1)"
    )
    flags.add_argument(
        "--steps", type=int, help="steps of a run, 2 of them warm-up (default: 12, quick 7)"
    )
    flags.add_argument("--threads", type=int, default=usable_cores())
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = flags.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.steps = args.steps or (7 if args.quick else 12)
    args.base = args.base.resolve()
    if not (args.base / "model_index.json").is_file():
        raise SystemExit(f"there is no base model in {args.base}; name another with --base")
    if args.script is not None and not args.script.is_file():
        raise SystemExit(f"there is no script {args.script}")
    print("theirs is", f"the script {args.script.name}" if args.script else "a loop of its steps")

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            Setting("storybook", args.base, resolution=64, batch=8, rank=8),
            Setting("wide", make_wide(Path(folder) / "wide"), resolution=128, batch=2, rank=16),
        )
        for setting in settings:
            for text in (False,) if args.quick else (False, True):
                rows += compare(args, setting, text)
    our_rows = [row for row in rows if row["side"].startswith("ours")]
    figures = {}
    for key in ("step", "peak"):
        name = "step_time_ratio" if key == "step" else "peak_memory_ratio"
        figures[name] = max(row[f"{key}_ratio"] for row in our_rows)
        for setting in settings:
            ratios_of_base = [
                row[f"{key}_ratio"] for row in our_rows if row["base"] == setting.name
            ]
            figures[f"{name}_{setting.name}"] = max(ratios_of_base)
    report("train_step", args, rows, figures)


if __name__ == "__main__":
    main()
