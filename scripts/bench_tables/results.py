"""The result files in scripts/bench/results/, their rows and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"

Row = Mapping[str, Any]
_SOURCE = re.compile(r"(?P<result>\w+):(?P<key>[^\[\]]+)(?:\[(?P<conditions>[^\]]*)\])?")


@cache
def read_result(name: str) -> dict[str, Any]:
    """Return the content of ``scripts/bench/results/NAME.json``."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def find_row(result: str, **conditions: Any) -> Row:
    """Return the only row of a result whose columns have these values.

    Raises:
        LookupError: no row matches, or several do.
    """
    matches = [
        row
        for row in read_result(result)["rows"]
        if all(str(row.get(column)) == str(value) for column, value in conditions.items())
    ]
    if len(matches) != 1:
        raise LookupError(f"{len(matches)} rows of {result}.json match {conditions}")
    row: Row = matches[0]
    return row


def read_figure(source: str) -> float:
    """Return the number that a source names.

    Args:
        source: ``RESULT:KEY`` for an entry of a result's "figures", such as
            ``demo:identity_merged``; ``RESULT:COLUMN[COLUMN=VALUE & ...]`` for a cell of its rows,
            such as ``regions:both[drawn=plain, sum]``; or two of these with " / " or " - " between
            them.

    Raises:
        LookupError: the file, the key or the row does not exist.
    """
    for operator, compute in (
        (" / ", lambda a, b: a / b),
        (" - ", lambda a, b: a - b),
    ):
        first, separator, second = source.partition(operator)
        if separator and ":" in second:
            return float(compute(read_figure(first), read_figure(second)))
    match = _SOURCE.fullmatch(source.strip())
    if match is None:
        raise LookupError(f"{source!r} is not a source such as demo:identity_merged")
    result, key, conditions = match["result"], match["key"], match["conditions"]
    if not (RESULTS / f"{result}.json").is_file():
        raise LookupError(f"there is no result file {result}.json")
    if conditions is None:
        return float(read_result(result)["figures"][key])
    pairs = (condition.split("=", 1) for condition in conditions.split(" & "))
    return median(find_row(result, **{column.strip(): value for column, value in pairs})[key])


def median(cell: Any) -> float:
    """Return the number of a cell, which may be written as "median (lowest to highest)"."""
    return float(cell.split()[0]) if isinstance(cell, str) else float(cell)
