"""Tables of reference images; without a result they name the file that is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scripts.bench_tables.markdown import decimals, format_table, percent
from scripts.bench_tables.results import RESULTS, Row, read_result

_RATES = ("identity", "prompt", "composition", "leak")


def if_measured(name: str, table: Callable[[Sequence[Row]], str]) -> str:
    if not (RESULTS / f"{name}.json").is_file():
        return f"There is no `results/{name}.json` yet."
    return table(read_result(name)["rows"])


def _optional(value: float | None, places: int) -> str:
    return "" if value is None else decimals(value, places)


def references_table() -> str:
    """Rates of unseen identities by number of images, and of the rivals."""

    def table(rows: Sequence[Row]) -> str:
        cells = [
            [
                row["drawn by"],
                str(row["images"]),
                f"{percent(row['identity'])} ± {percent(row['identity_se'])}",
                *(percent(row[rate]) for rate in _RATES[1:]),
                _optional(row.get("training_seconds"), 0),
            ]
            for row in rows
        ]
        titles = [rate.capitalize() for rate in _RATES]
        return format_table(["Drawn by", "Images", *titles, "Seconds of training"], cells)

    return if_measured("references", table)


def _cost_table(part: str, head: Sequence[str], columns: Sequence[str]) -> str:
    def table(rows: Sequence[Row]) -> str:
        cells = [
            [row["how"], *(_cell(row.get(column)) for column in columns)]
            for row in rows
            if row["part"] == part
        ]
        return format_table(head, cells)

    return if_measured("reference_cost", table)


def reference_reading_table() -> str:
    """Time of the encoder by number of images."""
    return _cost_table(
        "reading", ["", "Images", "Time over that of one image"], ["references", "of_one"]
    )


def reference_denoiser_table() -> str:
    """Time of a denoiser's prediction by number of images."""
    return _cost_table(
        "denoiser", ["", "Images", "Time over that without references"], ["references", "time"]
    )


def reference_keys_table() -> str:
    """Keys and values once a picture, and at every step."""
    return _cost_table(
        "keys and values", ["", "Layers", "Seconds", "Faster"], ["layers", "seconds", "faster"]
    )


def reference_attributes_table() -> str:
    """All columns of the result, by attribute."""

    def table(rows: Sequence[Row]) -> str:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        texts = [c for c in columns if any(isinstance(row.get(c), str) for row in rows)]
        ordered = [*texts, *(c for c in columns if c not in texts)]
        cells = [[_rate_cell(row.get(column)) for column in ordered] for row in rows]
        return format_table([c.capitalize().replace("_", " ") for c in ordered], cells, len(texts))

    return if_measured("reference_attributes", table)


def reference_avoid_table() -> str:
    """Rates with standard errors, by what is avoided."""

    def table(rows: Sequence[Row]) -> str:
        rates = ("left", "kept", "identity", "prompt")
        cells = [
            [
                row["avoided"],
                row["drawn by"],
                *(f"{percent(row[rate])} ± {percent(row[f'{rate}_se'])}" for rate in rates),
            ]
            for row in rows
        ]
        titles = [rate.capitalize() for rate in rates]
        return format_table(["Avoided", "Drawn by", *titles], cells, 2)

    return if_measured("reference_avoid", table)


def _rate_cell(value: Any) -> str:
    return percent(value) if isinstance(value, float) else _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return decimals(value)
    return "" if value is None else str(value)
