"""Allocation of columns of the shared orthogonal matrix to concepts, and collisions."""

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
    """An owner of a slice: the facts about a concept, or the reservation of a training run."""

    @property
    def name(self) -> str:
        """Name of the concept."""

    @property
    def basis(self) -> BasisInfo | None:
        """Basis of the slices; None for the method "lora"."""

    @property
    def rank(self) -> int:
        """Columns of a slice."""

    @property
    def slices(self) -> Mapping[str, Sequence[int]]:
        """Input width, as text -> columns."""


def slice_columns(
    widths: Iterable[int], rank: int, *, index: int | None, name: str, avoid: int = 0
) -> dict[int, tuple[int, ...]]:
    """The columns of each input width for one concept.

    Args:
        widths: Input widths of the adapted layers.
        rank: Columns of a slice.
        index: Number of the concept in its library. Concepts of one rank with different numbers
            share no column of a width until it is full (width // rank concepts); beyond that,
            numbers wrap around and :func:`find_collisions` reports the collision. None for a
            concept without a library: a hash of the name chooses the columns of each width.
        name: Name of the concept.
        avoid: Number of shared directions of the basis; columns number the remaining width.

    Returns:
        Width -> ``rank`` column numbers.

    Raises:
        ConfigError: If the rank exceeds a width, or the index is negative.
    """
    if index is not None and index < 0:
        raise ConfigError(f"invalid concept number {index}", fix="use a number from 0")
    room = {width: width - count_shared_directions(width, avoid) for width in sorted(set(widths))}
    return {
        width: hashed_block(name, size, rank)
        if index is None
        else block(index % capacity(size, rank), size, rank)
        for width, size in room.items()
    }


def slice_owners(library: Path, *, exclude: Collection[str] = ()) -> list[SliceOwner]:
    """All owners of slices in a library: concepts, and training runs that have not finished.

    Args:
        library: A folder of concepts.
        exclude: Names of concepts to leave out, such as those about to be replaced.

    Raises:
        ConceptError: If a ``concept.json`` or a reservation cannot be read; it may own columns.
    """
    # Hidden folders are skipped: a killed process may have left a partial concept there.
    files = find_in_subfolders(Path(library), INFO_FILE)
    owners: list[SliceOwner] = [read_info(file.parent) for file in files]
    owners += read_reservations(library)
    return [owner for owner in owners if owner.name not in exclude]


def free_index(
    owners: Iterable[SliceOwner],
    rank: int,
    basis: BasisInfo,
    *,
    widths: Iterable[int] | None = None,
) -> int:
    """The number of a new concept in a library.

    It is the lowest number whose slices share the fewest columns with the owners', over all widths:
    none until a width is full. Columns of owners with a different recording of shared directions
    count after those with the same one: columns of the same numbers are then nearly the same.

    Args:
        owners: Concepts and runs of the library. Those with another orthogonal matrix or number of
            shared directions own no columns of this basis.
        rank: Rank of the new concept.
        basis: Basis of the new concept.
        widths: Input widths of the new concept; None for all widths of the owners.

    Raises:
        ConfigError: If the rank exceeds a width.
    """
    relevant = None if widths is None else set(widths)
    # Width -> columns taken by owners with the same recording of shared directions, and by others.
    taken: dict[int, tuple[list[int], list[int]]] = {}
    for owner in owners:
        if owner.basis is None or matrix_key(owner.basis) != matrix_key(basis):
            continue
        other_recording = owner.basis.shared_directions != basis.shared_directions
        for text, columns in owner.slices.items():
            width = int(text)
            if relevant is None or width in relevant:
                taken.setdefault(width, ([], []))[other_recording].extend(columns)

    def count_shared(index: int) -> tuple[int, int]:
        slices = slice_columns(taken, rank, index=index, name="", avoid=basis.num_shared_directions)
        same, others = (
            sum(taken[width][kind].count(c) for width, columns in slices.items() for c in columns)
            for kind in (0, 1)
        )
        return same, others

    room = [width - count_shared_directions(width, basis.num_shared_directions) for width in taken]
    candidates = max((capacity(size, rank) for size in room), default=1)
    return min(range(candidates), key=count_shared)


@dataclass(frozen=True)
class Collision:
    """Two concepts with slices whose updates are not orthogonal.

    Attributes:
        first: Name of the first concept.
        second: Name of the second concept.
        columns: Width -> shared columns; empty if the slices overlap without sharing columns.
        problem: Description for users.
        fix: Advice that resolves it.
    """

    first: str
    second: str
    columns: dict[int, tuple[int, ...]]
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}. Fix: {self.fix}."


