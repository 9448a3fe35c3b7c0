"""Tables of reference images, with and without their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.bench_tables import references, results


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of results."""
    for module in (references, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    results.read_result.cache_clear()
    yield tmp_path
    results.read_result.cache_clear()


def write(folder: Path, name: str, *rows: dict[str, object]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows, "figures": {}}))


def test_without_a_result_its_file_is_named(folder: Path) -> None:
    assert references.references_table() == "There is no `results/references.json` yet."
    for table in (references.reference_keys_table, references.reference_denoiser_table):
        assert table() == "There is no `results/reference_cost.json` yet."


def test_rates_and_the_seconds_of_a_concept(folder: Path) -> None:
    row = {"images": 8, "prompt": 0.97, "composition": 0.9, "leak": 0.1, "identity_se": 0.02}
    ours = {"drawn by": "references", "identity": 0.7} | row
    trained = {"drawn by": "concept", "identity": 0.876, "training_seconds": 44.6} | row
    write(folder, "references", ours, trained)
    lines = references.references_table().splitlines()
    assert lines[2] == "| references | 8 | 70 % ± 2 % | 97 % | 90 % | 10 % |  |"
    assert lines[3] == "| concept | 8 | 88 % ± 2 % | 97 % | 90 % | 10 % | 45 |"


def test_each_part_of_the_cost_has_a_table(folder: Path) -> None:
    write(
        folder,
        "reference_cost",
        {"part": "reading", "how": "one group", "references": 28, "of_one": "27.9 (27 to 28)"},
        {"part": "denoiser", "how": "tokens", "references": 4, "time": "1.02 (1.0 to 1.1)"},
        {"part": "keys and values", "how": "once", "layers": "70", "seconds": 0.5, "faster": "29"},
    )
    reading, denoiser, keys = (
        table().splitlines()
        for table in (
            references.reference_reading_table,
            references.reference_denoiser_table,
            references.reference_keys_table,
        )
    )
    assert reading[2:] == ["| one group | 28 | 27.9 (27 to 28) |"]
    assert denoiser[2:] == ["| tokens | 4 | 1.02 (1.0 to 1.1) |"]
    assert keys[2:] == ["| once | 70 | 0.50 | 29 |"]


def test_avoided_content_has_rates_with_errors(folder: Path) -> None:
    rates = {"left": 0.02, "kept": 0.65, "identity": 0.021, "prompt": 1.0}
    errors = {f"{name}_se": 0.025 for name in rates}
    row = {"avoided": "colour", "drawn by": "`avoid=`"} | rates | errors
    write(folder, "reference_avoid", row)
    line = references.reference_avoid_table().splitlines()[2]
    assert line == "| colour | `avoid=` | 2 % ± 3 % | 65 % ± 3 % | 2 % ± 3 % | 100 % ± 3 % |"


def test_attributes_have_all_columns(folder: Path) -> None:
    write(
        folder,
        "reference_attributes",
        {"attribute": "colour", "sources": 1, "taken": 0.5},
        {"attribute": "pattern", "sources": 2, "taken": 0.25, "others": 0.125},
    )
    assert references.reference_attributes_table().splitlines() == [
        "| Attribute | Sources | Taken | Others |",
        "| --- | ---: | ---: | ---: |",
        "| colour | 1 | 50 % |  |",
        "| pattern | 2 | 25 % | 13 % |",
    ]
