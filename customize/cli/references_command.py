"""``customize references``: encode groups of reference images, and train what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from customize.cli.config_flags import add_flags
from customize.cli.interrupts import on_interrupt
from customize.cli.plain_help import PlainCommand
from customize.cli.reference_encoding import encode
from customize.training.references.config import ReferenceTrainConfig

if TYPE_CHECKING:
    from customize.references.config import ReferencesConfig

app = typer.Typer(help="Read groups of reference images, and train what reads them.")

#: The first field of each group -> the group's title, in the order of ReferenceTrainConfig.
GROUPS = {
    "base": "Models and data",
    "num_tokens": "New encoder",
    "max_references": "References of a target",
    "steps": "Optimization",
    "mixed_precision": "Precision and device",
    "checkpoint_every": "Checkpoints, validation and logs",
}


app.command("encode", cls=PlainCommand)(encode)


@app.command("train", cls=PlainCommand)
@on_interrupt("interrupted: run the same command again to resume from the last checkpoint")
@add_flags(ReferenceTrainConfig.model_fields, GROUPS)
def train(config: Path | None, settings: dict[str, Any]) -> None:
    r"""Train one stage of references on groups of images.

    Settings come from a YAML file, from flags, or from both. The three
    stages follow one another:

    customize references train --base BASE --images groups \
        --mllm Qwen2-VL --stage alignment --output refs/1
    customize references train --base BASE --images groups \
        --init refs/1 --stage single --output refs/2
    customize references train --base BASE --images groups \
        --init refs/2 --stage multi --output refs/3

    To resume an interrupted run, run the same command again.
    """
    from customize.cli.base_pipeline import hide_loading_bars
    from customize.cli.terminal import print_line
    from customize.training.references.config import load_reference_config
    from customize.training.references.recipe import train_references

    loaded = load_reference_config(config, **settings)
    loaded.check_sources()
    for title, text in describe_run(loaded).items():
        print_line(f"{title:<12} {text}")
    hide_loading_bars()
    model = train_references(loaded)
    print_line(f"\nThe references are in {loaded.output}: {describe_references(model.config)}.")


def describe_run(config: ReferenceTrainConfig) -> dict[str, str]:
    """The settings to print before training: title -> text."""
    from customize.text import plural

    batch = config.batch_size * config.gradient_accumulation
    trained = ["final layer", "reference tokens", "projector", "keys and values"]
    trained += ["MLLM", "LoRA"] if config.rules.trains_mllm else []
    target = "the other images of its group" if config.rules.holds_out_target else "itself"
    lines = {
        "stage": f"{config.stage}, the references of a target are {target}",
        "base": config.base,
        "images": str(config.images),
        "starts from": f"the references in {config.init}"
        if config.init
        else f"the MLLM in {config.mllm}",
        "trains": ", ".join(trained),
        "steps": f"{plural(config.steps, 'step')} of {plural(batch, 'target')}",
    }
    return lines | {"output": str(config.output)}


def describe_references(config: ReferencesConfig) -> str:
    """The number of tokens, and the family that they are for."""
    return f"{config.num_tokens} tokens for models of family {config.family}"
