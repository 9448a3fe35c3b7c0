"""Files of shared directions: one for a folder, whoever comes first."""

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


def test_what_is_written_is_read_under_its_name(tmp_path) -> None:
    saved = SharedDirections(NAME, factors()).save(directions_path(tmp_path, NAME))
    found = SharedDirections.load(directions_path(tmp_path, NAME))
    assert found.name == saved.name == NAME and find_direction_files(tmp_path) == [
        directions_path(tmp_path, NAME)
    ]
    for module, rows in factors()["unet"].items():
        torch.testing.assert_close(found.factors["unet"][module], rows, atol=1e-3, rtol=0)
    assert not list(tmp_path.glob(".*.partial"))


def test_the_first_one_stays(tmp_path) -> None:
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


def test_of_many_that_record_at_once_all_use_one(tmp_path) -> None:
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
    found = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [directions_path(tmp_path, NAME).name]


def test_files_of_earlier_versions_have_the_name_of_their_content(tmp_path) -> None:
    # As version 0.1 wrote and named it.
    path = directions_path(tmp_path, "01234567")
    LayerInputs("generic prompts", {}, factors()).save(path)
    found = SharedDirections.load(path)
    assert found.name != NAME and len(found.name) == 16
    assert SharedDirections.load(path).name == found.name
    LayerInputs("generic prompts", {}, factors(1)).save(path)
    assert SharedDirections.load(path).name != found.name
    # Taken over for another recording, it keeps its name.
    assert found.save(directions_path(tmp_path, NAME)).name == found.name


def test_a_damaged_file_is_told_with_what_to_do(tmp_path) -> None:
    path = directions_path(tmp_path, NAME)
    path.write_bytes(b"damaged")
    with pytest.raises(ConceptError, match=r"shared directions cannot be read.*delete it"):
        SharedDirections.load(path)


def test_what_serves_does_not_depend_on_signs_order_or_turns() -> None:
    rows = factors()["unet"]["to_q"]
    known = SharedDirections(NAME, {"unet": {"to_q": rows}})

    def serves(other: torch.Tensor, avoid: int = 4) -> bool:
        return known.covers({"unet": {"to_q": other}}, avoid)

    turn, _ = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)))
    lead = rows[:2].norm(dim=1).mean() * (turn @ torch.nn.functional.normalize(rows[:2]))
    assert serves(-rows) and serves(rows + 1e-4 * torch.randn(rows.shape))
    assert serves(torch.cat([lead, rows[2:]]))
    assert not serves(factors(1)["unet"]["to_q"])
    assert not serves(torch.randn(4, 12)) and not known.covers({}, 4)
    assert serves(factors(1)["unet"]["to_q"], avoid=0)


def test_names_are_of_what_determines_a_recording() -> None:
    facts = {"weights": {"unet": "ab"}, "steps": 8}
    assert recording_name(facts) == recording_name(dict(reversed(facts.items())))
    assert recording_name(facts) != recording_name(facts | {"steps": 9})


def test_adding_a_concept_brings_its_directions_where_none_serve(tmp_path) -> None:
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
    # Where there are some that serve, such as those of another machine, they stay.
    near = {"unet": {m: rows + 1e-4 for m, rows in factors()["unet"].items()}}
    SharedDirections("a" * 16, near).save(directions_path(tmp_path / "other", "a" * 16))
    directions_path(tmp_path / "other", "b" * 16).write_bytes(b"damaged")
    before = find_direction_files(tmp_path / "other")
    add_to_library(tmp_path / "other", tmp_path / "home" / "tom")
    assert find_direction_files(tmp_path / "other") == before
