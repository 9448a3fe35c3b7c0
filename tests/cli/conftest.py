"""A small base and two concepts on disk, and a way to run one command."""

from __future__ import annotations

import pytest

from customize.cli import main
from customize.concepts.io.write_concept import save_concept
from tests.cli.making import Result, Run, World
from tests.pipeline.making import concept
from tests.tiny import tiny_sd


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    pipe = tiny_sd()
    pipe.save_pretrained(root / "base")
    for index, name in enumerate(("rex", "tom")):
        save_concept(concept(pipe, name, index=index), root / name)
    return World(str(root / "base"), str(root / "rex"), str(root / "tom"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command in this process, on a terminal wide enough for its tables."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run
