"""``customize demo``: train, merge and score the bundled concepts."""

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
) -> None:
    """Train three bundled concepts, merge and score them.

    The base model is a small one that generates drawings of a test world
    with eight classes, 64 x 64 pixels; it runs on a CPU in minutes.
    """
    from customize.openmp import limit_spinning

    limit_spinning()  # before torch is imported
    from customize.demo import run_demo

    run_demo.run_demo(output)