def find_collisions(owners: Sequence[SliceOwner]) -> list[Collision]:
    """Every pair of slice owners that interfere more than disjoint slices do, by their facts.

    :func:`customize.concepts.slices.overlap.find_overlaps` compares the slices themselves. With
    different recordings of shared directions, columns of the same numbers are nearly the same, and
    those of different numbers are hardly less orthogonal: the directions are few.

    Concepts of the method "lora" have no slices and are left out, and so is the pair of a concept
    and a run that trains it again.
    """
    collisions = []
    sliced = [owner for owner in owners if owner.basis is not None]
    for a, b in combinations(sliced, 2):
        if a.name == b.name and (
            isinstance(a, SliceReservation) or isinstance(b, SliceReservation)
        ):
            continue
        columns = shared_column_numbers(a, b)
        if columns:
            collisions.append(shared_columns_collision(a, b, columns))
        elif a.basis and b.basis and matrix_key(a.basis) != matrix_key(b.basis):
            collisions.append(unrelated_basis_collision(a, b))
    return collisions


def shared_column_numbers(a: SliceOwner, b: SliceOwner) -> dict[int, tuple[int, ...]]:
    """The column numbers that two concepts share.

    Returns:
        Width -> column numbers; empty for different matrices.
    """
    if a.basis is None or b.basis is None or matrix_key(a.basis) != matrix_key(b.basis):
        return {}
    return {
        int(width): columns
        for width in sorted(set(a.slices) & set(b.slices), key=int)
        if (columns := shared_columns(a.slices[width], b.slices[width]))
    }


def shared_columns_collision(
    a: SliceOwner, b: SliceOwner, columns: Mapping[int, tuple[int, ...]]
) -> Collision:
    """The collision of two concepts that share columns.

    Args:
        a: The first concept.
        b: The second concept.
        columns: Width -> shared columns.
    """
    counts = ", ".join(
        f"{len(shared)} of {min(a.rank, b.rank)} columns at width {width}"
        for width, shared in columns.items()
    )
    return Collision(
        a.name,
        b.name,
        dict(columns),
        f"{a.name} and {b.name} share {counts}, so each changes what the other has learned",
        f"train {b.name} again with --no-resume and, as its --library, the folder that contains "
        f"{a.name}, so that it gets a free slice; or lower the weight of one of them",
    )


def unrelated_basis_collision(a: SliceOwner, b: SliceOwner, overlap: float = 1.0) -> Collision:
    """The collision of two concepts whose slices are not columns of one orthonormal matrix.

    Args:
        a: The first concept.
        b: The second concept.
        overlap: Overlap of the slices, relative to slices drawn at random.
    """
    one, two = a.basis, b.basis
    assert one is not None and two is not None
    differences, flags = [], []
    if (one.kind, one.seed) != (two.kind, two.seed):
        differences.append(
            f"have slices of different orthogonal matrices ({one.kind} with seed {one.seed}, "
            f"{two.kind} with seed {two.seed})"
        )
        flags += [f"--orthogonal-matrix {one.kind}", f"--matrix-seed {one.seed}"]
    if one.num_shared_directions != two.num_shared_directions:
        counts = f"{one.num_shared_directions}, {two.num_shared_directions}"
        differences.append(f"avoid different numbers of shared directions ({counts})")
        flags.append(f"--num-shared-directions {one.num_shared_directions}")
    elif one.shared_directions != two.shared_directions:
        differences.append("avoid shared directions that were recorded separately")
    why = " and ".join(differences) or "have slices that differ from their facts"
    much = "as much as" if overlap == 1.0 else f"{overlap:.2g} times as much as"
    return Collision(
        a.name,
        b.name,
        {},
        f"{a.name} and {b.name} {why}, so they overlap {much} slices drawn at random",
        f"train {b.name} again with {', '.join([*flags, '--no-resume'])} and, as its --library, "
        f"the folder that contains {a.name}",
    )


def matrix_key(basis: BasisInfo) -> tuple[str, int, int]:
    """The numbering of columns: kind and seed of the matrix, and number of shared directions.

    The scale is left out, because it does not rotate a slice.
    """
    return basis.kind, basis.seed, basis.num_shared_directions


def slice_key(basis: BasisInfo | None) -> tuple[str, int, int, str] | None:
    """The identity of columns: :func:`matrix_key`, and the recording of the shared directions."""
    return None if basis is None else (*matrix_key(basis), basis.shared_directions)
