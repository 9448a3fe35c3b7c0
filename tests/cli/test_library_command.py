"""customize library: list, add, check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from customize.concepts.io.read_concept import load_concept
from customize.concepts.library.index import INDEX_FILE
from tests.cli.making import Run, World, record_of, refused
from tests.pipeline.making import concept
from tests.tiny import tiny_sd


@pytest.fixture
def library(run: Run, world: World, tmp_path: Path) -> Path:
    result = run("library", "add", tmp_path / "all", world.rex, world.tom)
    assert result.code == 0, result.err
    assert f"Added {tmp_path / 'all' / 'rex'}, trigger: <rex>" in result.out
    return tmp_path / "all"


def test_list_prints_a_row_per_concept(run: Run, library: Path) -> None:
    result = run("library", "list", library)
    assert result.code == 0
    (rex,) = (line for line in result.out.splitlines() if "<rex>" in line)
    for text in ("rex", "dog", "sd", "tiny", "no"):
        assert text in rex
    assert "2 concepts, " in result.out
    (library / "rex" / "concept.json").write_text("{")
    assert "unreadable: see check" in run("library", "list", library).out


def test_an_empty_library(run: Run, tmp_path: Path) -> None:
    assert "0 concepts, 0.0 MB" in run("library", "list", tmp_path).out
    result = run("library", "check", tmp_path)
    assert (result.code, "0 concepts read completely, 0 faults" in result.out) == (0, True)
    refused(run("library", "list", tmp_path / "none"), "library cannot be read", "folder")


def test_duplicates_are_refused(run: Run, library: Path, world: World) -> None:
    refused(run("library", "add", library, world.rex), "already has the concept rex", "delete")
    refused(run("library", "add", library, "nowhere"), "the concept does not exist")


def test_check_exits_with_1_on_faults(run: Run, library: Path) -> None:
    result = run("library", "check", library)
    assert result.code == 1 and result.out.count("fault: ") == 2
    assert "rex has no recorded layer inputs" in result.out
    for name in ("rex", "tom"):  # of other updates
        made = concept(tiny_sd(), name, index=3)
        path = library / name / "layer_inputs.safetensors"
        record_of(made).save(path)
    result = run("library", "check", library)
    assert result.code == 1 and result.out.count("is of another version of") == 2
    for name in ("rex", "tom"):
        record_of(load_concept(library / name)).save(library / name / "layer_inputs.safetensors")
    result = run("library", "check", library)
    assert (result.code, "2 concepts read completely, 0 faults" in result.out) == (0, True)
    (library / INDEX_FILE).unlink()
    result = run("library", "check", library)
    assert (
        result.code == 0 and "note: 2 rows of the index, missing or outdated, rebuilt" in result.out
    )
    shutil.copytree(library / "rex", library / "double")
    result = run("library", "check", library)
    assert result.code == 1
    assert "<rex> is a trigger of both double and rex" in result.out
    assert "rex and rex share 2 of 2 columns at width 16" in result.out


def test_help_lists_the_subcommands(run: Run) -> None:
    result = run("library", "--help")
    assert run("library") == result
    assert result.code == 0
    for name in ("list", "add", "check"):
        assert name in result.out
    assert "library" in run("--help").out
