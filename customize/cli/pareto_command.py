"""``customize pareto``: which settings no other beats, from files of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from customize.cli.command_support import check_png, command_line, console, write_json
from customize.core.scalars import as_float
from customize.errors import ConfigError, DataError
from customize.evaluation import pareto_front, result_file
from customize.near_names import suggest_names
from customize.safe_read import MAX_TABLE_BYTES, read_json

# What a setting is tried on: rows that differ in these alone are repeats, and are averaged.
REPEATS = ("concept", "seed", "image", "prompt")

Row = Mapping[str, Any]


def run(
    files: Sequence[Path], output: Path, *, x: str, y: str, by: Sequence[str], only: Sequence[str]
) -> None:
    """Draw the points of all files, and write them beside the picture as JSON."""
    check_png(output, "--output")
    wanted = [_condition(text) for text in only]
    points: list[pareto_front.Point] = []
    for file, name in zip(files, _names(files), strict=True):
        rows = [row for row in _rows(file) if all(_is(row, *pair) for pair in wanted)]
        if not rows:
            raise DataError(
                "no row is left" if only else "there are no rows",
                where=file,
                fix="leave out --only, or this file" if only else "give a file of evaluate --json",
            )
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(_value(row, column, file) for column in by), []).append(row)
        for values, group in groups.items():
            _check_alike(group, (*REPEATS, x, y), file)
            words = ", ".join(values)
            told = (f"{name}: {words}" if len(files) > 1 else words) if by else name
            points.append(_point(told, group, x, y, file))
    table = pareto_front.front_rows(points, x, y)
    pareto_front.save_plot(points, x, y, output)
    write_json(
        output.with_suffix(".json"), result_file.make_result("pareto", command_line(), table, {})
    )
    _print(table, x, y)


def _names(files: Sequence[Path]) -> list[str]:
    """What files are called: without folder and ending, where that tells them apart."""
    short = [file.stem for file in files]
    return short if len(set(short)) == len(short) else [str(file) for file in files]


def _condition(text: str) -> tuple[str, str]:
    column, sign, value = text.partition("=")
    if not (column and sign):
        raise ConfigError(
            f"{text!r} is no condition", where="--only", fix="write it such as --only attached=2"
        )
    return column, value


def _is(row: Row, column: str, value: str) -> bool:
    return column in row and str(row[column]) == value


def _rows(file: Path) -> list[Row]:
    try:
        rows = read_json(file, MAX_TABLE_BYTES)["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"the figures cannot be read: {reason}",
            where=file,
            fix="give files that evaluate --json or a benchmark has written",
        ) from error
    if not (isinstance(rows, list) and all(map(_is_row, rows))):
        raise DataError("its rows are no table", where=file, fix="give a file of evaluate --json")
    return rows


def _is_row(row: object) -> bool:
    """Whether it is columns with a text, a number or nothing in each."""
    return isinstance(row, dict) and not any(isinstance(v, list | dict) for v in row.values())


def _value(row: Row, column: str, file: Path) -> str:
    if column not in row:
        raise ConfigError(
            f"not every row has {column}",
            where=f"--by, {file}",
            fix=f"{suggest_names(column, row)}, or keep to rows that have it by --only",
        )
    return str(row[column])


def _check_alike(rows: Sequence[Row], free: Sequence[str], file: Path) -> None:
    """Refuse to average over rows of different settings, which words and whole numbers tell.

    In columns of `free` rows may differ.
    """
    for column in rows[0]:
        values = {row.get(column) for row in rows}
        telling = all(isinstance(value, str | int) for value in values)
        if column not in free and telling and len(values) > 1:
            some = sorted(map(str, values))
            raise ConfigError(
                f"rows of different {column} are not one setting: {', '.join(some[:4])}",
                where=file,
                fix=f"give --by {column} for a point each, or choose: --only '{column}={some[0]}'",
            )


def _point(name: str, rows: Sequence[Row], x: str, y: str, file: Path) -> pareto_front.Point:
    means, errors = [], []
    for rate in (x, y):
        values = [row.get(rate) for row in rows]
        numbers = [number for v in values if not isnan(number := as_float(v))]
        if len(numbers) != len(values):
            rates = [key for key, value in rows[0].items() if isinstance(value, int | float)]
            raise ConfigError(
                f"not every row has a finite number for {rate}",
                where=file,
                fix=f"choose --x and --y from {', '.join(rates)}, or rows by --only",
            )
        means.append(fmean(numbers))
        errors.append(stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else None)
    return pareto_front.Point(name, means[0], means[1], errors[0], errors[1])


def _print(table: Sequence[Row], x: str, y: str) -> None:
    from rich.table import Table

    shown = Table("setting", x, y, "front")
    for row in table:
        cells = []
        for rate in (x, y):
            error = row[f"{rate}_error"]
            cells.append(f"{row[rate]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
        shown.add_row(row["name"], *cells, "yes" if row["front"] else "")
    out = console()
    out.print(shown)
    out.print(
        "Means ± one standard error over rows. On the front is what no other beats: none is as good"
        " in both and better in one.",
        soft_wrap=True,
    )
