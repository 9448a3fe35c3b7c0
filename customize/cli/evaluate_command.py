"""The commands ``evaluate``, which has the most flags, and ``pareto``, which compares its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from customize.cli.command_support import on_interrupt
from customize.cli.shared_options import BaseConfig, Device, Json, OptionalConcepts, Variant


@on_interrupt("interrupted: nothing was written; give the same command again")
def evaluate(
    context: typer.Context,
    concepts: OptionalConcepts = None,
    storybook: Annotated[
        bool,
        typer.Option(
            "--storybook",
            help="Draw the concepts in the bundled miniature world, and judge them exactly",
            rich_help_panel="In the storybook",
        ),
    ] = False,
    base: Annotated[
        str, typer.Option(metavar="BASE", help="Its pipeline", rich_help_panel="In the storybook")
    ] = "assets/storybook",
    variant: Variant = None,
    base_config: BaseConfig = None,
    judges: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Its judges", rich_help_panel="In the storybook"),
    ] = Path("assets/judges"),
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="Weights of the concepts where they are merged; not given: 1 each",
            show_default=False,
            rich_help_panel="In the storybook",
        ),
    ] = None,
    merge: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="How they are merged, as for generate",
            rich_help_panel="In the storybook",
        ),
    ] = "auto",
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Repetitions, which the spread is over",
            rich_help_panel="In the storybook",
        ),
    ] = 3,
    steps: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Sampling steps", rich_help_panel="In the storybook"),
    ] = 25,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Pictures to score",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Their prompts, a line each in the order of their names, or one for all; not"
            " given: those that generate left beside them",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    class_word: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What triggers in the prompts stand for, as no scorer has ever read them",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="CLIP model for CLIP-T and CLIP-I: a folder or hub id",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    dino: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="DINO, DINOv2 or DINOv3 model for DINO-I: a folder or hub id",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    blip: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="BLIP model for ITC, the cosine of picture and prompt (ClassDiffusion's BLIP2-T),"
            " and ITM, the probability that they match: a folder or hub id",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    blip2: Annotated[
        str | None,
        typer.Option(
            "--blip2",
            metavar="ID",
            help="BLIP-2 model for its own ITC and ITM: a folder or hub id",
            show_default=False,
            rich_help_panel="With real models",
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Pictures of the concept. In the storybook: a folder with one such folder for"
            " each concept, by name; not given: assets/concepts",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Score concepts in the storybook, or pictures with CLIP, DINO and BLIP.

    customize evaluate --storybook demo/concepts/rex demo/concepts/tom

    customize evaluate --images pictures --references photos
    --clip openai/clip-vit-base-patch32 --dino facebook/dinov2-small
    --blip Salesforce/blip-itm-base-coco --blip2 Salesforce/blip2-itm-vit-g
    """
    from customize.cli import image_evaluation
    from customize.cli import storybook_evaluation as evaluation

    evaluation.check_mode(context, storybook, images, concepts or [])
    if images is not None:
        image_evaluation.run(
            images,
            prompts=prompts,
            references=references,
            clip=clip,
            dino=dino,
            blip=blip,
            blip2=blip2,
            class_word=class_word,
            device=device,
            json_file=json_file,
        )
        return
    evaluation.run_storybook(
        concepts or [],
        base=base,
        variant=variant,
        base_config=base_config,
        judges=judges,
        references=references or Path("assets/concepts"),
        weights=weights,
        merge=merge,
        seeds=seeds,
        steps=steps,
        device=device,
        json_file=json_file,
    )


@on_interrupt("interrupted: give the same command again")
def pareto(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Figures that evaluate --json or a benchmark has written",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The picture, a .png; a .json of the same name gets the points",
            show_default=False,
        ),
    ],
    x: Annotated[str, typer.Option("--x", metavar="RATE", help="To the right")] = "prompt",
    y: Annotated[str, typer.Option("--y", metavar="RATE", help="Upwards")] = "identity",
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="A point for each value of this column, rather than one for each file; may be"
            " given often",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Only rows with this value; may be given often",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw which of several settings no other beats in both of two rates.

    A setting is a file, and its rates are means over the file's rows,
    with one standard error:

    customize pareto sum.json fusion.json --only attached=2 --output front.png
    """
    from customize.cli.pareto_command import run

    run(files, output, x=x, y=y, by=by or [], only=only or [])
