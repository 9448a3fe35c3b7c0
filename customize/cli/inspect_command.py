"""``customize inspect``: print what concepts contain and how they interfere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from customize.cli.interrupts import on_interrupt
from customize.cli.shared_options import Concepts, FamilyName, Ignore
from customize.errors import ConfigError


@on_interrupt("interrupted")
def inspect(
    concepts: Concepts,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also print the crosstalk of each layer"),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot the crosstalk as heat maps into a .png file"),
    ] = None,
    family: FamilyName = None,
    ignore: Ignore = None,
) -> None:
    """Print what concepts contain and how they interfere.

    For several concepts: the slices that they share, the overlap of their
    updates (0 to 1), and their crosstalk, the norm of one concept's update
    on another concept's recorded layer inputs, relative to that concept's
    own update.

    Also reads reference models and .refs.safetensors files.
    """
    from rich.table import Table

    from customize.api.inspect_files import (
        describe_concept,
        describe_relations,
        find_incompatibility,
        split_references,
    )
    from customize.api.inspect_references import describe_references
    from customize.cli import crosstalk_report
    from customize.cli.concept_flags import split_parts
    from customize.cli.output_files import check_png
    from customize.cli.terminal import console, print_line
    from customize.concepts.formats.open_adaptation import open_all_without_pipeline
    from customize.concepts.input_statistics import load_recorded_inputs
    from customize.concepts.merge.choose_method import trained_together
    from customize.text import one_line

    check_png(plot, "--plot")
    concepts, references = split_references(concepts)
    opened = open_all_without_pipeline(concepts, family, split_parts(ignore)) if concepts else []
    reference_facts = [describe_references(source) for source in references]
    records = [load_recorded_inputs(c.info.name, c.updates, c.source) for c in opened]
    missing = [c.info.name for c, r in zip(opened, records, strict=True) if r is None]
    if layers or plot is not None:
        _check_crosstalk_possible("--layers" if plot is None else "--plot", len(opened), missing)
    facts = [*map(describe_concept, opened), *reference_facts]
    for source, rows in zip([*concepts, *references], facts, strict=True):
        table = Table(title=one_line(source), show_header=False, title_justify="left")
        for title, text in rows.items():
            table.add_row(title, one_line(text))
        console().print(table)
    if len(opened) < 2:
        return
    incompatible = find_incompatibility(opened)
    if incompatible:
        print_line(f"They cannot be merged: {incompatible}.")
        return
    for note in describe_relations(opened):
        print_line(note)
    console().print(crosstalk_report.overlap_table(opened))
    if missing:
        print_line(
            f"Crosstalk is unknown: {', '.join(missing)} has no recorded layer inputs. Create them "
            "with customize record."
        )
        return
    names = [concept.info.name for concept in opened]
    inputs = [record.concept for record in records if record is not None]
    by_layer = crosstalk_report.measure_crosstalk(opened, inputs)
    if by_layer:
        console().print(crosstalk_report.crosstalk_table(opened, by_layer))
    if layers and by_layer:
        console().print(crosstalk_report.layer_table(names, by_layer))
    if not trained_together(opened):
        for line in crosstalk_report.describe_crosstalk(names, by_layer):
            print_line(line)
    if plot is not None and by_layer:
        crosstalk_report.plot_crosstalk(names, by_layer, plot)
        print_line(f"Wrote {plot}")


def _check_crosstalk_possible(flag: str, count: int, missing: Sequence[str]) -> None:
    if count < 2:
        raise ConfigError("crosstalk needs two concepts", where=flag, fix="give two or more")
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} has no recorded layer inputs",
            where=flag,
            fix="create them with customize record, or remove the flag",
        )
