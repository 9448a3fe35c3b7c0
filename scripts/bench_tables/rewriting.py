"""Tables of rewriting; without a result they name the file that is missing."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bench_tables.markdown import decimals, format_table, percent, significant
from scripts.bench_tables.references import if_measured
from scripts.bench_tables.results import Row

_KINDS = ("short", "misspelt", "odd order", "unseen words", "long-winded", "trigger and negation")


def rewriting_table() -> str:
    """What pictures show, and what texts keep and add, by what is drawn from."""

    def table(rows: Sequence[Row]) -> str:
        head = ["Drawn from", "Shown", "Whole", "Reward", "Kept", "By the model", "Own", "Added"]
        cells = [
            [
                row["drawn from"],
                f"{decimals(row['shown'], 3)} ± {decimals(row['shown_se'], 3)}",
                percent(row["whole"]),
                decimals(row.get("reward")),
                percent(row["kept"]),
                percent(row.get("kept_by_the_model")),
                percent(row.get("own")),
                decimals(row["added"], 3),
                decimals(row["words"], 1),
                decimals(row.get("seconds")),
            ]
            for row in rows
        ]
        return format_table([*head, "Words", "Seconds"], cells)

    return if_measured("rewriting", table)


def rewriting_kinds_table() -> str:
    """What pictures show, by kind of prompt."""

    def table(rows: Sequence[Row]) -> str:
        cells = [[row["drawn from"], *(percent(row[kind]) for kind in _KINDS)] for row in rows]
        return format_table(["Drawn from", *(kind.capitalize() for kind in _KINDS)], cells)

    return if_measured("rewriting", table)


def rewrite_cost_table() -> str:
    """Seconds that rewriting adds, cold and warm."""

    def table(rows: Sequence[Row]) -> str:
        cells = [
            [
                row["model"],
                row["cache"],
                str(row["prompts"]),
                significant(1000 * row["seconds_added"]),
                percent(row["of_a_picture"])
                if row["cache"] == "cold"
                else f"{100 * row['of_a_picture']:.1f} %",
            ]
            for row in rows
        ]
        head = ["Model", "Cache", "Prompts", "Milliseconds a picture", "Of a picture's time"]
        return format_table(head, cells, 2)

    return if_measured("rewrite_cost", table)
