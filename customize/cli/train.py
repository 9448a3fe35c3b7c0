"""``customize train``: the plan, the run, and how to use what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from customize.cli.shared import console, hide_loading_bars, indented, snippet
from customize.training.config import TrainConfig, load_config


def run(config_file: Path | None, settings: dict[str, Any]) -> None:
    """Train by a YAML file and the settings put over it."""
    config = load_config(config_file, **settings)
    out = console()
    for name, value in plan(config).items():
        out.print(f"{name:<12} {value}", markup=False, soft_wrap=True)

    from customize.concepts.card import output_of
    from customize.training.loop import train

    hide_loading_bars()
    concept = train(config)
    info = concept.info
    output = output_of(concept)
    text = snippet(config.base, [str(config.output)], [info.trigger], info.family, output)
    out.print(
        f"\nThe concept {config.name} is in {config.output}. Load it with:\n\n{indented(text)}\n",
        markup=False,
        soft_wrap=True,
    )


def plan(config: TrainConfig) -> dict[str, str]:
    """What is going to happen, in words: title -> text."""
    batch = config.batch_size * config.gradient_accumulation
    alone = "" if config.library or config.slice is not None else ", slice from the name's hash"
    library = f", slice kept apart from {config.library}" if config.library else ""
    how = {
        "orthogonal": f"orthogonal, rank {config.rank}{library or alone}",
        "lora": f"ordinary LoRA, rank {config.rank}",
    }
    trained = ["attention of the denoiser"]
    trained += ["text encoder"] if config.train_text_encoder else []
    trained += [f"{config.num_tokens} tokens"] if config.train_tokens else []
    shown = {
        "concept": f"{config.name}, a {config.class_word}, called by {config.trigger}",
        "base": config.base,
        "pictures": str(config.images),
        "method": how[config.method],
        "trains": ", ".join(trained),
        "steps": f"{config.steps} of {batch} pictures",
    }
    if config.preserve:
        weights = (f"{name} with weight {weight:g}" for name, weight in config.preserve.items())
        shown["preserves"] = ", ".join(weights)
    if config.prior_weight:
        source = config.prior_images or f"{config.prior_count} drawn by the base"
        shown["prior"] = f"class pictures with weight {config.prior_weight:g}: {source}"
    return shown | {"output": str(config.output)}
