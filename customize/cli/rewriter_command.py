"""``customize rewriter``: train language models that rewrite prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from customize.cli.config_flags import add_flags
from customize.cli.interrupts import on_interrupt
from customize.cli.plain_help import PlainCommand
from customize.cli.rewriter_evolution import evolve
from customize.training.rewriting.config import RewriterTrainConfig

app = typer.Typer(help="Train language models that rewrite prompts.")

#: The first field of each group -> the group's title, in the order of RewriterTrainConfig.
GROUPS = {
    "model": "Model and data",
    "rank": "LoRA",
    "epochs": "Optimization",
    "base": "Pictures and rewards (grpo)",
    "num_generations": "Sampled rewritings (grpo)",
    "mixed_precision": "Precision and device",
    "checkpoint_every": "Checkpoints",
}


app.command("evolve", cls=PlainCommand)(evolve)


@app.command("train", cls=PlainCommand)
@on_interrupt("interrupted: run the same command again to resume from the last checkpoint")
@add_flags(RewriterTrainConfig.model_fields, GROUPS)
def train(config: Path | None, settings: dict[str, Any]) -> None:
    r"""Train a LoRA of a language model to rewrite prompts.

    First on prompts with good rewritings, then, from there, on pairs of a
    better and a worse one:

    customize rewriter train --model MODEL --method sft \
        --data good.jsonl --output rewriter/sft
    customize rewriter train --model rewriter/sft --method dpo \
        --data pairs.jsonl --output rewriter/dpo

    Or online: rewritings are sampled, drawn and scored as it goes.

    customize rewriter train --model rewriter/sft --method grpo \
        --data prompts.txt --base BASE --reward clip=10 \
        --output rewriter/grpo

    To resume an interrupted run, run the same command again.
    """
    from customize.cli.base_pipeline import hide_loading_bars
    from customize.cli.terminal import print_line
    from customize.training.rewriting.config import load_rewriter_config
    from customize.training.rewriting.recipe import train_rewriter

    loaded = load_rewriter_config(config, **settings)
    hide_loading_bars()
    folder = train_rewriter(loaded)
    print_line(f"The LoRA is in {folder}")
