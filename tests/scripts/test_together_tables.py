"""Tables of several concepts in one image, before and after the groups are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.bench_tables import results, together


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of results."""
    for module in (together, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    results.read_result.cache_clear()
    yield tmp_path
    results.read_result.cache_clear()


def write(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "together.json").write_text(json.dumps({"rows": rows, "figures": {}}))


def test_without_a_result_its_command_is_named(folder: Path) -> None:
    for table in (
        together.together_table,
        together.together_parts_table,
        together.together_classes_table,
    ):
        assert table() == "Not measured yet: run `python scripts/bench/together.py`."


def test_groups_are_columns_and_empty_rows_are_left_out(folder: Path) -> None:
    pair = {"part 0": 0.9, "part 1": 0.8, "swapped": 0.0, "missing": 0.1, "place": 1.0}
    all_right = {"all": 0.7, "all_error": 0.04, "seconds_over_plain": 1.1}
    ours = {"drawn": "ours from words, fusion", **pair, **all_right}
    alone = {"drawn": "each alone beside classes, ordinary LoRAs", "all": 0.8, "all_error": 0.03}
    base = {"group": "beside a class", "drawn": "base model, classes", "leak": 0.02}
    write(
        folder,
        {"group": "mixed", **ours, "retention": 0.875},
        {"group": "triples", **ours, "all": 0.3},
        {"group": "same", **ours, "part 0": 0.5},
        {"group": "same, wide", **alone},
        base | {"leak_error": 0.01, "recognised": 0.0, "coloured": 0.02},
    )
    assert together.together_table().splitlines()[2:] == [
        "| **`together=True`**, fusion | 70 % ± 4 % | 70 % ± 4 % |  |  | 30 % ± 4 % | 1.10 |",
        "| each concept alone, beside plain things; ordinary LoRAs |  |  |  | 80 % ± 3 % |  |  |",
    ]
    assert together.together_parts_table().splitlines()[2:] == [
        "| **`together=True`**, fusion | 90 %; 50 % | 80 %; 80 % | 0 %; 0 % | 10 %; 10 % "
        "| 100 %; 100 % | 88 %;  |"
    ]
    assert together.together_classes_table().splitlines()[2:] == [
        "| base model, classes | 2 % ± 1 % | 0 % | 2 % |  |"
    ]
