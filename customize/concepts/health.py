"""Whether a library can be used as it is: every file read whole, and what gets in others' way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from customize.concepts.claims import read_claims
from customize.concepts.formats.lora import LoraFile
from customize.concepts.formats.opening import opened
from customize.concepts.index import Entry
from customize.concepts.inputs import LayerInputs, place_beside, record_beside
from customize.concepts.library import Library
from customize.concepts.slices import Collision, Holder, collisions, turn
from customize.core.bases import avoided
from customize.errors import ConceptError, CustomizeError

_ANEW = "get an unchanged copy of the file, or take it out"


@dataclass(frozen=True)
class Health:
    """What was found.

    Attributes:
        library: as it is now.
        faults: what keeps concepts from being used, or apart; each with what resolves it.
        notes: what there is to know beside that.
    """

    library: Library
    faults: Sequence[str]
    notes: Sequence[str]


def check(folder: str | Path) -> Health:
    """Read everything in a library.

    Raises:
        ConfigError: it is no folder, or cannot be looked into.
    """
    library = Library(folder)
    faults, notes = [], []
    if library.stale:
        notes.append(f"the index was missing or old in {library.stale} places, and was made anew")
    if not library.kept:
        notes.append("the index cannot be written here, so that it is made at each start")
    for entry in library.entries.values():
        try:
            _check_files(library.path(entry), entry)
            if entry.fault:  # its files can be read by those who know their names
                faults.append(entry.fault)
        except CustomizeError as error:
            faults.append(str(error))
    faults += _doubled(list(library.entries.values()))
    crowded, full = _colliding(library)
    return Health(library, [*faults, *crowded], [*notes, *full])


def _check_files(path: Path, entry: Entry) -> None:
    found = opened(path)
    if isinstance(found, LoraFile):
        _check_lora(found)
    if not entry.recorded:
        raise ConceptError(
            f"{entry.name} has no record of what its layers read, so that a set with it is summed "
            "and not fused",
            where=path,
            fix="make it once: customize record",
        )
    if isinstance(found, LoraFile):
        LayerInputs.load(place_beside(found.source))
    else:
        record_beside(entry.name, found.products, found.source)


def _check_lora(file: LoraFile) -> None:
    """What can be told of a LoRA without its model."""
    for group in file.groups:
        for part, tensor in group.parts.items():
            if not tensor.numel():
                raise ConceptError(
                    "an update has rank 0", where=f"{file.where}: {group.keys[part]}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConceptError(
                    "a number is NaN or infinite", where=f"{file.where}: {group.keys[part]}"
                )


def _doubled(entries: Sequence[Entry]) -> Iterator[str]:
    """What calls several concepts that one model can take."""
    called: dict[str, list[Entry]] = {}
    for entry in entries:
        for trigger in entry.called:
            called.setdefault(trigger, []).append(entry)
    for trigger, those in sorted(called.items()):
        for a, b in combinations(those, 2):
            if _one_model_takes(a, b):
                yield str(
                    ConceptError(
                        f"{trigger} calls both {a.source} and {b.source}",
                        fix="take one of them out; a prompt that names it is refused",
                    )
                )


def _one_model_takes(a: Entry, b: Entry) -> bool:
    """Whether some model may take both, as far as both say for which they are."""
    if not a.family or not b.family or a.family != b.family:
        return not a.family or not b.family
    return not a.fingerprint or not b.fingerprint or _architecture(a) == _architecture(b)


def _architecture(entry: Entry) -> tuple[str, str]:
    return entry.family, str(entry.fingerprint.get("denoiser"))


def _colliding(library: Library) -> tuple[list[str], list[str]]:
    """Slices that share columns: those that need not, and of each full width how many do.

    Runs that are not finished hold theirs too.
    """
    groups: dict[tuple[object, ...], list[Holder]] = {}
    for entry in library.entries.values():
        if entry.basis is not None and not entry.fault:
            groups.setdefault((*_architecture(entry), turn(entry.basis)), []).append(entry)
    faults, notes = [], []
    try:
        claims = read_claims(library.folder)
    except ConceptError as error:
        return [str(error)], []
    for key, entries in groups.items():
        own = [claim for claim in claims if turn(claim.basis) == key[-1]]
        holders = [*entries, *own]
        pairs, crowds = _shared(holders)
        faults += [str(each) for each in pairs]
        notes += [
            f"width {width} is full: {count} of {len(holders)} concepts share columns there, and "
            "each changes what the others have learned where they are summed"
            for width, count in crowds.items()
        ]
    return faults, notes


def _shared(holders: Sequence[Holder]) -> tuple[list[Collision], dict[int, int]]:
    """Collisions at widths with room for all; width -> how many share, where there is none."""
    owners: dict[tuple[int, int], list[int]] = {}
    needed: dict[int, int] = {}
    for number, holder in enumerate(holders):
        for text, columns in holder.slices.items():
            width = int(text)
            needed[width] = needed.get(width, 0) + len(columns)
            for column in columns:
                owners.setdefault((width, column), []).append(number)
    basis = holders[0].basis
    avoid = 0 if basis is None else basis.avoid
    full = {width for width, count in needed.items() if count > width - avoided(width, avoid)}
    pairs: set[tuple[int, int]] = set()
    crowds: dict[int, set[int]] = {width: set() for width in sorted(full)}
    for (width, _), those in owners.items():
        if len(those) > 1 and width in full:
            crowds[width].update(those)
        elif len(those) > 1:
            pairs.update(combinations(those, 2))
    found = [each for a, b in sorted(pairs) for each in collisions([holders[a], holders[b]])]
    return found, {width: len(those) for width, those in crowds.items() if those}
