"""Which columns of the shared orthogonal matrix a concept takes, and who takes the same ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

from customize.concepts.concept_info import BasisInfo
from customize.concepts.io.file_layout import INFO_FILE
from customize.concepts.io.find_files import find_in_subfolders
from customize.concepts.io.read_concept import read_info
from customize.concepts.slices.slice_reservations import SliceReservation, read_reservations
from customize.core.bases import (
    block,
    capacity,
    count_shared_directions,
    hashed_block,
    shared_columns,
)
from customize.errors import ConfigError


class SliceOwner(Protocol):
    """Who holds a slice: a concept's facts, or the claim of a run that is to become one."""

    @property
    def name(self) -> str: ...
    @property
    def basis(self) -> BasisInfo | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def slices(self) -> Mapping[str, Sequence[int]]: ...


def slice_columns(
    widths: Iterable[int], rank: int, *, index: int | None, name: str, avoid: int = 0
) -> dict[int, tuple[int, ...]]:
    """The slice of each input width for one concept.

    Args:
        widths: input widths of the layers that take the adapter.
        rank: columns of a slice.
        index: the concept's number in its library. Concepts of one rank with different numbers
            share nothing at a width until that is full (width // rank concepts); from there on
            the count starts again, and :func:`find_collisions` reports it. None for a concept
            without a library: its name's hash chooses, at each width.
        name: the concept's name.
        avoid: as the basis has it; columns are of what is left of a width.

    Returns:
        width -> ``rank`` column numbers.

    Raises:
        ConfigError: the rank does not fit a width, or the index is negative.
    """
    if index is not None and index < 0:
        raise ConfigError(f"a concept's number cannot be {index}", fix="count from 0")
    left = {width: width - count_shared_directions(width, avoid) for width in sorted(set(widths))}
    return {
        width: hashed_block(name, room, rank)
        if index is None
        else block(index % capacity(room, rank), room, rank)
        for width, room in left.items()
    }


def slice_owners(library: Path, *, without: Collection[str] = ()) -> list[SliceOwner]:
    """All who hold a slice in a library: finished concepts, and runs that are not finished.

    Args:
        without: names of concepts that don't count, as they are about to be replaced.

    Raises:
        ConceptError: a ``concept.json`` or a claim there cannot be read. It may hold columns.
    """
    # Not in hidden folders: there a killed process may have left a half-written concept.
    found = find_in_subfolders(Path(library), INFO_FILE)
    all_of_them: list[SliceOwner] = [read_info(file.parent) for file in found]
    all_of_them += read_reservations(library)
    return [holder for holder in all_of_them if holder.name not in without]


def free_index(
    there: Iterable[SliceOwner],
    rank: int,
    basis: BasisInfo,
    *,
    widths: Iterable[int] | None = None,
) -> int:
    """The number for a new concept beside others.

    The lowest of those whose slices share the fewest columns with theirs, over all widths that
    count: no column at all until one is full. Concepts that avoid other shared directions count
    after those that avoid the same ones: their columns of the same numbers are nearly the same
    where the two recordings differ by little.

    Args:
        there: the concepts, and those that are being learned.
        rank, basis: of the new concept. Concepts on another orthogonal matrix, or that avoid
            another number of directions, take no columns of this one.
        widths: the new concept's; None: all that the others use.

    Raises:
        ConfigError: the rank does not fit a width.
    """
    counted = None if widths is None else set(widths)
    # Width -> columns that are taken, by concepts with the same shared directions and by others.
    taken: dict[int, tuple[list[int], list[int]]] = {}
    for holder in there:
        if holder.basis is not None and matrix_key(holder.basis) == matrix_key(basis):
            other = holder.basis.shared != basis.shared
            for width, columns in holder.slices.items():
                if counted is None or int(width) in counted:
                    taken.setdefault(int(width), ([], []))[other].extend(columns)

    def shared(index: int) -> tuple[int, int]:
        slices = slice_columns(taken, rank, index=index, name="", avoid=basis.avoid)
        same, others = (
            sum(taken[width][kind].count(c) for width, columns in slices.items() for c in columns)
            for kind in (0, 1)
        )
        return same, others

    rooms = [width - count_shared_directions(width, basis.avoid) for width in taken]
    candidates = max((capacity(room, rank) for room in rooms), default=1)
    return min(range(candidates), key=shared)


