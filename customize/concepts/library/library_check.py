"""Checking a library: unreadable files, ambiguous triggers and colliding slices."""

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
from customize.text import plural

MatrixKey = tuple[str, int, int]

# Layers of each width whose down-projections are compared; one in libraries with more concepts than
# _LARGE, because all projections are in memory at once.
_LAYERS, _LARGE = 4, 100


@dataclass(frozen=True)
class LibraryReport:
    """The result of a check.

    Attributes:
        library: The library.
        errors: Problems that prevent concepts from being used or combined, each with its fix.
        notes: Further information.
    """

    library: Library
    errors: Sequence[str]
    notes: Sequence[str]


def check_library(folder: str | Path) -> LibraryReport:
    """Read all concepts of a library and check them.

    Args:
        folder: The library.

    Raises:
        ConfigError: If the path is not a folder, or cannot be listed.
    """
    library = Library(folder)
    errors, notes = [], []
    downs: dict[str, DownProjections] = {}
    layers = _LAYERS if len(library.entries) <= _LARGE else 1
    if library.num_stale_rows:
        count = library.num_stale_rows
        notes.append(f"{plural(count, 'row')} of the index, missing or outdated, rebuilt")
    if not library.is_index_saved:
        notes.append("the index cannot be written, so it is rebuilt at each start")
    for entry in library.entries.values():
        try:
            concept = open_adaptation(library.path(entry))
            if isinstance(concept, Concept) and concept.info.basis is not None:
                downs[entry.source] = down_projections(concept, layers)
            _check_files(concept, library.path(entry), entry)
            if entry.error:  # listing the folder failed, while reading its files works
                errors.append(entry.error)
        except CustomizeError as error:
            errors.append(str(error))
    errors += _ambiguous_triggers(list(library.entries.values()))
    collision_errors, collision_notes = _check_slices(library, downs)
    return LibraryReport(library, [*errors, *collision_errors], [*notes, *collision_notes])


def _check_files(concept: Concept | Lora | LoraFile, path: Path, entry: LibraryEntry) -> None:
    if isinstance(concept, LoraFile):
        _check_lora(concept)
    if not entry.has_layer_inputs:
        raise ConceptError(
            f"{entry.name} has no recorded layer inputs, so it is summed with others, not fused",
            where=path,
            fix="record them once: customize record",
        )
    if isinstance(concept, LoraFile):
        LayerInputs.load(layer_inputs_path(concept.source))
    else:
        load_recorded_inputs(entry.name, concept.updates, concept.source)


def _check_lora(file: LoraFile) -> None:
    """Check the tensors of a LoRA whose model is not known."""
    for group in file.groups:
        for part, tensor in group.parts.items():
            if not tensor.numel():
                raise ConceptError(
                    "an update has rank 0", where=f"{file.where}: {group.keys[part]}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConceptError(
                    "a value is NaN or infinite", where=f"{file.where}: {group.keys[part]}"
                )


def _ambiguous_triggers(entries: Sequence[LibraryEntry]) -> Iterator[str]:
    """Errors about triggers of several concepts that fit the same model."""
    by_trigger: dict[str, list[LibraryEntry]] = {}
    for entry in entries:
        for trigger in entry.trigger_tokens:
            by_trigger.setdefault(trigger, []).append(entry)
    for trigger, sharing in sorted(by_trigger.items()):
        for a, b in combinations(sharing, 2):
            if _may_fit_one_model(a, b):
                yield str(
                    ConceptError(
                        f"{trigger} is a trigger of both {a.source} and {b.source}",
                        fix="remove one of them; prompts with this trigger are refused",
                    )
                )


def _may_fit_one_model(a: LibraryEntry, b: LibraryEntry) -> bool:
    """Whether two entries may fit the same model, by their facts."""
    if not a.family or not b.family or a.family != b.family:
        return not a.family or not b.family
    return not a.fingerprint or not b.fingerprint or _architecture(a) == _architecture(b)


