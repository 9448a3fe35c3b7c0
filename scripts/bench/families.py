"""Our training loop against diffusers' DreamBooth LoRA scripts, for every family that has one.

Each family trains at the tiny configuration of the tests, which tells that it works, what is
trained and saved, and what a loop costs beside the model; on a real model the model is nearly all
of the cost. Theirs is a loop of the script's steps, written down anew, with the layers that it
trains by default and its best flags: prompts are encoded once, and pictures too where it has
--cache_latents. In ours all attention projections of the denoiser are trained, and no tokens.

Each run is a process of its own; sides take turns. A step is the mean over a run's steps after the
warm-up, and a figure the median over runs. Memory is the peak of the whole process, most of which
are libraries at this size. Ratios are ours, orthogonal, over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import ROOT, parser, report, spread
from train_step import SIDES, write_pictures

sys.path.insert(0, str(ROOT))

SIZE = 32
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
ADDED = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Script:
    """What of a train_dreambooth_lora script differs between families.

    Attributes:
        targets: ends of the names of the layers that it trains by default.
        cache: whether it can encode pictures once.
    """

    targets: tuple[str, ...]
    cache: bool


# The scripts list FLUX.2's last projections block by block, of which the tiny one has two.
_FLUX2 = Script(
    (
        *ATTENTION,
        "to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(2)),
    ),
    cache=True,
)
#: None: diffusers has no script for the family.
SCRIPTS: dict[str, Script | None] = {
    "sd": Script((*ATTENTION, "add_k_proj", "add_v_proj"), cache=False),
    "sdxl": Script(ATTENTION, cache=False),
    "sd3": Script((*ATTENTION, *ADDED), cache=True),
    "flux": Script(
        (
            *ATTENTION,
            *ADDED,
            *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
        ),
        cache=True,
    ),
    "flux2": _FLUX2,
    "flux2_klein": _FLUX2,
    "qwen_image": Script(ATTENTION, cache=True),
    "qwen_image_21": None,
    "z_image": Script(ATTENTION, cache=True),
    "krea2": Script(
        (
            *ATTENTION,
            *("img_in", "final_layer.linear", "to_gate", "ff.up", "ff.down"),
            *("text_fusion.projector", "txt_in.linear_1", "txt_in.linear_2"),
            *("time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
        ),
        cache=True,
    ),
}


def makers() -> dict[str, Callable[[], Any]]:
    """Family -> what makes its tiny pipeline."""
    from tests import tiny, tiny_llm

    found = {**vars(tiny), **vars(tiny_llm)}
    return {name: found[f"tiny_{name}"] for name in SCRIPTS}


def run_side(args: argparse.Namespace, family: str, base: Path, label: str) -> dict[str, Any]:
    """Run one side once, in a process and a folder of its own."""
    script = SCRIPTS[family]
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "side": "theirs" if label == "theirs" else "ours",
            "method": SIDES[label],
            "script": script and asdict(script),
            "base": str(base),
            "images": str(write_pictures(Path(folder) / "images", SIZE)),
            "output": str(Path(folder) / "out"),
            "resolution": SIZE,
            "batch": 4,
            "rank": 4,
            "text": False,
            "steps": args.steps,
            "warmup": 2,
            "threads": args.threads,
            "device": "cpu",
        }
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        threads = str(args.threads)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("_family_sides.py")), json.dumps(job)],
            cwd=ROOT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": threads,
                "PYTHONPATH": paths,
            },
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{label} on {family} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(args: argparse.Namespace, family: str, base: Path) -> list[dict[str, Any]]:
    """All sides of one family, in turns; a row a side."""
    labels = [label for label in SIDES if SCRIPTS[family] or label != "theirs"]
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for turn in range(args.repeats):
        for label in labels[:: 1 if turn % 2 else -1]:
            runs[label].append(run_side(args, family, base, label))
    return [
        {
            "family": family,
            "side": label,
            "trained": found[0]["trained"],
            "file_bytes": found[0]["file_bytes"],
            "step_s": spread([run["step_s"] for run in found]),
            "peak_mib": spread([run["peak_mib"] for run in found]),
            **{
                f"{key}_ratio": statistics.median(run[of] for run in found)
                / statistics.median(run[of] for run in runs["theirs"])
                for key, of in (("step", "step_s"), ("peak", "peak_mib"))
                if "theirs" in runs
            },
        }
        for label, found in runs.items()
    ]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--families", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    flags.add_argument("--repeats", type=int, help="runs of each side; 5, quick 1")
    flags.add_argument("--steps", type=int, help="steps of a run, 2 of them warm-up; 42, quick 7")
    flags.add_argument("--threads", type=int, default=1)
    args = flags.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 5)
    args.steps = args.steps or (7 if args.quick else 42)
    if args.steps < 3:
        raise SystemExit(f"{args.steps} steps leave none after the warm-up; take 3 or more")

    rows: list[dict[str, Any]] = []
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            makers()[family]().save_pretrained(folder)
            rows += compare(args, family, Path(folder))
    compared = [row for row in rows if row["side"] == "ours, orthogonal" and "step_ratio" in row]
    figures = {}
    for key, name in (("step", "step_time_ratio"), ("peak", "peak_memory_ratio")):
        if compared:
            figures[name] = max(row[f"{key}_ratio"] for row in compared)
        figures |= {f"{name}_{row['family']}": row[f"{key}_ratio"] for row in compared}
    report("families", args, rows, figures)


if __name__ == "__main__":
    main()
