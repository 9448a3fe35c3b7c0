"""``customize evaluate``: score concepts in the storybook, or images with CLIP, DINO and BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import BaseConfig, Device, Json, OptionalConcepts, Variant
from customize.errors import ConfigError

STORYBOOK_GROUP, IMAGES_GROUP = "Storybook evaluation", "Image evaluation"


@on_interrupt("interrupted: nothing was written; run the same command again")
def evaluate(
    context: typer.Context,
    concepts: OptionalConcepts = None,
    storybook: Annotated[
        bool,
        typer.Option(
            "--storybook",
            help="Generate images with the bundled base, a test world of eight classes (drawn), and"
            " score them with its judges",
            rich_help_panel=STORYBOOK_GROUP,
        ),
    ] = False,
    base: Annotated[
        str, typer.Option(metavar="BASE", help="Base pipeline", rich_help_panel=STORYBOOK_GROUP)
    ] = "assets/storybook",
    variant: Variant = None,
    base_config: BaseConfig = None,
    judges: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Judges", rich_help_panel=STORYBOOK_GROUP),
    ] = Path("assets/judges"),
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="One weight per concept in the merge (default: 1 each)",
            show_default=False,
            rich_help_panel=STORYBOOK_GROUP,
        ),
    ] = None,
    merge: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="Merge method, as in customize generate",
            rich_help_panel=STORYBOOK_GROUP,
        ),
    ] = "auto",
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Number of seeds; standard deviations are over them",
            rich_help_panel=STORYBOOK_GROUP,
        ),
    ] = 3,
    steps: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Sampling steps", rich_help_panel=STORYBOOK_GROUP),
    ] = 25,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of images to score",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts of the images, one line per image in the order of file names, or one for"
            " all (default: those in the JSON files of customize generate)",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    class_word: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Class word that replaces triggers in prompts, which scoring models do not know",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="CLIP model for CLIP-T and CLIP-I: a folder or hub id",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    dino: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="DINO, DINOv2 or DINOv3 model for DINO-I: a folder or hub id",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    blip: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="BLIP model for ITC, the cosine of image and prompt (ClassDiffusion's BLIP2-T),"
            " and ITM, the probability that they match: a folder or hub id",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    blip2: Annotated[
        str | None,
        typer.Option(
            "--blip2",
            metavar="ID",
            help="BLIP-2 model for ITC and ITM: a folder or hub id",
            show_default=False,
            rich_help_panel=IMAGES_GROUP,
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of reference images of the concept; for --storybook, a folder with one"
            " subfolder per concept, by name (default: assets/concepts)",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    device: Device = None,
) -> None:
    r"""Score concepts in the storybook, or images by CLIP or DINO.

    The storybook is a test world of eight classes (drawn), in which trained
    judges recognise every attribute.

    customize evaluate --storybook demo/concepts/rex demo/concepts/tom

    customize evaluate --images pictures --references photos \
        --clip openai/clip-vit-base-patch32 --dino facebook/dinov2-small
    """
    from customize.cli.image_evaluation import evaluate_images
    from customize.cli.storybook_evaluation import evaluate_storybook

    _check_mode(context, storybook, images, concepts or [])
    if images is not None:
        evaluate_images(
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
    evaluate_storybook(
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


def _check_mode(
    context: typer.Context, storybook: bool, images: Path | None, concepts: Sequence[str]
) -> None:
    """Check that one of the two modes is chosen, without flags of the other.

    Raises:
        ConfigError: Neither mode or both, or a flag or argument of the other mode.
    """
    if storybook == (images is not None):
        raise ConfigError(
            "evaluate needs either --storybook or --images",
            fix="give --storybook with concepts, or --images with a folder of images",
        )
    if storybook:
        image_flags = ("prompts", "class_word", "clip", "dino", "blip", "blip2")
        _refuse_flags(context, image_flags, "--storybook")
        return
    if concepts:
        raise ConfigError("--images scores images, not concepts", fix="remove the concepts")
    storybook_flags = ("base", "variant", "base_config", "judges", "weights", "merge")
    _refuse_flags(context, (*storybook_flags, "seeds", "steps"), "--images")


def _refuse_flags(context: typer.Context, names: Sequence[str], mode: str) -> None:
    """Refuse flags that have no effect in a mode."""
    sources = {name: context.get_parameter_source(name) for name in names}
    typed = [n for n, source in sources.items() if source and source.name == "COMMANDLINE"]
    if typed:
        flags = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise ConfigError(f"{flags} has no effect with {mode}", fix=f"remove {flags}")
