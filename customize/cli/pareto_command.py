"""``customize pareto``: plot the Pareto front of several settings, from result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from customize.cli.interrupts import on_interrupt
from customize.errors import ConfigError, DataError
from customize.near_names import suggest_names

if TYPE_CHECKING:
    from customize.evaluation.pareto_front import Point

# Columns of repeated measurements: rows that differ in these alone are averaged.
REPEATS = ("concept", "seed", "image", "prompt")

Row = Mapping[str, Any]


@on_interrupt("interrupted: run the same command again")
def pareto(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Result files of customize evaluate --json or of a benchmark",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Plot to write, a .png; the points go to a .json of the same name",
            show_default=False,
        ),
    ],
    x: Annotated[str, typer.Option("--x", metavar="RATE", help="Metric of the x axis")] = "prompt",
    y: Annotated[
        str, typer.Option("--y", metavar="RATE", help="Metric of the y axis")
    ] = "identity",
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Plot a point for each value of this column. Repeatable (default: a point for"
            " each file)",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE", help="Only rows with this value. Repeatable", show_default=False
        ),
    ] = None,
) -> None:
    """Plot settings by two metrics, and mark the Pareto front.

    Each file is one setting; its metrics are means over the file's rows,
    with one standard error:

    customize pareto sum.json fusion.json --only attached=2 --output front.png
    """
    from customize.cli.output_files import check_png, write_json
    from customize.cli.terminal import command_line
    from customize.evaluation import pareto_front, result_file

    check_png(output, "--output")
    conditions = [_parse_condition(text) for text in only or []]
    points: list[Point] = []
    for file, name in zip(files, _short_names(files), strict=True):
        rows = [row for row in _read_rows(file) if all(_matches(row, *c) for c in conditions)]
        if not rows:
            raise DataError(
                "no rows match --only" if only else "the file has no rows",
                where=file,
                fix="remove --only or this file" if only else "give a file of evaluate --json",
            )
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(_column(row, c, file) for c in by or []), []).append(row)
        for values, group in groups.items():
            _check_same_setting(group, (*REPEATS, x, y), file)
            group_name = ", ".join(values)
            if not by:
                title = name
            else:
                title = f"{name}: {group_name}" if len(files) > 1 else group_name
            points.append(_mean_point(title, group, x, y, file))
    table = pareto_front.front_rows(points, x, y)
    pareto_front.save_plot(points, x, y, output)
    result = result_file.make_result("pareto", command_line(), table, {})
    write_json(output.with_suffix(".json"), result)
    _print_table(table, x, y)


def _short_names(files: Sequence[Path]) -> list[str]:
    """File stems if they are unique, else full paths."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


def _parse_condition(text: str) -> tuple[str, str]:
    column, sign, value = text.partition("=")
    if not (column and sign):
        raise ConfigError(
            f"invalid condition {text!r}",
            where="--only",
            fix="write for example --only attached=2",
        )
    return column, value


def _matches(row: Row, column: str, value: str) -> bool:
    return column in row and str(row[column]) == value


def _read_rows(file: Path) -> list[Row]:
    from customize.safe_read import MAX_TABLE_BYTES, read_json

    try:
        rows = read_json(file, MAX_TABLE_BYTES)["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"the result file cannot be read: {reason}",
            where=file,
            fix="give files written by evaluate --json or by a benchmark",
        ) from error
    if not (isinstance(rows, list) and all(map(_is_row, rows))):
        raise DataError(
            'its "rows" are not a table', where=file, fix="give a file of evaluate --json"
        )
    return rows


def _is_row(row: object) -> bool:
    """Whether a row maps columns to text, numbers or null."""
    return isinstance(row, dict) and not any(isinstance(v, list | dict) for v in row.values())


def _column(row: Row, column: str, file: Path) -> str:
    if column not in row:
        raise ConfigError(
            f"some rows have no column {column}",
            where=f"--by, {file}",
            fix=f"{suggest_names(column, row)}, or select rows that have it with --only",
        )
    return str(row[column])


def _check_same_setting(rows: Sequence[Row], ignored: Sequence[str], file: Path) -> None:
    """Refuse to average rows of different settings: rows that differ in text or whole numbers.

    Args:
        rows: Rows with the same columns.
        ignored: Columns in which rows may differ.
        file: File of the rows, for the error.
    """
    for column in rows[0]:
        values = {row.get(column) for row in rows}
        discrete = all(isinstance(value, str | int) for value in values)
        if column not in ignored and discrete and len(values) > 1:
            some = sorted(map(str, values))
            raise ConfigError(
                f"the rows mix settings: {column} is {', '.join(some[:4])}",
                where=file,
                fix=f"give --by {column} for a point each, or select: --only '{column}={some[0]}'",
            )


def _mean_point(name: str, rows: Sequence[Row], x: str, y: str, file: Path) -> Point:
    from customize.core.scalars import as_float
    from customize.evaluation.pareto_front import Point

    means, errors = [], []
    for metric in (x, y):
        values = [row.get(metric) for row in rows]
        numbers = [number for value in values if not isnan(number := as_float(value))]
        if len(numbers) != len(values):
            metrics = [key for key, value in rows[0].items() if isinstance(value, int | float)]
            raise ConfigError(
                f"some rows have no finite number for {metric}",
                where=file,
                fix=f"choose --x and --y from {', '.join(metrics)}, or select rows with --only",
            )
        means.append(fmean(numbers))
        errors.append(stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None)
    return Point(name, means[0], means[1], errors[0], errors[1])


def _print_table(rows: Sequence[Row], x: str, y: str) -> None:
    from rich.table import Table

    from customize.cli.terminal import console

    table = Table("setting", x, y, "front")
    for row in rows:
        cells = []
        for metric in (x, y):
            error = row[f"{metric}_error"]
            cells.append(f"{row[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
        table.add_row(row["name"], *cells, "yes" if row["front"] else "")
    console().print(table)
    console().print(
        "Mean ± one standard error over rows. On the front: no other setting is at least as good in"
        " both metrics and better in one."
    )
