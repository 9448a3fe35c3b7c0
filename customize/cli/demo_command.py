"""``customize demo``: train, merge and score bundled concepts, or learn the user's own pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt


@on_interrupt("interrupted: run the same command again to continue with the existing files")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results")
    ] = Path("demo"),
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Learn 1 to 20 pictures of your own drawing or thing instead; .txt files beside"
            " them may describe them",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="With --images: name of the concept (default: the folder's name)"
        ),
    ] = None,
    class_word: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="With --images: what kind of thing it is, such as bird, plant or vehicle"
            " (default: animal)",
        ),
    ] = None,
) -> None:
    """Train three bundled concepts, merge and score them.

    The base model is a small one that generates drawings of a test world
    with eight classes, 64 x 64 pixels; it runs on a CPU in minutes.

    To learn a drawing of your own, on a base that draws stickers:

    customize demo --images photos
    """
    from customize.errors import ConfigError

    if images is None:
        for flag, value in (("--name", name), ("--class-word", class_word)):
            if value is not None:
                raise ConfigError(
                    f"{flag} has no effect without --images", fix=f"add --images or remove {flag}"
                )
    from customize.openmp import limit_spinning

    limit_spinning()  # before torch is imported
    if images is None:
        from customize.demo import run_demo

        run_demo.run_demo(output)
    else:
        from customize.demo import own_drawing

        own_drawing.run_own_drawing(images, output, name, class_word)
