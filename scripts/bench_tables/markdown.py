"""Markdown tables, and numbers as their cells show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percent(value: float | None) -> str:
    """Format a fraction as a percentage without decimals; halves are rounded up."""
    return "" if value is None else f"{math.floor(100 * value + 0.5)} %"


def decimals(value: float | None, places: int = 2) -> str:
    """Format a number with a fixed number of decimals; an empty cell for None."""
    return "" if value is None else f"{value:.{places}f}"


def significant(value: float | None) -> str:
    """Format a number with two significant digits and without an exponent."""
    if value is None:
        return ""
    places = 0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{places}f}"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table; columns after the first ``text_columns`` are right-aligned."""
    line = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, line, *rows])
