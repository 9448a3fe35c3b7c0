"""Whether a library can be used as it is: every file read whole, and what gets in others' way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import torch

from customize.concepts.formats.lora_file import LoraFile
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.input_statistics import LayerInputs, layer_inputs_path, load_recorded_inputs
from customize.concepts.library.index import LibraryEntry
from customize.concepts.library.library import Library
from customize.concepts.slices.allocation import (
    Collision,
    SliceOwner,
    find_collisions,
    matrix_key,
    shared_column_numbers,
    shared_columns_collision,
)
from customize.concepts.slices.overlap import DownProjections, down_projections, overlapping_pairs
from customize.concepts.slices.slice_reservations import read_reservations
from customize.concepts.types import Concept, Lora
from customize.core.bases import count_shared_directions
from customize.errors import ConceptError, CustomizeError

MatrixKey = tuple[str, int, int]

# Down-projections of so many layers of each width are compared, of one in a large library: all are
# in memory at once.
_LAYERS, _LARGE = 4, 100


@dataclass(frozen=True)
class LibraryReport:
    """What was found.

    Attributes:
        library: as it is now.
        faults: what keeps concepts from being used, or apart; each with what resolves it.
        notes: what there is to know beside that.
    """

    library: Library
    errors: Sequence[str]
    notes: Sequence[str]


def check_library(folder: str | Path) -> LibraryReport:
    """Read everything in a library.

    Raises:
        ConfigError: it is no folder, or cannot be looked into.
    """
    library = Library(folder)
    faults, notes = [], []
    downs: dict[str, DownProjections] = {}
    layers = _LAYERS if len(library.entries) <= _LARGE else 1
    if library.num_stale_rows:
        notes.append(
            f"the index was missing or old in {library.num_stale_rows} places, and was made anew"
        )
    if not library.is_index_saved:
        notes.append("the index cannot be written here, so that it is made at each start")
    for entry in library.entries.values():
        try:
            concept = open_adaptation(library.path(entry))
            if isinstance(concept, Concept) and concept.info.basis is not None:
                downs[entry.source] = down_projections(concept, layers)
            _check_files(concept, library.path(entry), entry)
            if entry.error:  # its files can be read by those who know their names
                faults.append(entry.error)
        except CustomizeError as error:
            faults.append(str(error))
    faults += _doubled(list(library.entries.values()))
    crowded, full = _colliding(library, downs)
    return LibraryReport(library, [*faults, *crowded], [*notes, *full])


def _check_files(found: Concept | Lora | LoraFile, path: Path, entry: LibraryEntry) -> None:
    if isinstance(found, LoraFile):
        _check_lora(found)
    if not entry.has_layer_inputs:
        raise ConceptError(
            f"{entry.name} has no record of what its layers read, so that a set with it is summed "
            "and not fused",
            where=path,
            fix="make it once: customize record",
        )
    if isinstance(found, LoraFile):
        LayerInputs.load(layer_inputs_path(found.source))
    else:
        load_recorded_inputs(entry.name, found.updates, found.source)


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


def _doubled(entries: Sequence[LibraryEntry]) -> Iterator[str]:
    """What calls several concepts that one model can take."""
    called: dict[str, list[LibraryEntry]] = {}
    for entry in entries:
        for trigger in entry.trigger_tokens:
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


def _one_model_takes(a: LibraryEntry, b: LibraryEntry) -> bool:
    """Whether some model may take both, as far as both say for which they are."""
    if not a.family or not b.family or a.family != b.family:
        return not a.family or not b.family
    return not a.fingerprint or not b.fingerprint or _architecture(a) == _architecture(b)


def _architecture(entry: LibraryEntry) -> tuple[str, str]:
    return entry.family, str(entry.fingerprint.get("denoiser"))


def _colliding(
    library: Library, downs: Mapping[str, DownProjections]
) -> tuple[list[str], list[str]]:
    """Slices that share columns: those that need not, and of each full width how many do; and
    slices that overlap as random ones do.

    Runs that are not finished hold theirs too, of which only the numbers are known.

    Args:
        downs: source -> down-projections of some layers, of all that have slices.
    """
    groups: dict[tuple[str, str], list[LibraryEntry]] = {}
    for source in downs:
        entry = library.entries[source]
        groups.setdefault(_architecture(entry), []).append(entry)
    faults, notes = [], []
    try:
        claims = read_reservations(library.folder)
    except ConceptError as error:
        return [str(error)], []
    for entries in groups.values():
        full: dict[MatrixKey, set[int]] = {}
        for key, holders in _by_matrix([*entries, *claims]).items():
            crowds = _crowds(holders)
            full[key] = set(crowds)
            notes += [
                f"width {width} is full: {count} of {len(holders)} concepts share columns there, "
                "and each changes what the others have learned where they are summed"
                for width, count in crowds.items()
            ]
        apart: dict[str, tuple[int, Collision]] = {}
        pairs = overlapping_pairs(entries, [downs[entry.source] for entry in entries])
        for (i, j), each in pairs.items():
            a, b = entries[i], entries[j]
            if not each.columns:
                count, first = apart.get(each.first, (0, each))
                apart[each.first] = count + 1, first
                continue
            crowded = full.get(matrix_key(a.basis), set()) if a.basis else set()
            columns = {w: own for w, own in each.columns.items() if w not in crowded}
            if columns:
                faults.append(str(shared_columns_collision(a, b, columns)))
        notes += [
            str(each).removesuffix(".") + (f" (and {count - 1} others)" if count > 1 else "")
            for count, each in apart.values()
        ]
        for claim, entry in product(claims, entries):
            columns = shared_column_numbers(entry, claim)
            crowded = full.get(matrix_key(claim.basis), set())
            columns = {w: own for w, own in columns.items() if w not in crowded}
            if columns and claim.name != entry.name:
                faults.append(str(shared_columns_collision(entry, claim, columns)))
    faults += [str(each) for each in find_collisions(claims) if each.columns]
    return faults, notes


def _by_matrix(holders: Sequence[SliceOwner]) -> dict[MatrixKey, list[SliceOwner]]:
    found: dict[MatrixKey, list[SliceOwner]] = {}
    for holder in holders:
        if holder.basis is not None:
            found.setdefault(matrix_key(holder.basis), []).append(holder)
    return found


def _crowds(holders: Sequence[SliceOwner]) -> dict[int, int]:
    """Width without room for all -> how many share columns there, by their numbers."""
    owners: dict[tuple[int, int], list[int]] = {}
    needed: dict[int, int] = {}
    for number, holder in enumerate(holders):
        for text, columns in holder.slices.items():
            width = int(text)
            needed[width] = needed.get(width, 0) + len(columns)
            for column in columns:
                owners.setdefault((width, column), []).append(number)
    basis = holders[0].basis
    avoid = 0 if basis is None else basis.num_shared_directions
    full = sorted(w for w, count in needed.items() if count > w - count_shared_directions(w, avoid))
    crowds: dict[int, set[int]] = {width: set() for width in full}
    for (width, _), those in owners.items():
        if len(those) > 1 and width in crowds:
            crowds[width].update(those)
    return {width: len(those) for width, those in crowds.items() if those}
