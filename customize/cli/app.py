"""The commands and their flags. Each imports what it runs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from customize.cli import config_flags, library_command
from customize.cli.command_support import on_interrupt
from customize.cli.evaluate_command import evaluate, pareto
from customize.cli.merge_help import MergeHelp
from customize.cli.shared_options import (
    BaseConfig,
    Concepts,
    Device,
    Dtype,
    FamilyName,
    Ignore,
    MergeMethod,
    Names,
    OptionalConcepts,
    Variant,
    Weights,
    split_parts,
)

app = typer.Typer(
    help="Personal concepts for diffusers pipelines: learn them, merge them, draw them.",
    epilog="Start with: customize demo. Then: customize train --help.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and end")] = False,
) -> None:
    """Personal concepts for diffusers pipelines: learn them, merge them, draw them."""
    if version:
        from customize import __version__

        typer.echo(f"customize {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@on_interrupt("interrupted: run the same command again, and training goes on where it was saved")
@config_flags.add_config_flags
def train(config: Path | None, together: list[Path], settings: dict[str, Any]) -> None:
    """Learn a concept from a folder of pictures, or several in one run.

    Settings come from a YAML file, from flags, or from both. Five are needed:

    \b
    customize train --base BASE --images photos --output concepts/rex \\
        --name rex --class-word dog

    A run that was stopped goes on when the same command is given again.
    """
    from customize.cli.train_command import run

    run(config, together, settings)


app.command("train", cls=config_flags.PlainHelp)(train)


@app.command(cls=MergeHelp)
@on_interrupt("interrupted: nothing was written; give the same command again")
def merge(
    concepts: Concepts,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="New folder", show_default=False),
    ],
    weights: Weights = None,
    names: Names = None,
    merge: Annotated[
        str,
        typer.Option(metavar="METHOD"),
    ] = "auto",
    density: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Truncate the merged update to this rank (default: the sum of the ranks, which is"
            " exact unless the method prunes)",
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse",
            help="Write a whole pipeline with the concepts in its weights, that of --base, and not"
            " a LoRA file",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="For --fuse: a folder or a hub id", show_default=False),
    ] = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
    dtype: Dtype = None,
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="diffusers|kohya",
            help="Keys and header of the LoRA file; kohya's are for ComfyUI and the web UIs",
        ),
    ] = "diffusers",
    family: FamilyName = None,
    ignore: Ignore = None,
) -> None:
    """Merge concepts and LoRA files into one ordinary LoRA.

    The folder gets the LoRA file, a file of token embeddings for each
    concept, and a README.md on how to load them. customize itself needs
    no merging: load_custom takes many concepts.
    """
    from customize.cli.merge_command import fused_base, run

    run(
        concepts,
        output,
        weights,
        names=names,
        method=merge,
        density=density,
        seed=seed,
        rank=rank,
        base=fused_base(fuse, base),
        variant=variant,
        base_config=base_config,
        dtype=dtype,
        layout=layout,
        family=family,
        ignore=split_parts(ignore),
    )


@app.command()
@on_interrupt("interrupted: the records made so far are kept")
def record(
    concepts: Concepts,
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE", help="Pipeline to draw with: a folder or a hub id", show_default=False
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What to draw, with {} for the concept's words; may be given often; not given: a"
            " dozen of places and clothes",
            show_default=False,
        ),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The concept's words, for a LoRA whose file names none",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
) -> None:
    """Record what the layers of concepts and LoRA files read, for merges by fusion.

    The record lies beside the concept. Training leaves one; LoRAs from
    elsewhere need this once.

    customize record loras/tom.safetensors --base BASE --words "tom the cat"
    """
    from customize.cli.record_command import run

    run(concepts, base, prompt or None, words, device, dtype, variant, base_config)


@app.command()
@on_interrupt("interrupted: the pictures drawn so far are kept")
def generate(
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE", help="Pipeline to draw with: a folder or a hub id", show_default=False
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="What to draw, with the concepts' triggers, such as <rex>; may be given often",
            show_default=False,
        ),
    ],
    concepts: OptionalConcepts = None,
    weights: Weights = None,
    names: Names = None,
    ignore: Ignore = None,
    merge: MergeMethod = "auto",
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse", help="Put them into the base's weights, not beside them, as an adapter"
        ),
    ] = False,
    library: Annotated[
        str | None,
        typer.Option(
            metavar="LIBRARY",
            help="Folder of concepts, or a collection of the hub's, from which each prompt takes"
            " those that it names by their triggers",
            show_default=False,
        ),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS=REGION",
            help="Words of the prompt, such as a trigger, and where in the picture they act: a box"
            " (left, top, right, bottom as shares of the picture, such as '<rex>=0,0,.5,1') or a"
            " picture that is white there ('<rex>=mask.png'); may be given often",
            show_default=False,
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to keep out", show_default=False),
    ] = None,
    avoid: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT,TEXT,...",
            help="What came along from training pictures and is not wanted, such as beach,hat;"
            " auto: what all captions of the concepts' pictures share",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Sampling steps; not given: the pipeline's", show_default=False
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Guidance scale; not given: the pipeline's",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the first picture of each prompt")
    ] = 0,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pictures a prompt, with seeds counting up")
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|WxH", help="Pixels; not given: the pipeline's size", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where pictures go")
    ] = Path("pictures"),
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Attention backend: auto (the fastest that is installed and right), native,"
            " xformers, flash, sage or another of diffusers'; not given: the pipeline's",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="NGB",
            help="Fit the base into so much memory, such as 8GB, by tiles, offloading or float8",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    variant: Variant = None,
    base_config: BaseConfig = None,
) -> None:
    """Draw pictures with a base and any number of concepts.

    Each picture is a PNG with a JSON file of the same name that holds its
    settings. Nothing is overwritten: numbers go on after the highest.

    customize generate rex tom --base BASE --prompt "<rex> and <tom>"
    """
    from customize.cli.generate_command import GenerationPlan, LoadArguments, parse_size, run
    from customize.cli.region_arguments import parse_regions

    plan = GenerationPlan(
        prompts=tuple(prompt),
        negative=negative,
        avoid=avoid,
        steps=steps,
        guidance=guidance,
        seed=seed,
        count=count,
        size=parse_size(size),
    )
    loading = LoadArguments(
        base,
        tuple(concepts or ()),
        weights,
        names,
        merge,
        fuse,
        library,
        attention,
        memory,
        split_parts(ignore),
        variant,
        base_config,
    )
    run(loading, plan, parse_regions(regions or []), output, device, dtype)


app.command()(evaluate)
app.command()(pareto)


@app.command()
@on_interrupt("interrupted")
def inspect(
    concepts: Concepts,
    layers: Annotated[
        bool, typer.Option("--layers", help="The last also for each layer, loud ones in bold")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it as heat maps into a .png")
    ] = None,
    family: FamilyName = None,
    ignore: Ignore = None,
) -> None:
    """Show what concepts hold, and whether they get in each other's way.

    For several it also lists shared slices, with what resolves them, how
    much each one's update overlaps with the others', from 0 to 1, and how
    loudly each answers to the others' prompts, where these were recorded.
    """
    from customize.cli.inspect_command import run

    parts = split_parts(ignore)
    run(concepts, layers=layers, plot=plot, family=family, ignore=parts)


app.add_typer(library_command.app, name="library")


@app.command()
@on_interrupt("interrupted: give the same command again, and it uses what is there")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where results go")
    ] = Path("demo"),
) -> None:
    """Learn three bundled concepts, merge them, draw them, and score the result."""
    from customize.demo import run

    run(output)
