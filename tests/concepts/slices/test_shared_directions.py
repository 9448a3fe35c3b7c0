"""Files of shared directions: a folder has one, the first recording."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from customize.concepts.concept_info import BasisInfo
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library.library import add_to_library
from customize.concepts.slices.shared_directions import (
    SharedDirections,
    directions_path,
    find_direction_files,
    recording_name,
)
from customize.errors import ConceptError
from tests.concepts.making import small

NAME = "0123456789abcdef"


def factors(seed: int = 0, width: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    strengths = torch.linspace(1, 0.1, width)
    rows = (strengths / strengths.norm())[:, None] * axes
    return {"unet": {"to_q": rows, "to_k": rows}}


def test_round_trip(tmp_path) -> None:
    saved = SharedDirections(NAME, factors()).save(directions_path(tmp_path, NAME))
    loaded = SharedDirections.load(directions_path(tmp_path, NAME))
    assert loaded.name == saved.name == NAME and find_direction_files(tmp_path) == [
        directions_path(tmp_path, NAME)
    ]
    for module, rows in factors()["unet"].items():
        torch.testing.assert_close(loaded.factors["unet"][module], rows, atol=1e-3, rtol=0)
    assert not list(tmp_path.glob(".*.partial"))


def test_first_recording_is_not_overwritten(tmp_path) -> None:
    path = directions_path(tmp_path, NAME)
    first = SharedDirections(NAME, factors()).save(path)
    before = path.read_bytes()
    second = SharedDirections(NAME, factors(1)).save(path)
    assert path.read_bytes() == before
    assert torch.equal(first.factors["unet"]["to_q"], second.factors["unet"]["to_q"])


def _save(path, seed, barrier, answers):
    recorded = SharedDirections(NAME, factors(seed))
    barrier.wait()
    answers.put(float(recorded.save(path).factors["unet"]["to_q"].sum()))


def test_concurrent_recordings_all_use_one(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(6), context.Queue()
    started = [
        context.Process(
            target=_save, args=(directions_path(tmp_path, NAME), seed, barrier, answers)
        )
        for seed in range(6)
    ]
    for process in started:
        process.start()
    results = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert len(set(results)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [directions_path(tmp_path, NAME).name]


def test_name_of_earlier_files_is_a_hash_of_the_content(tmp_path) -> None:
    # As version 0.1 wrote and named it.
    path = directions_path(tmp_path, "01234567")
    LayerInputs("generic prompts", {}, factors()).save(path)
    loaded = SharedDirections.load(path)
    assert loaded.name != NAME and len(loaded.name) == 16
    assert SharedDirections.load(path).name == loaded.name
    LayerInputs("generic prompts", {}, factors(1)).save(path)
    assert SharedDirections.load(path).name != loaded.name
    # A copy under another file name keeps the name of its content.
    assert loaded.save(directions_path(tmp_path, NAME)).name == loaded.name


def test_damaged_file_is_refused_with_a_fix(tmp_path) -> None:
    path = directions_path(tmp_path, NAME)
    path.write_bytes(b"damaged")
    with pytest.raises(ConceptError, match=r"shared directions cannot be read.*delete it"):
        SharedDirections.load(path)


def test_covers_ignores_signs_order_and_rotations() -> None:
    rows = factors()["unet"]["to_q"]
    known = SharedDirections(NAME, {"unet": {"to_q": rows}})

    def covers(other: torch.Tensor, avoid: int = 4) -> bool:
        return known.covers({"unet": {"to_q": other}}, avoid)

    turn, _ = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)))
    lead = rows[:2].norm(dim=1).mean() * (turn @ torch.nn.functional.normalize(rows[:2]))
    assert covers(-rows) and covers(rows + 1e-4 * torch.randn(rows.shape))
    assert covers(torch.cat([lead, rows[2:]]))
    assert not covers(factors(1)["unet"]["to_q"])
    assert not covers(torch.randn(4, 12)) and not known.covers({}, 4)
    assert covers(factors(1)["unet"]["to_q"], avoid=0)


def test_recording_name_depends_on_the_facts() -> None:
    facts = {"weights": {"unet": "ab"}, "steps": 8}
    assert recording_name(facts) == recording_name(dict(reversed(facts.items())))
    assert recording_name(facts) != recording_name(facts | {"steps": 9})


def test_adding_a_concept_copies_its_directions_unless_covered(tmp_path) -> None:
    shared = BasisInfo(num_shared_directions=1, shared_directions=NAME)
    slices = {"6": [2, 3], "8": [0, 1]}
    for name in ("rex", "tom"):
        rex = small(name=name, trigger=f"<{name}>", basis=shared, slices=slices)
        save_concept(rex, tmp_path / "home" / name)
    SharedDirections(NAME, factors()).save(directions_path(tmp_path / "home", NAME))
    SharedDirections("f" * 16, factors(1)).save(directions_path(tmp_path / "home", "f" * 16))
    add_to_library(tmp_path / "library", tmp_path / "home" / "rex")
    assert find_direction_files(tmp_path / "library") == [
        directions_path(tmp_path / "library", NAME)
    ]
    # Directions that cover them, such as those of another machine, stay.
    near = {"unet": {m: rows + 1e-4 for m, rows in factors()["unet"].items()}}
    SharedDirections("a" * 16, near).save(directions_path(tmp_path / "other", "a" * 16))
    directions_path(tmp_path / "other", "b" * 16).write_bytes(b"damaged")
    before = find_direction_files(tmp_path / "other")
    add_to_library(tmp_path / "other", tmp_path / "home" / "tom")
    assert find_direction_files(tmp_path / "other") == before
