"""``customize train``: the plan, the run, and how to use what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customize.cli.command_support import console, hide_loading_bars, indented, snippet
from customize.training.config import TrainConfig
from customize.training.joint_configs import load_configs


def run(config_file: Path | None, together: Sequence[Path], settings: dict[str, Any]) -> None:
    """Train by YAML files, one a concept, and the settings put over them."""
    configs = load_configs(config_file, together, **settings)
    out = console()
    shown = describe_run(configs[0])
    for config in configs:
        own = describe_run(config)
        for name, value in own.items():
            if config is configs[0] or value != shown.get(name):
                out.print(f"{name:<12} {value}", markup=False, soft_wrap=True)

    from customize.cli.storybook_base import is_storybook, make_judge, warn_unknown_classes
    from customize.concepts.io.model_card import pipeline_output
    from customize.training.recipe import train_jointly

    hide_loading_bars()
    judge = None
    if is_storybook(configs[0].base):
        warn_unknown_classes(configs)
        judge = make_judge(configs)
    concepts = train_jointly(configs, judge=judge)
    text = snippet(
        configs[0].base,
        [str(config.output) for config in configs],
        [concept.info.trigger for concept in concepts],
        concepts[0].info.family,
        pipeline_output(concepts[0]),
    )
    told, them = describe_outputs(configs), "them" if len(configs) > 1 else "it"
    out.print(
        f"\n{told[0].upper()}{told[1:]}. Load {them} with:\n\n{indented(text)}\n",
        markup=False,
        soft_wrap=True,
    )


def describe_outputs(configs: Sequence[TrainConfig]) -> str:
    """Where the concepts of a run are, in words."""
    return "; ".join(f"the concept {config.name} is in {config.output}" for config in configs)


def describe_run(config: TrainConfig) -> dict[str, str]:
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
