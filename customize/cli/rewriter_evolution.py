"""``customize rewriter evolve``: find better prompts by drawing them and scoring the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import BaseModel, Device, Dtype, EndpointModel
from customize.errors import ConfigError

if TYPE_CHECKING:
    from customize.rewriting.preference_pairs import PairRule
    from customize.training.rewriting.evolution import Population
    from customize.training.rewriting.load_renderer import RendererSettings
    from customize.training.rewriting.picture_renderer import PictureRenderer
    from customize.training.rewriting.ray_renderer import RayRenderer


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
    from customize.cli.rewriter_source import check_rewriter_flags, load_rewriter
    from customize.cli.terminal import print_line
    from customize.concepts.io.output_folder import check_writable
    from customize.rewriting.preference_pairs import PairRule
    from customize.training.rewriting import evolution
    from customize.training.rewriting.evolution_sheet import write_sheet
    from customize.training.rewriting.load_renderer import RendererSettings
    from customize.training.rewriting.rows import read_prompts

    check_rewriter_flags(rewriter, endpoint_model, "--rewriter")
    texts = read_prompts(prompts)
    weights = parse_numbers(rewards, "--reward")
    least = parse_numbers(floors or [], "--floor")
    models = dict(split_pair(text, "--reward-model") for text in reward_models or [])
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
    with open_renderer(drawing, output / "pictures", device, ray, workers or 2) as renderer:
        loaded = load_rewriter(rewriter, endpoint_model)
        with loaded.model.use(torch_device):
            populations = evolution.evolve(
                texts,
                loaded.model,
                renderer,
                output / "prompts",
                settings,
                loaded.instructions,
                loaded.sampling.max_new_tokens,
                renderer.token_limits,
                on_round=lambda number, batch: print_line(
                    f"round {number} of {rounds}: {len(batch)} prompts", stderr=True
                ),
            )
    write_sheet(output / "index.html", populations)
    good, pairs = write_training_data(output, populations, rule)
    print_line(
        f"Wrote index.html, good.jsonl ({good} prompts) and pairs.jsonl ({pairs} pairs) to {output}"
    )


@contextmanager
def open_renderer(
    drawing: RendererSettings, folder: Path, device: str | None, ray: str | None, workers: int
) -> Iterator[PictureRenderer | RayRenderer]:
    """Load base and rewards in this process, or in each worker of a Ray cluster.

    Args:
        drawing: How rewritings are drawn and scored.
        folder: Folder of the pictures.
        device: The flag --device.
        ray: The flag --ray; None: this process.
        workers: Number of workers of a Ray cluster.

    Raises:
        CustomizeError: A flag is invalid, a model cannot be loaded, or Ray does not start.
    """
    if ray is None:
        from customize.base.device import choose_device
        from customize.training.rewriting.load_renderer import load_renderer

        yield load_renderer(drawing, folder, choose_device(device, "--device"))
    else:
        from customize.training.rewriting.ray_renderer import open_ray_renderer

        with open_ray_renderer(drawing, folder, device, ray, workers) as renderer:
            yield renderer


def split_pair(text: str, flag: str) -> tuple[str, str]:
    """Split ``"name=value"``.

    Raises:
        ConfigError: It has another form.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name or not value:
        raise ConfigError(f"invalid value {text!r}", where=flag, fix="write for example clip=1")
    return name, value


def parse_numbers(texts: Sequence[str], flag: str) -> dict[str, float]:
    """Parse ``["name=number"]``.

    Raises:
        ConfigError: One has another form.
    """
    result = {}
    for text in texts:
        name, value = split_pair(text, flag)
        try:
            result[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"{value!r} is no number", where=f"{flag} {text}", fix="write for example clip=1"
            ) from None
    return result


def write_training_data(
    folder: Path, populations: Sequence[Population], rule: PairRule
) -> tuple[int, int]:
    """Write the rows for supervised training and for DPO, and return their numbers."""
    from customize.cli.output_files import storage_errors
    from customize.rewriting.preference_pairs import best_rewritings, make_pairs

    candidates = {each.prompt: each.candidates() for each in populations}
    good = [
        {"prompt": prompt, "text": text}
        for prompt, text in best_rewritings(candidates, rule.floors)
    ]
    pairs = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for prompt, found in candidates.items()
        for pair in make_pairs(prompt, found, rule)
    ]
    for name, rows in (("good.jsonl", good), ("pairs.jsonl", pairs)):
        with storage_errors(folder / name):
            write_lines(folder / name, rows)
    return len(good), len(pairs)


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as .jsonl."""
    from customize.atomic import write_atomic

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text.encode())
