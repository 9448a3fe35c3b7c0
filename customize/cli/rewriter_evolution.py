"""``customize rewriter evolve``: find better prompts by drawing them and scoring the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import BaseModel, Device, Dtype, EndpointModel
from customize.errors import ConfigError
from customize.text import plural


@on_interrupt("interrupted: run the same command again to go on")
def evolve(
    base: BaseModel,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Text file with a user's prompt in each line", show_default=False
        ),
    ],
    rewriter: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Language model: a folder, hub id, .gguf file, name or address of an endpoint",
            show_default=False,
        ),
    ],
    rewards: Annotated[
        list[str],
        typer.Option(
            "--reward",
            metavar="NAME=WEIGHT",
            help="Reward and its weight, such as clip=1 or aesthetic=0.8. Repeatable",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the evolution")
    ],
    reward_models: Annotated[
        list[str] | None,
        typer.Option(
            "--reward-model",
            metavar="NAME=MODEL",
            help="Folder or hub id of a reward's model (default: the usual one). Repeatable",
            show_default=False,
        ),
    ] = None,
    floors: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            metavar="NAME=X",
            help="Least reward of a prompt that is learned from. Repeatable",
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(metavar="X", help="Least difference of a pair's weighted sums")
    ] = 0.0,
    endpoint_model: EndpointModel = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds of new prompts")] = 4,
    children: Annotated[
        int, typer.Option(min=1, metavar="N", help="New prompts in each round")
    ] = 3,
    parents: Annotated[
        int, typer.Option(min=1, metavar="N", help="Best prompts that new ones are made from")
    ] = 3,
    operator: Annotated[
        str,
        typer.Option(
            metavar="scored|rewrite",
            help="scored: the model sees the best prompts with their scores; rewrite: it rewrites"
            " one of them, for models that know no other task",
        ),
    ] = "scored",
    pictures: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pictures of each prompt, with seeds from 0")
    ] = 2,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Sampling steps (default: the pipeline's)", show_default=False
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="X", help="Guidance scale (default: the pipeline's)", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Random seed")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help="Draw and score in several processes by Ray: local starts a cluster on this"
            " machine, auto finds the one that runs here",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes of --ray, each on a GPU if the cluster has GPUs (default: 2)",
            show_default=False,
        ),
    ] = None,
) -> None:
    r"""Find better prompts for a base by drawing them and scoring the pictures.

    Writes pictures, a page (index.html), and the data for customize
    rewriter train: good.jsonl and pairs.jsonl.

    customize rewriter evolve --base BASE --prompts prompts.txt \
        --rewriter MODEL --reward clip=1 --output evolution
    """
    from customize.base.device import choose_device
    from customize.cli.base_pipeline import hide_loading_bars
    from customize.cli.output_files import storage_errors
    from customize.cli.rewriter_source import check_rewriter_flags, load_rewriter
    from customize.cli.terminal import print_line
    from customize.concepts.io.output_folder import check_writable
    from customize.rewriting.preference_pairs import PairRule
    from customize.training.field_values import parse_names
    from customize.training.rewriting import evolution
    from customize.training.rewriting.evolution_results import (
        check_results,
        describe_models,
        describe_run,
        write_results,
    )
    from customize.training.rewriting.load_renderer import RendererSettings
    from customize.training.rewriting.open_renderer import open_renderer
    from customize.training.rewriting.rows import read_prompts

    check_rewriter_flags(rewriter, endpoint_model, "--rewriter")
    lines = read_prompts(prompts)
    weights = read_numbers(rewards, "--reward")
    least = read_numbers(floors or [], "--floor")
    models = read_pairs(parse_names, reward_models or [], "--reward-model")
    settings = evolution.EvolutionSettings(rounds, children, parents, operator, seed=seed)  # type: ignore[arg-type]
    if workers is not None and ray is None:
        raise ConfigError(
            "--workers was given without --ray", where="--workers", fix="add --ray local"
        )
    rule = PairRule(margin, least)
    if guidance is not None and not math.isfinite(guidance):
        raise ConfigError(
            f"the guidance scale is {guidance}", where="--guidance", fix="give a number such as 7.5"
        )
    check_writable(output)
    torch_device = choose_device(device, "--device")
    hide_loading_bars()
    drawing = RendererSettings(
        base, weights, least, models, range(pictures), steps, guidance, dtype
    )
    texts = list(lines.values())
    record = describe_run(texts, settings, drawing, margin)
    check_results(output, record)
    with open_renderer(drawing, output / "pictures", device, ray, workers) as renderer:
        loaded = load_rewriter(rewriter, endpoint_model)
        with loaded.model.use(torch_device):
            record |= describe_models(loaded, renderer)
            check_results(output, record)
            populations = evolution.evolve(
                texts,
                loaded.model,
                renderer,
                output / "prompts",
                settings,
                loaded.instructions,
                loaded.sampling.max_new_tokens,
                renderer.token_limits,
                {text: f"{prompts}, line {number}" for number, text in lines.items()},
                on_round=lambda number, batch: print_line(
                    f"round {number} of {rounds}: {len(batch)} prompts", stderr=True
                ),
            )
    with storage_errors(output):
        good, pairs = write_results(output, populations, rule, record)
    print_line(
        f"Wrote index.html, good.jsonl ({plural(good, 'prompt')}) and pairs.jsonl"
        f" ({plural(pairs, 'pair')}) to {output}"
    )


def read_pairs(
    parse: Callable[[Sequence[str]], dict[str, str]], texts: Sequence[str], flag: str
) -> dict[str, str]:
    """Parse ``["name=value"]``.

    Raises:
        ConfigError: One has another form, or a name has several values.
    """
    try:
        return parse(texts) if texts else {}
    except ValueError as error:
        raise ConfigError(
            f"{flag} {error}",
            where=f"{flag} {' '.join(texts)}",
            fix=f"give each name once, such as {flag} clip=...",
        ) from None


def read_numbers(texts: Sequence[str], flag: str) -> dict[str, float]:
    """Parse ``["name=number"]``.

    Raises:
        ConfigError: One has another form, or a name has several numbers.
    """
    from customize.training.field_values import parse_weights

    numbers = {}
    for name, text in read_pairs(partial(parse_weights, example="clip=1"), texts, flag).items():
        try:
            numbers[name] = float(text)
        except ValueError:
            raise ConfigError(
                f"{text!r} is not a number", where=f"{flag} {name}={text}", fix=f"give {name}=1"
            ) from None
    return numbers
