"""Teach a language model what the bundled base likes: `python scripts/teach_storybook_rewriter.py`.

The stages of Prompt-A-Video, each a command of `customize`, which is printed:

1. evolution: a writer rewrites prompts in rounds, and a CLIP scores their pictures (`--reward`, see
   scripts/train_storybook_clip.py);
2. sft: the student learns the best rewritings;
3. dpo-1, dpo-2: it learns from pairs of its own rewritings, drawn and scored anew each time;
4. dpo-alone: preferences without supervised training, from the pairs of the evolution;
5. grpo, with `--online`: rewritings of the student after sft are sampled, drawn and scored as it
   learns.

Run the script again to resume. The LoRA of each stage is in `--folder`, with settings and losses
(training.json); `--merge dpo-1` also writes the student with the LoRA of that stage in it.

    python scripts/teach_storybook_rewriter.py --folder runs/teach \
        --student runs/storybook-rewriter/model
    python scripts/teach_storybook_rewriter.py --folder runs/teach-smollm2 \
        --student smollm2-135m-instruct --evolution runs/teach/evolution --system ""
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from customize.atomic import write_atomic
from customize.evaluation.storybook_rates import GUIDANCE
from customize.rewriting.load_model import SETTINGS_FILE, load_model, write_settings
from customize.storybook.bundled_assets import assets_folder
from storybook_rewriter.study_prompts import training_prompts

STEPS = 8  # sampling steps, enough for the reward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/teach-rewriter"))
    parser.add_argument("--student", default="runs/storybook-rewriter/model")
    parser.add_argument("--writer", help="model that evolves prompts (default: the student)")
    parser.add_argument("--evolution", type=Path, help="finished evolution to learn from")
    parser.add_argument("--reward", type=Path, default=Path("runs/storybook-clip/model"))
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--own-prompts", type=int, help="prompts of dpo-1 and dpo-2 (default: all)")
    parser.add_argument("--workers", type=int, help="processes that draw, by Ray (default: none)")
    parser.add_argument("--children", type=int, default=4, help="rewritings of a prompt and round")
    parser.add_argument("--pairs", type=int, default=2000, help="most pairs of a DPO")
    parser.add_argument("--margin", type=float, default=0.05)
    parser.add_argument("--sft-rate", type=float, default=2e-3)
    parser.add_argument("--dpo-rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.5, help="of DPO")
    parser.add_argument("--sft-epochs", type=float, default=3.0)
    parser.add_argument("--dpo-epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--online", action="store_true", help="also train by GRPO")
    parser.add_argument("--merge", metavar="STAGE", help="write the model after it to merged/")
    parser.add_argument("--system", help="system message of the chats (default: the student's)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    evolution = args.evolution
    if evolution is None:
        evolution = args.folder / "evolution"
        evolve(args, args.writer or args.student, evolution, args.prompts, rounds=2)
    train(args, "sft", args.student, evolution / "good.jsonl", "sft", args.sft_rate)
    before = args.folder / "sft"
    own = args.own_prompts or args.prompts
    for stage in ("dpo-1", "dpo-2"):
        samples = args.folder / f"{stage}-samples"
        evolve(args, str(before), samples, own, rounds=1)
        train(args, "dpo", str(before), samples / "pairs.jsonl", stage, args.dpo_rate)
        before = args.folder / stage
    train(args, "dpo", args.student, evolution / "pairs.jsonl", "dpo-alone", args.dpo_rate)
    if args.online:
        train_online(args)
    if args.merge is not None:
        merge(args.folder / args.merge, args.folder / "merged")


def merge(lora: Path, folder: Path) -> None:
    """Write a LoRA's model, in half precision, with the LoRA in its weights."""
    model, settings = load_model(lora)
    model.model.half().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    write_atomic(folder / SETTINGS_FILE, write_settings(settings).encode())


def evolve(args: argparse.Namespace, writer: str, output: Path, count: int, rounds: int) -> None:
    """Evolve the first training prompts; pictures that an earlier stage drew are drawn once."""
    if (output / "pairs.jsonl").is_file():
        return
    prompts = write_prompts(args, count)
    link_pictures(args, output)
    flags = {"base": args.base, "prompts": prompts, "rewriter": writer, "output": output}
    flags |= {"reward": "clip=1", "reward-model": f"clip={args.reward}", "margin": args.margin}
    flags |= {"rounds": rounds, "children": args.children, "parents": 2, "operator": "rewrite"}
    flags |= {"pictures": 1, "steps": STEPS, "guidance": GUIDANCE}
    if args.workers is not None:
        flags |= {"ray": "local", "workers": args.workers}
    run("evolve", flags)


def train(
    args: argparse.Namespace, method: str, model: str, data: Path, stage: str, rate: float
) -> None:
    """Train a LoRA."""
    output = args.folder / stage
    if (output / "training.json").is_file():
        return
    output.mkdir(parents=True, exist_ok=True)
    rows = data.read_text().splitlines(keepends=True)
    # Kinds of prompts stand in turns, so all of them stay.
    stride = -(-len(rows) // args.pairs) if method == "dpo" else 1
    write_atomic(output / "rows.jsonl", "".join(rows[::stride]).encode())
    flags = {"model": model, "method": method, "data": output / "rows.jsonl", "output": output}
    epochs = args.sft_epochs if method == "sft" else args.dpo_epochs
    flags |= {"learning-rate": rate, "epochs": epochs, "max-length": 512}
    flags |= {"batch-size": args.batch}
    if method == "dpo":
        flags["beta"] = args.beta
    if args.system is not None:
        flags["system"] = args.system
    run("train", flags)


def train_online(args: argparse.Namespace) -> None:
    """Train the LoRA of sft by GRPO, four rewritings of eight prompts in each step."""
    output = args.folder / "grpo"
    if (output / "training.json").is_file():
        return
    link_pictures(args, output)
    flags = {"model": args.folder / "sft", "method": "grpo", "output": output}
    flags |= {"data": write_prompts(args, args.prompts), "base": args.base}
    flags |= {"reward": "clip=1", "reward-model": f"clip={args.reward}", "penalty": 0.2}
    flags |= {"pictures": 1, "sampling-steps": STEPS, "guidance": GUIDANCE, "max-length": 512}
    flags |= {"num-generations": 4, "batch-size": 8, "epochs": 2, "learning-rate": 5e-4}
    run("train", flags)


def write_prompts(args: argparse.Namespace, count: int) -> Path:
    """Write the first training prompts."""
    prompts: Path = args.folder / f"prompts-{count}.txt"
    texts = [prompt.text for prompt in training_prompts(count)]
    write_atomic(prompts, ("\n".join(texts) + "\n").encode())
    return prompts


def link_pictures(args: argparse.Namespace, output: Path) -> None:
    """Let a stage share the pictures of all stages."""
    pictures = args.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "pictures").exists():
        (output / "pictures").symlink_to(pictures.resolve())


def run(command: str, flags: dict[str, object]) -> None:
    """Run a command of `customize rewriter`."""
    words = ["customize", "rewriter", command]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print(shlex.join(words), flush=True)
    started = time.time()
    subprocess.run([sys.executable, "-m", *words], check=True)
    print(f"{(time.time() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
