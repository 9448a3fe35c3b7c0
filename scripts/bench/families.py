"""Compare our training loop with the LoRA scripts of diffusers, for every model family.

Each family trains at the tiny configuration of the tests. This shows that training works, what is
trained and saved, and the cost of the loop besides the model; for a real model, nearly all of the
cost is the model. Theirs is a reimplementation of the script's steps with its best flags: prompts
are encoded once (also for CogVideoX, whose script encodes them at each step), and images too if the
script has --cache_latents. Both train all attention projections of the denoiser and no token
embeddings; if this needs the script's --lora_layers, another row has the script's own choice of
layers. Some families have no script.

Each run is a process of its own, forked from this one after the imports; sides take turns. A step
is the mean over a run's steps after the warm-up, and a figure the median over runs. It is the CPU
time of one thread, which other load affects little; `clock_s` is wall-clock time. Memory is the
peak of a run's tensors, the base included, counted as on a GPU. `process_mib` is the peak of the
whole process: at this size mostly libraries, of which ours imports about 13 MiB more, pydantic and
this package.

Stock diffusers then loads the result of the first run, in a process that never imports this
package: every number of the file must be in the model and change its output. `families_proved`
counts the families for which this holds.

Ratios are ours, orthogonal, over theirs with the same layers. Figures that end in `_lora` are of
our plain LoRA, and those that end in `_own_layers` of their own choice of layers: FLUX.2's scripts
leave out the prompt's projections, and so take less time.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, apart, parser, report, spread
from _family_proof import PROVED
from train_step import SIDES, write_pictures

sys.path.insert(0, str(ROOT))

SIZE = 32
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
OWN = "theirs, own layers"

#: What is measured of a run -> what its ratio is called.
MEASURED = {"step_cpu_s": "step_time", "tensors_mib": "peak_memory", "peak_mib": "process_memory"}


@dataclass(frozen=True)
class Script:
    """The differences between the scripts.

    Attributes:
        name: of its file in diffusers' examples.
        cache: whether it can encode images once.
        layers: suffixes of the names of the layers that it trains by default, if they are others.
    """

    name: str
    cache: bool
    layers: tuple[str, ...] = ()


DREAMBOOTH = "train_dreambooth_lora"
# The scripts list FLUX.2's last projections per block; the tiny model has two.
FLUX2 = (
    *ATTENTION,
    "to_qkv_mlp_proj",
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(2)),
)
#: None: diffusers has no script for the family.
SCRIPTS: dict[str, Script | None] = {
    "sd": Script(DREAMBOOTH, cache=False),
    "sdxl": Script(f"{DREAMBOOTH}_sdxl", cache=False),
    "sd3": Script(f"{DREAMBOOTH}_sd3", cache=True),
    "flux": Script(
        f"{DREAMBOOTH}_flux",
        cache=True,
        layers=(
            *ATTENTION,
            *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
            *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
        ),
    ),
    "flux2": Script(f"{DREAMBOOTH}_flux2", cache=True, layers=FLUX2),
    "flux2_klein": Script(f"{DREAMBOOTH}_flux2_klein", cache=True, layers=FLUX2),
    "flux3": None,
    "qwen_image": Script(f"{DREAMBOOTH}_qwen_image", cache=True, layers=ATTENTION),
    "qwen_image_21": None,
    "z_image": Script(f"{DREAMBOOTH}_z_image", cache=True),
    "krea2": Script(
        f"{DREAMBOOTH}_krea2",
        cache=True,
        layers=(
            *ATTENTION,
            *("img_in", "final_layer.linear", "to_gate", "ff.up", "ff.down"),
            *("text_fusion.projector", "txt_in.linear_1", "txt_in.linear_2"),
            *("time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
        ),
    ),
    "wan": None,
    "wan_22": None,
    "cogvideox": Script("train_cogvideox_lora", cache=True),
    "ltx2": None,
}


def makers() -> dict[str, Callable[[], Any]]:
    """Family -> function that makes its tiny pipeline; ``wan_22`` has two denoisers."""
    from tests import tiny, tiny_llm, tiny_video

    results = {**vars(tiny), **vars(tiny_llm), **vars(tiny_video)}
    results["tiny_wan_22"] = partial(tiny_video.tiny_wan, "2.2-14b")
    return {name: results[f"tiny_{name}"] for name in SCRIPTS}


def make_base(family: str, folder: Path) -> None:
    pipe = makers()[family]()
    # Otherwise the index of a modular pipeline names no folder for its components.
    modular = {"overwrite_modular_index": True} if hasattr(pipe, "blocks") else {}
    pipe.save_pretrained(str(folder), **modular)


def run_side(
    args: argparse.Namespace, family: str, label: str, base: Path, output: Path, counting: bool
) -> Any:
    """Run one side once and return time and memory, or only the memory of its tensors."""
    import _family_sides

    script = SCRIPTS[family]
    job = {
        "side": label.partition(",")[0],
        "method": SIDES.get(label),
        "cache": script and script.cache,
        "layers": script and label == OWN and script.layers,
        "base": str(base),
        "images": str(base.parent / "images"),
        "output": str(output),
        "resolution": SIZE,
        "batch": 4,
        "rank": 4,
        "text": False,
        "steps": 3 if counting else args.steps,
        "warmup": 2,
        "threads": 1,
        "device": "cpu",
    }
    return apart(partial(_family_sides.tensors_mib if counting else _family_sides.run, job))


def compare(args: argparse.Namespace, family: str, folder: Path) -> list[dict[str, Any]]:
    """All sides of one family in turns, a row per side. Our trained concepts stay in the folder."""
    base, script = folder / "base", SCRIPTS[family]
    apart(partial(make_base, family, base))
    labels = [label for label in SIDES if script or label != "theirs"]
    labels += [OWN] if script and script.layers else []
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for turn in range(args.repeats):
        for label in labels[:: 1 if turn % 2 else -1]:
            output = folder / label / str(turn)
            runs[label].append(run_side(args, family, label, base, output, counting=False))
    for label, results in runs.items():
        results[0]["tensors_mib"] = run_side(
            args, family, label, base, folder / label / "counted", counting=True
        )
    measured = {
        label: {
            key: statistics.median(run[key] for run in results if key in run) for key in MEASURED
        }
        for label, results in runs.items()
    }
    return [
        {
            "family": family,
            "script": script.name if script else "none",
            "side": label,
            "trained": results[0]["trained"],
            "file_bytes": results[0]["file_bytes"],
            "step_s": spread([run["step_cpu_s"] for run in results]),
            "clock_s": statistics.median(run["step_s"] for run in results),
            "peak_mib": measured[label]["tensors_mib"],
            "process_mib": measured[label]["peak_mib"],
            **{
                f"{name}_ratio": measured[label][key] / measured["theirs"][key]
                for key, name in MEASURED.items()
                if "theirs" in measured
            },
        }
        for label, results in runs.items()
    ]


def prove(folder: Path) -> dict[str, dict[str, Any]]:
    """Entry of SCRIPTS -> the result of stock diffusers for the first file that ours saved."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_family_proof.py")), str(folder)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"stock diffusers failed:\n{done.stderr[-3000:]}")
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--families", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    flags.add_argument("--repeats", type=int, help="runs of each side (default: 3, quick 1)")
    flags.add_argument(
        "--steps", type=int, help="steps of a run, 2 of them warm-up (default: 32, quick 12)"
    )
    args = flags.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.steps = args.steps or (12 if args.quick else 32)
    if args.steps < 3:
        raise SystemExit(f"{args.steps} steps leave none after the warm-up; take 3 or more")
    os.environ["HF_HUB_OFFLINE"] = "1"
    makers()  # imports of both sides
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for family in args.families:
            folder = Path(name) / family
            folder.mkdir()
            write_pictures(folder / "images", SIZE)
            rows += compare(args, family, folder)
        proofs = prove(Path(name))
    for row in rows:
        if row["side"] == PROVED:
            row["picture_change"] = proofs[row["family"]]["picture_change"]
    figures: dict[str, float] = {}
    for name in (f"{proof}_ratio" for proof in MEASURED.values()):
        of: dict[str, dict[str, float]] = {
            side: {row["family"]: row[name] for row in rows if row["side"] == side and name in row}
            for side in (*SIDES, OWN)
        }
        ratios = of["ours, orthogonal"]
        layer_ratios = {family: ratios[family] / of[OWN].get(family, 1.0) for family in ratios}
        if ratios:
            figures[f"worst_{name}"] = max(ratios.values())
            figures[f"worst_{name}_lora"] = max(of["ours, lora"].values())
            figures[f"worst_{name}_own_layers"] = max(layer_ratios.values())
        figures |= {f"{name}_{family}": value for family, value in ratios.items()}
    proved = [
        proof for proof in proofs.values() if proof["read_whole"] and proof["picture_change"] > 0
    ]
    figures["families_proved"] = len({proof["family"] for proof in proved})
    report("families", args, rows, figures)


if __name__ == "__main__":
    main()
