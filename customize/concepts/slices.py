"""Which columns of the shared basis a concept takes, and who takes the same ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol

from customize.concepts.claims import read_claims
from customize.concepts.concept import BasisInfo
from customize.concepts.layout import INFO_FILE
from customize.concepts.reading import in_folders, read_info
from customize.core.bases import avoided, block, capacity, hashed_block, shared_columns
from customize.errors import ConfigError


class Holder(Protocol):
    """Who holds a slice: a concept's facts, or the claim of a run that is to become one."""

    @property
    def name(self) -> str: ...
    @property
    def basis(self) -> BasisInfo | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def slices(self) -> Mapping[str, Sequence[int]]: ...


def columns_for(
    widths: Iterable[int], rank: int, *, index: int | None, name: str, avoid: int = 0
) -> dict[int, tuple[int, ...]]:
    """The slice of each input width for one concept.

    Args:
        widths: input widths of the layers that take the adapter.
        rank: columns of a slice.
        index: the concept's number in its library. Concepts of one rank with different numbers
            share nothing at a width until that is full (width // rank concepts); from there on
            the count starts again, and :func:`collisions` reports it. None for a concept without
            a library: its name's hash chooses, at each width.
        name: the concept's name.
        avoid: as the basis has it; columns are of what is left of a width.

    Returns:
        width -> ``rank`` column numbers.

    Raises:
        ConfigError: the rank does not fit a width, or the index is negative.
    """
    if index is not None and index < 0:
        raise ConfigError(f"a concept's number cannot be {index}", fix="count from 0")
    left = {width: width - avoided(width, avoid) for width in sorted(set(widths))}
    return {
        width: hashed_block(name, room, rank)
        if index is None
        else block(index % capacity(room, rank), room, rank)
        for width, room in left.items()
    }


def holders(library: Path, *, without: Collection[str] = ()) -> list[Holder]:
    """All who hold a slice in a library: finished concepts, and runs that are not finished.

    Args:
        without: names of concepts that don't count, as they are about to be replaced.

    Raises:
        ConceptError: a ``concept.json`` or a claim there cannot be read. It may hold columns.
    """
    # Not in hidden folders: there a killed process may have left a half-written concept.
    found = in_folders(Path(library), INFO_FILE)
    all_of_them: list[Holder] = [read_info(file.parent) for file in found]
    all_of_them += read_claims(library)
    return [holder for holder in all_of_them if holder.name not in without]


def free_index(
    there: Iterable[Holder],
    rank: int,
    basis: BasisInfo,
    *,
    widths: Iterable[int] | None = None,
) -> int:
    """The number for a new concept beside others.

    The lowest of those whose slices share the fewest columns with theirs, over all widths that
    count: no column at all until one is full.

    Args:
        there: the concepts, and those that are being learned.
        rank, basis: of the new concept. Concepts on another basis take no columns of this one.
        widths: the new concept's; None: all that the others use.

    Raises:
        ConfigError: the rank does not fit a width.
    """
    own = None if widths is None else set(widths)
    taken: dict[int, list[int]] = {}
    for holder in there:
        if _same_basis(holder.basis, basis):
            for width, columns in holder.slices.items():
                if own is None or int(width) in own:
                    taken.setdefault(int(width), []).extend(columns)

    def shared(index: int) -> int:
        slices = columns_for(taken, rank, index=index, name="", avoid=basis.avoid)
        return sum(taken[width].count(c) for width, columns in slices.items() for c in columns)

    rooms = [width - avoided(width, basis.avoid) for width in taken]
    candidates = max((capacity(room, rank) for room in rooms), default=1)
    return min(range(candidates), key=shared)


@dataclass(frozen=True)
class Collision:
    """Two concepts whose updates are not orthogonal although both have slices.

    Attributes:
        first, second: the concepts' names.
        columns: width -> the columns that both have; empty where their bases differ.
        what: the same in words.
        fix: what resolves it.
    """

    first: str
    second: str
    columns: dict[int, tuple[int, ...]]
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}. Do: {self.fix}."


def collisions(infos: Sequence[Holder]) -> list[Collision]:
    """Every pair of concepts that will disturb each other more than disjoint slices do.

    Concepts of the method "lora" have no slices to compare and are left out.
    """
    found = []
    sliced = [info for info in infos if info.basis is not None]
    for a, b in combinations(sliced, 2):
        if not _same_basis(a.basis, b.basis):
            found.append(
                Collision(
                    a.name,
                    b.name,
                    {},
                    f"{a.name} and {b.name} have different bases, so they overlap as much as "
                    "slices drawn at random",
                    f"learn {b.name} again with the basis of {a.name}",
                )
            )
            continue
        columns = {
            int(width): shared
            for width in sorted(set(a.slices) & set(b.slices), key=int)
            if (shared := shared_columns(a.slices[width], b.slices[width]))
        }
        if columns:
            counts = ", ".join(
                f"{len(shared)} of {min(a.rank, b.rank)} columns at width {width}"
                for width, shared in columns.items()
            )
            found.append(
                Collision(
                    a.name,
                    b.name,
                    columns,
                    f"{a.name} and {b.name} share {counts}, where each changes what the other "
                    "has learned",
                    f"learn {b.name} again in one library folder with {a.name}, or with a slice "
                    "number that is free, or lower the weight of one of them",
                )
            )
    return found


def _same_basis(a: BasisInfo | None, b: BasisInfo | None) -> bool:
    # The scale does not turn a slice, so it does not matter here.
    return a is not None and b is not None and turn(a) == turn(b)


def turn(basis: BasisInfo) -> tuple[str, int, int, str]:
    """What tells one basis' columns from another's."""
    return basis.kind, basis.seed, basis.avoid, basis.shared
