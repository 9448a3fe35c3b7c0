"""Tables of several concepts in one image; without a result they name the file that is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.bench_tables.markdown import decimals, format_table, percent
from scripts.bench_tables.results import RESULTS, Row, find_row, read_result

_LABELS = {
    "ours from words, fusion": "**`together=True`**, fusion",
    "ours from words, sum": "`together=True`, sum",
    "ours in boxes, fusion": "`together=` with boxes, fusion",
    "plain, fusion": "plain prompt, fusion",
    "plain, sum": "plain prompt, sum",
    "regions= in boxes, fusion": "`regions=` (boxes), fusion",
    "regions in cross-attention, fusion": "regions in cross-attention alone (boxes), fusion",
    "each alone beside classes": "each concept alone, beside plain things",
    "each alone in its box": "each concept alone, in its box",
}
_GROUPS = {
    "mixed": "Two classes",
    "same": "One class",
    "mixed, wide": "Two classes, 128 x 64",
    "same, wide": "One class, 128 x 64",
    "triples": "Triples, 128 x 64",
}


def _rows() -> dict[str, dict[str, Row]]:
    """Drawn by -> group -> row; nothing before the groups are measured."""
    if not (RESULTS / "together.json").is_file():
        return {}
    rows: dict[str, dict[str, Row]] = {}
    for row in read_result("together")["rows"]:
        if "group" in row:
            rows.setdefault(row["drawn"], {})[row["group"]] = row
    return rows


def _label(drawn: str) -> str:
    base, comma, _ = drawn.partition(", ordinary LoRAs")
    if base == "ours from words":
        base = "ours from words, sum"
    return f"{_LABELS.get(base, base)}{comma and '; ordinary LoRAs'}"


def _share(row: Row | None, column: str) -> str:
    if row is None or column not in row:
        return ""
    error = row.get(f"{column}_error")
    return percent(row[column]) + ("" if error is None else f" ± {percent(error)}")


def _table(head: Sequence[str], cells: list[list[str]]) -> str:
    shown = [line for line in cells if any(line[1:])]
    if not shown:
        return "Not measured yet: run `python scripts/bench/together.py`."
    return format_table(head, shown)


def _pairs_table() -> str:
    """The result of the six pairs that were measured before the groups."""
    rows = []
    for label, drawn in (
        ("plain prompt, fusion", "plain, fusion"),
        ("plain prompt, sum", "plain, sum"),
        ("`together=True`, fusion", "together, fusion"),
        ("`together=` with the two halves, fusion", "together with halves, fusion"),
        ("`regions=`, fusion", "regions, fusion"),
    ):
        row = find_row("together", drawn=drawn)
        both = f"{percent(row['both'])} ± {percent(row['error'])}"
        rates = [percent(row[column]) for column in ("left", "right")]
        rows.append([label, both, *rates])
    return format_table(["", "Both recognised", "Left", "Right"], rows)


def together_table() -> str:
    """Shares of images in which all concepts are right, by group."""
    if (RESULTS / "together.json").is_file() and not _rows():
        return _pairs_table()
    cells = []
    for drawn, groups in _rows().items():
        ratios = [
            row["seconds_over_plain"] for row in groups.values() if "seconds_over_plain" in row
        ]
        seconds = decimals(ratios[0]) if ratios else ""
        shares = [_share(groups.get(group), "all") for group in _GROUPS]
        cells.append([_label(drawn), *shares, seconds])
    return _table(["All recognised", *_GROUPS.values(), "Seconds over plain"], cells)


def together_parts_table() -> str:
    """What is right and wrong in pairs in 64 x 64 pixels: of two classes; of one."""
    columns = {
        "part 0": "Left",
        "part 1": "Right",
        "swapped": "Swapped",
        "missing": "A thing missing",
        "place": "Place",
        "retention": "Of each alone",
    }
    cells = []
    for drawn, groups in _rows().items():
        pair: list[Any] = [groups.get("mixed"), groups.get("same")]
        shares = [[percent(row.get(column)) for row in pair if row] for column in columns]
        cells.append([_label(drawn), *("; ".join(each) for each in shares)])
    return _table(["Pairs of two classes; of one", *columns.values()], cells)


def together_classes_table() -> str:
    """A concept beside a plain thing of another class."""
    columns = {
        "leak": "Leak",
        "recognised": "Taken for a concept",
        "coloured": "Colour and pattern of the named one",
        "all": "The named one recognised",
    }
    cells = []
    for drawn, groups in _rows().items():
        row = groups.get("beside a class")
        cells.append([_label(drawn), *(_share(row, column) for column in columns)])
    return _table(["A concept and a plain thing", *columns.values()], cells)