@dataclass(frozen=True)
class Collision:
    """Two concepts whose updates are not orthogonal although both have slices.

    Attributes:
        first, second: the concepts' names.
        columns: width -> the columns that both have; empty where their slices are not of the same
            columns, and overlap nevertheless.
        problem: the same in words.
        fix: what resolves it.
    """

    first: str
    second: str
    columns: dict[int, tuple[int, ...]]
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}. Fix: {self.fix}."


def find_collisions(infos: Sequence[SliceOwner]) -> list[Collision]:
    """Every pair of concepts that will disturb each other more than disjoint slices do, as far as
    their facts say; :func:`customize.concepts.slices.overlap.find_overlaps` compares the slices.

    Columns of other numbers are hardly less apart where other shared directions are avoided, as
    these turn few dimensions of a layer; columns of the same numbers are nearly the same.

    Concepts of the method "lora" have no slices to compare and are left out, and so is the claim
    of a run that learns a concept anew beside that concept.
    """
    found = []
    sliced = [info for info in infos if info.basis is not None]
    for a, b in combinations(sliced, 2):
        if a.name == b.name and (
            isinstance(a, SliceReservation) or isinstance(b, SliceReservation)
        ):
            continue
        columns = shared_column_numbers(a, b)
        if columns:
            found.append(shared_columns_collision(a, b, columns))
        elif a.basis and b.basis and matrix_key(a.basis) != matrix_key(b.basis):
            found.append(unrelated_basis_collision(a, b))
    return found


def shared_column_numbers(a: SliceOwner, b: SliceOwner) -> dict[int, tuple[int, ...]]:
    """Width -> the column numbers that both have, where these number the same columns, or, with
    other shared directions, nearly the same."""
    if a.basis is None or b.basis is None or matrix_key(a.basis) != matrix_key(b.basis):
        return {}
    return {
        int(width): shared
        for width in sorted(set(a.slices) & set(b.slices), key=int)
        if (shared := shared_columns(a.slices[width], b.slices[width]))
    }


def shared_columns_collision(
    a: SliceOwner, b: SliceOwner, columns: Mapping[int, tuple[int, ...]]
) -> Collision:
    """The collision of two concepts that have columns in common."""
    counts = ", ".join(
        f"{len(shared)} of {min(a.rank, b.rank)} columns at width {width}"
        for width, shared in columns.items()
    )
    return Collision(
        a.name,
        b.name,
        dict(columns),
        f"{a.name} and {b.name} share {counts}, where each changes what the other has learned",
        f"learn {b.name} again with --no-resume and, as its --library, the folder that {a.name} is "
        "in, which gives it a free slice, or lower the weight of one of them",
    )


def unrelated_basis_collision(a: SliceOwner, b: SliceOwner, overlap: float = 1.0) -> Collision:
    """The collision of two concepts whose slices are not columns of the same orthonormal set.

    Args:
        overlap: how much they overlap, over what slices drawn at random do.
    """
    one, two = a.basis, b.basis
    assert one is not None and two is not None
    differing, needed = [], []
    if (one.kind, one.seed) != (two.kind, two.seed):
        differing.append(
            f"have slices of different orthogonal matrices ({one.kind} with seed {one.seed}, "
            f"{two.kind} with seed {two.seed})"
        )
        needed += [f"--orthogonal-matrix {one.kind}", f"--matrix-seed {one.seed}"]
    if one.avoid != two.avoid:
        differing.append(f"avoid different numbers of shared directions ({one.avoid}, {two.avoid})")
        needed.append(f"--num-shared-directions {one.avoid}")
    elif one.shared != two.shared:
        differing.append("avoid shared directions that were recorded apart")
    why = " and ".join(differing) or "have other columns than their facts say"
    much = "as much as" if overlap == 1.0 else f"{overlap:.2g} times as much as"
    return Collision(
        a.name,
        b.name,
        {},
        f"{a.name} and {b.name} {why}, so they overlap {much} slices drawn at random",
        f"learn {b.name} again with {', '.join([*needed, '--no-resume'])} and, as its --library, "
        f"the folder that {a.name} is in (README, Slices)",
    )


def matrix_key(basis: BasisInfo) -> tuple[str, int, int]:
    """What numbers the columns: the orthogonal matrix, and how many directions are avoided.

    The scale does not turn a slice, so it does not matter.
    """
    return basis.kind, basis.seed, basis.avoid


def slice_key(basis: BasisInfo | None) -> tuple[str, int, int, str] | None:
    """What tells one concept's columns from another's: :func:`matrix_key`, and which directions
    are avoided."""
    return None if basis is None else (*matrix_key(basis), basis.shared)
