"""The commands of ``library`` and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from customize.cli.command_support import on_interrupt
from customize.cli.shared_options import Concepts

app = typer.Typer(help="List, fill and check a folder of many concepts.", no_args_is_help=True)

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="The library's folder", show_default=False),
]
Library = Annotated[
    str,
    typer.Argument(
        metavar="LIBRARY", help="A folder, or a collection of the hub's", show_default=False
    ),
]


@app.command("list")
@on_interrupt("interrupted")
def list_concepts(library: Library) -> None:
    """Show what a library holds, and by what prompts call it."""
    from customize.cli.library_listing import run_list

    run_list(library)


@app.command()
@on_interrupt("interrupted: those that were told are added; give the others again")
def add(folder: Folder, concepts: Concepts) -> None:
    """Copy concepts and LoRA files into a library, with their records.

    Each is read whole first. One whose name or trigger is taken there is
    refused.
    """
    from customize.cli.library_listing import run_add

    run_add(folder, concepts)


@app.command()
@on_interrupt("interrupted")
def check(library: Library) -> None:
    """Read every file of a library whole, and tell what is wrong.

    That is files that cannot be read, triggers that call two, slices that
    share columns where there is room, and records that lack or are old.
    The exit code is 1 where anything is.
    """
    from customize.cli.library_listing import run_check

    raise typer.Exit(run_check(library))
