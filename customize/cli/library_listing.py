"""``customize library``: what a folder of concepts holds, what goes in, and what is wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from customize.cli.command_support import console
from customize.concepts.library.index import LibraryEntry
from customize.concepts.library.library import Library, add_to_library
from customize.text import one_line


def run_list(folder: str) -> None:
    """Print a row for each concept."""
    library = Library(folder)
    table = Table(title=one_line(folder), title_justify="left")
    for title in ("name", "trigger", "class", "family", "base"):
        table.add_column(title, overflow="fold")
    for title in ("rank", "MB", "record"):
        table.add_column(title, justify="right")
    for entry in sorted(library.entries.values(), key=lambda each: each.name):
        table.add_row(*map(one_line, _cells(entry)))
    out = console()
    if library.entries:
        out.print(table)
    total = sum(entry.size for entry in library.entries.values())
    count = len(library.entries)
    out.print(f"{count} concept{'' if count == 1 else 's'}, {total / 2**20:,.1f} MB", markup=False)


def _cells(entry: LibraryEntry) -> tuple[str, ...]:
    if entry.error:
        return (entry.name, entry.trigger, "cannot be read: see check", "", "", "", "", "")
    return (
        entry.name,
        _called(entry),
        entry.class_word or "-",
        entry.family or "LoRA",
        entry.base or "-",
        str(entry.rank or "-"),
        f"{entry.size / 2**20:.1f}",
        "yes" if entry.has_layer_inputs else "no",
    )


def _called(entry: LibraryEntry) -> str:
    """What a prompt says: the triggers of a merge, or that of a concept or LoRA."""
    triggers = sorted(entry.trigger_tokens - {entry.trigger.lower()})
    if triggers:
        return ", ".join([*triggers, entry.trigger])
    says = (
        f" (says {entry.trigger_words})" if entry.trigger_words and not entry.has_own_tokens else ""
    )
    return entry.trigger + says


def run_add(folder: Path, sources: Sequence[str]) -> None:
    """Copy concepts into a library, one by one; those before one that is refused stay."""
    for source in sources:
        entry = add_to_library(folder, source)
        verb = "calls" if len(entry.trigger_tokens) == 1 else "call"
        console().print(
            f"{folder / entry.source} is added, which {_called(entry)} {verb}",
            markup=False,
            soft_wrap=True,
        )


def run_check(folder: str) -> int:
    """Print what is wrong in a library; the exit code, 1 where anything is."""
    from customize.concepts.library.library_check import check_library

    found, out = check_library(folder), console()
    for note in found.notes:
        out.print(f"note: {note}.", markup=False, soft_wrap=True)
    for fault in found.errors:
        out.print(f"fault: {fault}", markup=False, soft_wrap=True)
    count = len(found.library.entries)
    out.print(
        f"{count} concept{'' if count == 1 else 's'} read whole, {len(found.errors)} "
        f"fault{'' if len(found.errors) == 1 else 's'}",
        markup=False,
    )
    return 1 if found.errors else 0