def _architecture(entry: LibraryEntry) -> tuple[str, str]:
    return entry.family, str(entry.fingerprint.get("denoiser"))


def _check_slices(
    library: Library, downs: Mapping[str, DownProjections]
) -> tuple[list[str], list[str]]:
    """Errors and notes about slices that collide.

    Concepts that share columns while free ones exist are errors; concepts that share columns of a
    full width, or whose slices overlap like random ones, are notes. Unfinished runs count by the
    numbers of their reserved columns.

    Args:
        library: The library.
        downs: Source -> down-projections of some layers, of all concepts with slices.
    """
    groups: dict[tuple[str, str], list[LibraryEntry]] = {}
    for source in downs:
        entry = library.entries[source]
        groups.setdefault(_architecture(entry), []).append(entry)
    errors, notes = [], []
    try:
        reservations = read_reservations(library.folder)
    except ConceptError as error:
        return [str(error)], []
    for entries in groups.values():
        full: dict[MatrixKey, set[int]] = {}
        for key, owners in _group_by_matrix([*entries, *reservations]).items():
            shared_widths = _full_widths(owners)
            full[key] = set(shared_widths)
            notes += [
                f"width {width} is full: {count} of {len(owners)} concepts share columns, so "
                "that each changes what the others have learned when they are summed"
                for width, count in shared_widths.items()
            ]
        unrelated: dict[str, tuple[int, Collision]] = {}
        pairs = overlapping_pairs(entries, [downs[entry.source] for entry in entries])
        for (i, j), collision in pairs.items():
            a, b = entries[i], entries[j]
            if not collision.columns:
                count, first = unrelated.get(collision.first, (0, collision))
                unrelated[collision.first] = count + 1, first
                continue
            skipped = full.get(matrix_key(a.basis), set()) if a.basis else set()
            columns = {w: c for w, c in collision.columns.items() if w not in skipped}
            if columns:
                errors.append(str(shared_columns_collision(a, b, columns)))
        notes += [
            str(collision).removesuffix(".") + (f" (and {count - 1} others)" if count > 1 else "")
            for count, collision in unrelated.values()
        ]
        for reservation, entry in product(reservations, entries):
            columns = shared_column_numbers(entry, reservation)
            skipped = full.get(matrix_key(reservation.basis), set())
            columns = {w: c for w, c in columns.items() if w not in skipped}
            if columns and reservation.name != entry.name:
                errors.append(str(shared_columns_collision(entry, reservation, columns)))
    errors += [str(collision) for collision in find_collisions(reservations) if collision.columns]
    return errors, notes


def _group_by_matrix(owners: Sequence[SliceOwner]) -> dict[MatrixKey, list[SliceOwner]]:
    groups: dict[MatrixKey, list[SliceOwner]] = {}
    for owner in owners:
        if owner.basis is not None:
            groups.setdefault(matrix_key(owner.basis), []).append(owner)
    return groups


def _full_widths(owners: Sequence[SliceOwner]) -> dict[int, int]:
    """Width without free columns for all owners -> how many of them share columns."""
    by_column: dict[tuple[int, int], list[int]] = {}
    required: dict[int, int] = {}
    for number, owner in enumerate(owners):
        for text, columns in owner.slices.items():
            width = int(text)
            required[width] = required.get(width, 0) + len(columns)
            for column in columns:
                by_column.setdefault((width, column), []).append(number)
    basis = owners[0].basis
    avoid = 0 if basis is None else basis.num_shared_directions
    full = sorted(
        w for w, count in required.items() if count > w - count_shared_directions(w, avoid)
    )
    sharing: dict[int, set[int]] = {width: set() for width in full}
    for (width, _), numbers in by_column.items():
        if len(numbers) > 1 and width in sharing:
            sharing[width].update(numbers)
    return {width: len(numbers) for width, numbers in sharing.items() if numbers}
