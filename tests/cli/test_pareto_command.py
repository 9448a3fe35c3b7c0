"""customize pareto: points from result files, a plot, and a result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.making import Run, refused


def figures(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"bench": "evaluate", "rows": rows, "figures": {}}))
    return path


def rows(identity: tuple[float, float], prompt: float) -> list[dict[str, Any]]:
    """Rows as written by evaluate --storybook: two concepts alone, and both merged."""
    alone = [
        {"concept": name, "attached": 1, "seed": 1, "identity": 1.0, "prompt": 1.0, "leak": 0.0}
        for name in ("rex", "tom")
    ]
    return [
        *alone,
        *(
            row | {"attached": 2, "identity": share, "prompt": prompt}
            for row, share in zip(alone, identity, strict=True)
        ),
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        figures(tmp_path / "sum.json", rows((0.2, 0.4), 0.9)),
        figures(tmp_path / "fusion.json", rows((0.8, 0.9), 0.8)),
        figures(tmp_path / "worse.json", rows((0.8, 0.8), 0.8)),
    ]


def test_one_point_per_file(run: Run, files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "front.png"
    result = run("pareto", *files, "--only", "attached=2", "--output", output)
    assert (result.code, result.err) == (0, "")
    assert "0.850 ± 0.050" in result.out and "standard error" in result.out
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > 500
    report = json.loads((tmp_path / "front.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["sum", "fusion", "worse"]
    assert [row["front"] for row in report["rows"]] == [True, True, False]
    first = report["rows"][0]
    assert first["identity"] == pytest.approx(0.3) and first["prompt"] == pytest.approx(0.9)
    assert first["identity_error"] == pytest.approx(0.1) and first["prompt_error"] == 0.0
    # The written result file is valid input, too.
    again = ("--by", "name", "--only", "front=True", "--output", tmp_path / "again.png")
    assert run("pareto", tmp_path / "front.json", *again).code == 0
    actual = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert [row["name"] for row in actual] == ["sum", "fusion"]


def test_one_point_per_value_of_a_column(run: Run, files: list[Path], tmp_path: Path) -> None:
    flags = ("--by", "attached", "--x", "leak", "--output", tmp_path / "front.png")
    assert run("pareto", files[0], *flags).code == 0
    report = json.loads((tmp_path / "front.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["1", "2"]
    assert [row["leak"] for row in report["rows"]] == [0.0, 0.0]
    assert [row["front"] for row in report["rows"]] == [True, False]
    assert run("pareto", *files[:2], *flags).code == 0
    report = json.loads((tmp_path / "front.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["sum: 1", "sum: 2", "fusion: 1", "fusion: 2"]
    other = tmp_path / "other"
    other.mkdir()
    same = [files[0], figures(other / "sum.json", rows((0.5, 0.5), 0.5))]
    assert run("pareto", *same, *flags).code == 0
    report = json.loads((tmp_path / "front.json").read_text())
    assert {row["name"].removesuffix(": 1").removesuffix(": 2") for row in report["rows"]} == {
        str(file) for file in same
    }


def test_invalid_input(run: Run, files: list[Path], tmp_path: Path) -> None:
    output = ("--output", tmp_path / "front.png")
    refused(
        run("pareto", *files, *output),
        *("the rows mix settings: attached is 1, 2", "--by attached", "sum.json"),
    )
    chosen = (*files, "--only", "attached=2")
    refused(run("pareto", *chosen, *output, "--x", "depth"), "finite number for depth", "identity")
    refused(run("pareto", *chosen, *output, "--x", "concept"), "finite number for concept")
    refused(
        run("pareto", *chosen, *output, "--by", "way"), "some rows have no column way", "attached"
    )
    refused(run("pareto", *files, *output, "--only", "attached"), "invalid condition 'attached'")
    refused(
        run("pareto", *files, *output, "--only", "attached=3"), "no rows match --only", "sum.json"
    )
    refused(
        run("pareto", *chosen, "--output", tmp_path / "front.jpg"),
        "does not end in .png",
        "--output",
    )
    refused(run("pareto", *chosen, "--output", tmp_path / "no" / "f.png"), "does not exist")
    refused(run("pareto", tmp_path / "no.json", *output), "cannot be read", "No such file")
    for text in (
        "{",
        "[]",
        '{"rows": 3}',
        '{"rows": [1]}',
        '{"rows": [{"prompt": [1], "identity": 1}]}',
        '{"rows": []}',
    ):
        (tmp_path / "bad.json").write_text(text)
        refused(run("pareto", tmp_path / "bad.json", *output), "bad.json")
    bad = figures(tmp_path / "bad.json", [{"identity": float("nan"), "prompt": 1.0}])
    refused(run("pareto", bad, *output), "some rows have no finite number for identity")
    assert not (tmp_path / "front.png").exists() and not (tmp_path / "front.json").exists()
