"""Allocation of slices in a library, and collisions."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from customize.concepts.concept_info import BasisInfo, ConceptInfo
from customize.concepts.io.write_concept import save_concept
from customize.concepts.slices.allocation import (
    find_collisions,
    free_index,
    slice_columns,
    slice_owners,
)
from customize.concepts.slices.slice_reservations import SliceReservation
from customize.core.bases import hashed_block
from customize.core.crosstalk import update_overlap
from customize.errors import ConceptError, ConfigError
from tests.concepts.making import facts, small


def sliced(name: str, index: int | None, rank: int = 2, **changes) -> ConceptInfo:
    columns = slice_columns((6, 8), rank, index=index, name=name)
    slices = {str(width): list(numbers) for width, numbers in columns.items()}
    return facts(name=name, rank=rank, alpha=float(rank), slices=slices, **changes)


def test_columns_by_index_and_by_name() -> None:
    assert slice_columns([8, 6, 8], 2, index=1, name="rex") == {6: (2, 3), 8: (2, 3)}
    # Width 6 has room for three concepts: the fourth wraps around, but not at width 8.
    assert slice_columns([6, 8], 2, index=3, name="rex") == {6: (0, 1), 8: (6, 7)}
    assert slice_columns([8], 2, index=None, name="rex") == {8: hashed_block("rex", 8, 2)}
    for index in (0, None):
        with pytest.raises(ConfigError, match="rank 7"):
            slice_columns([6, 8], 7, index=index, name="rex")
    with pytest.raises(ConfigError, match="-1"):
        slice_columns([8], 2, index=-1, name="rex")


def test_slices_are_disjoint_until_the_library_is_full(tmp_path: Path) -> None:
    basis = BasisInfo(seed=3)
    infos = []
    for number in range(4):
        index = free_index(slice_owners(tmp_path), 2, basis)
        assert index == number
        info = sliced(f"c{number}", index)
        save_concept(small(number, name=info.name, slices=info.slices), tmp_path / info.name)
        infos.append(info)
    assert find_collisions(infos[:3]) == []
    (collision,) = find_collisions(infos)
    assert (collision.first, collision.second, collision.columns) == ("c0", "c3", {6: (0, 1)})
    assert "2 of 2 columns at width 6" in str(collision)
    # A retrained concept gets its number again; a deleted concept frees its number.
    assert free_index(slice_owners(tmp_path, exclude=["c1"]), 2, basis) == 1
    assert free_index(slice_owners(tmp_path), 2, BasisInfo(seed=4)) == 0


def test_updates_of_disjoint_slices_are_orthogonal() -> None:
    concepts = [
        small(n, name=f"c{n}", slices=sliced(f"c{n}", n).slices, trigger=f"<c{n}>")
        for n in range(3)
    ]
    for a, b in combinations(concepts, 2):
        for component, updates in a.updates.items():
            for module, update in updates.items():
                assert update_overlap(update, b.updates[component][module]) < 1e-6


def test_other_ranks_and_hashed_slices_are_avoided(tmp_path: Path) -> None:
    slices = {"6": [1, 2, 3], "8": [3, 4, 5]}
    save_concept(small(name="odd", rank=3, alpha=3.0, slices=slices), tmp_path / "odd")
    # The blocks of two at width 6 share 1, 2 and 0 columns with it, those at width 8 share 0, 1,
    # 2 and 0. No number is free at both; 0 and 3 share one column in all.
    assert free_index(slice_owners(tmp_path), 2, BasisInfo(seed=3)) == 0
    odd = facts(name="odd", rank=3, alpha=3.0, slices=slices)
    assert [c.columns for c in find_collisions([odd, sliced("c", 0)])] == [{6: (1,)}]
    assert [c.columns for c in find_collisions([odd, sliced("c", 2)])] == [{8: (4, 5)}]


def test_empty_and_damaged_libraries(tmp_path: Path) -> None:
    assert free_index(slice_owners(tmp_path / "none"), 2, BasisInfo()) == 0
    (tmp_path / ".rex.0a1b2c3d.partial").mkdir()  # of a process that was killed
    (tmp_path / ".rex.0a1b2c3d.partial" / "concept.json").write_text("{")
    assert free_index(slice_owners(tmp_path), 2, BasisInfo()) == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "concept.json").write_text("{")
    with pytest.raises(ConceptError, match="bad"):
        free_index(slice_owners(tmp_path), 2, BasisInfo())


def test_collisions_of_different_bases() -> None:
    plain = facts(name="plain", method="lora", basis=None, slices={})
    other = sliced("other", 0, basis=BasisInfo(seed=9))
    scaled = sliced("scaled", 1, basis=BasisInfo(seed=3, scale=0.5))
    collisions = find_collisions([sliced("rex", 0), plain, other, scaled])
    assert {(c.first, c.second) for c in collisions} == {("rex", "other"), ("other", "scaled")}
    assert all("different orthogonal matrices" in str(c) and not c.columns for c in collisions)


def test_columns_of_other_recordings_are_avoided_while_some_are_free(tmp_path: Path) -> None:
    basis, other_basis = (
        BasisInfo(num_shared_directions=1, shared_directions=letter * 16) for letter in "ab"
    )
    owners = [sliced("rex", 0, basis=other_basis)]
    assert free_index(owners, 2, basis) == 1
    # If all columns are taken, owners with the same recording count first.
    owners += [sliced(name, index, basis=basis) for name, index in (("c", 1), ("d", 2))]
    assert free_index(owners, 2, basis, widths=[6]) == 0
    (collision,) = find_collisions([owners[0], sliced("zig", 0, basis=basis)])
    assert collision.columns == {6: (0, 1), 8: (0, 1)}
    assert find_collisions([owners[0], sliced("zig", 1, basis=basis)]) == []


def test_retrained_concept_does_not_collide_with_itself() -> None:
    rex = sliced("rex", 0)
    claim = SliceReservation(name="rex", basis=rex.basis, rank=2, index=0, slices=dict(rex.slices))
    assert find_collisions([rex, claim]) == []
    assert len(find_collisions([rex, claim.model_copy(update={"name": "tom"})])) == 1
