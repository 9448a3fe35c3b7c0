"""Runs that are killed at any time: the next run resumes or restarts, and no files are left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from customize.atomic import is_partial
from customize.concepts.io.file_layout import INFO_FILE, LAYER_INPUTS_FILE, RESERVATION_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from tests.cli.making import photos
from tests.concepts.making import same_tensors, small
from tests.tiny import tiny_sd

#: How many processes `make test-hostile` kills.
KILLS = int(os.environ.get("HOSTILE_KILLS", "40"))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

# On a busy machine it takes longer than other tests may.
pytestmark = [pytest.mark.hostile, pytest.mark.timeout(3600)]


def start_command(command: list[str]) -> int:
    """Start a command in a forked process, which saves the time of the imports."""
    import customize.cli.app  # noqa: F401  imported before the fork

    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        from customize.cli import main

        code = main(command)
    finally:
        os._exit(code)


def wait_for_exit(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if is_partial(path.name)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    concept = load_concept(folder)
    actual = {f"token {key}": rows for key, rows in concept.embeddings.items()}
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            actual[f"{component}.{module}.up"] = update.up
            actual[f"{component}.{module}.down"] = update.down
    return actual


def test_killed_training_resumes_to_the_same_result(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    images = photos(tmp_path / "photos")

    def command(library: Path) -> list[str]:
        train = ["train", "--base", str(tmp_path / "base"), "--images", str(images)]
        train += ["--name", "max", "--class-word", "dog", "--rank", "2", "--steps", "12"]
        train += ["--batch-size", "1", "--device", "cpu", "--checkpoint-every", "2"]
        return [*train, "--library", str(library), "--output", str(library / "max")]

    begun = time.monotonic()
    assert wait_for_exit(start_command(command(tmp_path / "whole"))) == 0
    lasts = time.monotonic() - begun
    expected = tensors_of(tmp_path / "whole" / "max")
    rng, counts = random.Random(0), Counter[str]()
    chain = 0
    while counts["killed"] < KILLS:
        chain += 1
        library = tmp_path / f"chain-{chain}"
        for _ in range(rng.randrange(1, 6)):
            child = start_command(command(library))
            time.sleep(rng.random() * lasts)
            os.kill(child, rng.choice(SIGNALS))
            code = wait_for_exit(child)
            counts["killed" if code else "ended before"] += 1
            if (library / "max" / INFO_FILE).is_file():
                counts["had a concept"] += 1
        time.sleep(2.5)  # newer leftovers are not deleted
        assert wait_for_exit(start_command(command(library))) == 0
        actual = tensors_of(library / "max")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in actual)
        assert (library / "max" / LAYER_INPUTS_FILE).is_file()
        assert not (library / "max" / RESERVATION_FILE).exists()
        assert leftovers(library) == []
        counts["chains"] += 1
    print(f"\ntraining: {dict(counts)}")


def test_killed_save_leaves_a_complete_concept_or_none(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    rng = random.Random(1)
    first, second = small(), small(seed=1)
    folder = tmp_path / "rex"
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            try:
                while True:
                    for concept in (first, second):
                        save_concept(concept, folder)
                        save_concept(concept, tmp_path / "rex.safetensors")
            finally:
                os._exit(1)
        time.sleep(0.02 + rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        wait_for_exit(child)
        if (tmp_path / "rex.safetensors").exists():  # one file is replaced at once
            read = load_concept(tmp_path / "rex.safetensors")
            assert same_tensors(read, first) or same_tensors(read, second)
            counts["whole files"] += 1
        counts["killed"] += 1
        counts["leftovers"] += len(leftovers(tmp_path))
    time.sleep(2.5)
    save_concept(first, folder)
    assert same_tensors(load_concept(folder), first)
    assert leftovers(tmp_path) == []
    print(f"\nsaving: {dict(counts)}, all swept by the next")
