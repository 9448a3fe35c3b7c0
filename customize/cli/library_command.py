"""``customize library``: list, fill and check a folder of concepts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.plain_help import PlainCommand
from customize.cli.shared_options import Concepts
from customize.text import plural

if TYPE_CHECKING:
    from customize.concepts.library.index import LibraryEntry

app = typer.Typer(help="List, fill and check a folder of concepts.")

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Folder of the library", show_default=False),
]
LibrarySource = Annotated[
    str,
    typer.Argument(
        metavar="LIBRARY", help="A folder, or a collection on the hub", show_default=False
    ),
]


@app.command("list", cls=PlainCommand)
@on_interrupt("interrupted")
def list_concepts(library: LibrarySource) -> None:
    """List the concepts of a library and their triggers."""
    from rich.table import Table

    from customize.cli.terminal import console, print_line
    from customize.concepts.library.library import Library
    from customize.text import one_line

    opened = Library(library)
    table = Table(title=one_line(library), title_justify="left")
    for title in ("name", "trigger", "class", "family", "base"):
        table.add_column(title, overflow="fold")
    for title in ("rank", "MB", "inputs"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in sorted(opened.entries.values(), key=lambda entry: entry.name):
        table.add_row(*map(one_line, _table_row(entry)))
    if opened.entries:
        console().print(table)
    total = sum(entry.size for entry in opened.entries.values())
    print_line(f"{plural(len(opened.entries), 'concept')}, {total / 2**20:,.1f} MB")


def _table_row(entry: LibraryEntry) -> tuple[str, ...]:
    if entry.error:
        return (entry.name, entry.trigger, "unreadable: see check", "", "", "", "", "")
    return (
        entry.name,
        _describe_triggers(entry),
        entry.class_word or "-",
        entry.family or "LoRA",
        entry.base or "-",
        str(entry.rank or "-"),
        f"{entry.size / 2**20:.1f}",
        "yes" if entry.has_layer_inputs else "no",
    )


def _describe_triggers(entry: LibraryEntry) -> str:
    """The triggers of a merge, or the trigger of a concept or LoRA and the words it expands to."""
    triggers = sorted(entry.trigger_tokens - {entry.trigger.lower()})
    if triggers:
        return ", ".join([*triggers, entry.trigger])
    is_expanded = entry.trigger_words and not entry.has_token_embeddings
    return entry.trigger + (f" (= {entry.trigger_words})" if is_expanded else "")


@app.command("add", cls=PlainCommand)
@on_interrupt("interrupted: the concepts reported so far are added; add the others again")
def add_concepts(folder: Folder, concepts: Concepts) -> None:
    """Copy concepts and LoRA files into a library.

    Recorded layer inputs are copied as well. Each file is read completely
    first. A concept whose name or trigger is already in the library is
    refused.
    """
    from customize.cli.terminal import print_line
    from customize.concepts.library.library import add_to_library

    for source in concepts:
        entry = add_to_library(folder, source)
        noun = "trigger" if len(entry.trigger_tokens) == 1 else "triggers"
        print_line(f"Added {folder / entry.source}, {noun}: {_describe_triggers(entry)}")


@app.command("check", cls=PlainCommand)
@on_interrupt("interrupted")
def check(library: LibrarySource) -> None:
    """Read every file of a library completely and report faults.

    Faults are unreadable files, ambiguous triggers, slices that share
    columns although others are free, and missing or outdated layer inputs.
    The exit code is 1 if there are faults.
    """
    from customize.cli.terminal import print_line
    from customize.concepts.library.library_check import check_library

    report = check_library(library)
    for note in report.notes:
        print_line(f"note: {note}.")
    for fault in report.errors:
        print_line(f"fault: {fault}")
    count = plural(len(report.library.entries), "concept")
    print_line(f"{count} read completely, {plural(len(report.errors), 'fault')}")
    raise typer.Exit(1 if report.errors else 0)
