"""Every writer of the package with every command that reads concepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from tests.cli.making import Run, World

PROMPT = "a photo of <rex> and <tom>"

#: Writer -> arguments of merge, None for the concepts themselves, and name of the file.
WRITERS = {
    "folders": (None, ""),
    "single files": (None, ".safetensors"),
    "diffusers": ([], ""),
    "diffusers, its LoRA": ([], "pytorch_lora_weights.safetensors"),
    "kohya": (["--format", "kohya"], ""),
    "kohya, its LoRA": (["--format", "kohya"], "duo.safetensors"),
    "truncated": (["--rank", "4"], ""),
    "merged again": (["again"], ""),
}


@pytest.fixture(scope="module")
def written(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    from customize.cli import main

    actual = {}
    for number, (name, (arguments, file)) in enumerate(WRITERS.items()):
        root = tmp_path_factory.mktemp(f"written{number}")
        if arguments is None:
            sources = [world.rex, world.tom]
            if file:
                sources = [
                    str(save_concept(load_concept(item), root / f"{Path(item).name}{file}"))
                    for item in sources
                ]
            actual[name] = sources
            continue
        if arguments == ["again"]:
            arguments = ["--format", "kohya"]
            assert main(["merge", *actual["diffusers"], "-o", str(root / "duo"), *arguments]) == 0
        else:
            both = ["merge", world.rex, world.tom, "--output", str(root / "duo")]
            assert main([*both, *arguments]) == 0
        actual[name] = [str(root / "duo" / file) if file else str(root / "duo")]
    return actual


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    from customize.cli import main

    out = tmp_path_factory.mktemp("expected")
    assert main([*drawing(world, [world.rex, world.tom]), "--output", str(out)]) == 0
    return pixels(out)


def drawing(world: World, sources: list[str]) -> list[str]:
    # A written merge is one adapter, whose concepts cannot be kept apart.
    call = ["--steps", "2", "--size", "32", "--device", "cpu", "--merge", "sum", "--no-together"]
    return ["generate", *sources, "--base", world.base, "--prompt", PROMPT, *call]


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "0001.png"), dtype=int)


@pytest.fixture(params=WRITERS)
def sources(request: pytest.FixtureRequest, written: dict[str, list[str]]) -> Iterator[list[str]]:
    yield written[request.param]


def test_generate(
    run: Run, world: World, sources: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    result = run(*drawing(world, sources), "--output", tmp_path)
    assert result.code == 0 and "note" not in result.err, result
    assert np.abs(pixels(tmp_path) - expected).max() <= 1
    facts = json.loads((tmp_path / "0001.json").read_text())
    subjects: dict[str, str] = {}
    for item in facts["concepts"]:
        subjects |= item["subjects"]
    assert subjects == {"<rex>": "dog", "<tom>": "dog"}


def test_inspect(run: Run, sources: list[str]) -> None:
    result = run("inspect", *sources)
    assert result.code == 0, result
    assert "<rex>" in result.out and "<tom>" in result.out


def test_merge_again(
    run: Run, world: World, sources: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    result = run("merge", *sources, "--merge", "sum", "--output", tmp_path / "m")
    assert result.code == 0, result
    assert run(*drawing(world, [str(tmp_path / "m")]), "--output", tmp_path / "out").code == 0
    assert np.abs(pixels(tmp_path / "out") - expected).max() <= 1


def test_merge_into_a_pipeline(
    run: Run, world: World, sources: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    both = ("merge", *sources, "--merge", "sum", "--fuse", "--base", world.base)
    result = run(*both, "--output", tmp_path / "whole")
    assert result.code == 0, result
    other = World(str(tmp_path / "whole"), "", "")
    result = run(*drawing(other, []), "--output", tmp_path / "out")
    assert result.code == 0 and "note" not in result.err, result
    assert np.abs(pixels(tmp_path / "out") - expected).max() <= 1


def test_library(
    run: Run, world: World, sources: list[str], expected: np.ndarray, tmp_path: Path
) -> None:
    result = run("library", "add", tmp_path / "library", *sources)
    assert result.code == 0, result
    assert "<rex>" in run("library", "list", tmp_path / "library").out
    call = drawing(world, [])
    result = run(*call, "--library", tmp_path / "library", "--output", tmp_path / "out")
    assert result.code == 0 and "note" not in result.err, result
    assert np.abs(pixels(tmp_path / "out") - expected).max() <= 1


@pytest.mark.slow
def test_record(run: Run, world: World, sources: list[str], tmp_path: Path) -> None:
    """Library check and merges by fusion find the recorded layer inputs."""
    assert run("library", "add", tmp_path / "library", *sources).code == 0
    added = sorted(p for p in (tmp_path / "library").iterdir() if not p.name.startswith("."))
    result = run("record", *added, "--base", world.base, "--prompt", "a {}", "--device", "cpu")
    assert result.code == 0, result
    result = run("library", "check", tmp_path / "library")
    assert result.code == 0 and "0 faults" in result.out, result


def test_a_pipeline_as_a_concept_is_refused(run: Run, world: World) -> None:
    result = run("inspect", world.base)
    assert result.code == 2 and "--base" in result.err and "whole pipeline" in result.err


def test_prompts_of_images_of_a_merge(written: dict[str, list[str]], tmp_path: Path) -> None:
    from customize.cli.sample_files import read_prompts, read_samples

    Image.new("RGB", (32, 32)).save(tmp_path / "0001.png")
    facts = {"prompt": PROMPT, "concepts": [{"subjects": {"<rex>": "dog", "<tom>": "cat"}}]}
    (tmp_path / "0001.json").write_text(json.dumps(facts))
    assert read_prompts(read_samples(tmp_path), None, None) == ["a photo of dog and cat"]
