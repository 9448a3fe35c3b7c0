"""Choosing and reserving the slices of a run's concepts before the first step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from customize.concepts.adapter import LayerFactors
from customize.concepts.concept_info import BasisInfo, ConceptInfo
from customize.concepts.slices import slice_reservations
from customize.concepts.slices.allocation import (
    SliceOwner,
    find_collisions,
    free_index,
    shared_column_numbers,
    slice_columns,
    slice_key,
    slice_owners,
)
from customize.concepts.slices.slice_reservations import SliceReservation
from customize.core.bases import capacity, count_shared_directions
from customize.errors import CustomizeError, SettingsError
from customize.families import Family
from customize.safe_read import real_path
from customize.training.checkpoint import (
    BASE_CONFIG,
    BASE_WEIGHTS,
    SHARED_DIRECTIONS,
    checkpoint_folder,
    latest_step,
)
from customize.training.config import TrainConfig
from customize.training.distributed import run_on_main_process
from customize.training.library_directions import load_or_record_directions
from customize.training.resume import ResumeState
from customize.training.run import Run
from customize.training.run_metadata import add_joint_settings
from customize.training.trainable import input_widths, slice_basis


@dataclass(eq=False)
class RunSlices:
    """The slices of a run's concepts.

    Attributes:
        indices: Slice index of each concept; see :func:`reserve_slices`.
        directions: Shared directions of each layer that the slices avoid; empty if they avoid none.
        shared: Name of the directions.
        settings: Settings of each concept, complete with slices and base.
    """

    indices: list[int | None]
    directions: LayerFactors
    shared: str
    settings: list[dict[str, Any]]


def choose_slices(run: Run, state: ResumeState) -> RunSlices:
    """Load or record the shared directions, and reserve a slice for each concept.

    Raises:
        ConceptError, ConfigError, PipelineError, SettingsError, StorageError: See
            :func:`load_or_record_directions` and :func:`reserve_slices`.
    """
    directions: LayerFactors = {}
    shared = state.settings[0][SHARED_DIRECTIONS]
    if run.config.method == "orthogonal" and run.config.num_shared_directions:
        recorded = load_or_record_directions(run, shared)
        directions, shared = recorded.factors, recorded.name
    basis = slice_basis(run.config, shared)
    indices = run.cleanup.enter_context(reserve_slices(run, basis, state.previous))
    base = {BASE_WEIGHTS: run.weights, BASE_CONFIG: run.family.relevant_config()}
    settings = [
        values | base | {SHARED_DIRECTIONS: shared, "slice": index}
        for values, index in zip(state.settings, indices, strict=True)
    ]
    return RunSlices(indices, directions, shared, add_joint_settings(settings))


@contextmanager
def reserve_slices(
    run: Run, basis: BasisInfo | None, previous: Sequence[Mapping[str, Any]] | None
) -> Iterator[list[int | None]]:
    """Choose the slice index of each concept and reserve the slices in the library.

    The reservations are removed when the concepts are written. After an error they stay if there is
    a checkpoint to resume from; otherwise the folders are as before.

    Args:
        run: The run.
        basis: Basis of the slices; None for the method "lora".
        previous: Each concept's settings in the checkpoint to resume from, whose slices are reused.

    Yields:
        Slice index of each concept; None for the slice of the name's hash, and for "lora".

    Raises:
        ConceptError: A concept or a reservation in the library cannot be read.
        ConfigError: The rank does not fit a width.
        SettingsError: Another concept took the slice of a run that resumes.
        StorageError: A reservation cannot be written.
    """
    if basis is None:
        yield [None] * len(run.configs)
        return
    new = [config for config in run.configs if not os.path.exists(config.output)]
    is_main = run.accelerator.is_main_process
    try:
        yield run_on_main_process(
            run.accelerator, lambda: _reserve(run.configs, run.family, basis, previous)
        )
    except BaseException:
        can_resume = latest_step(checkpoint_folder(run.config)) is not None
        for config in run.configs if is_main and can_resume else ():
            with suppress(CustomizeError):  # the error that ended the run is raised
                slice_reservations.delete_fulfilled_reservation(config.output)
        for config in run.configs if is_main and not can_resume else ():
            slice_reservations.delete_reservation(config.output)
            if config in new:
                with suppress(OSError):  # not empty: class images are kept
                    config.output.rmdir()
        raise
    for config in run.configs if is_main else ():
        slice_reservations.delete_reservation(config.output)


def _reserve(
    configs: Sequence[TrainConfig],
    family: Family,
    basis: BasisInfo,
    previous: Sequence[Mapping[str, Any]] | None,
) -> list[int | None]:
    library = configs[0].library
    settings = dict(zip((config.name for config in configs), previous or (), strict=False))
    reserved: dict[str, SliceReservation] = {}
    with nullcontext() if library is None else slice_reservations.lock_library(library):
        names = [config.name for config in configs]
        owners = [] if library is None else slice_owners(library, exclude=names)
        # Concepts with an index in the settings first, so that the others avoid it.
        for config in sorted(configs, key=lambda config: config.slice is None):
            others = [*owners, *reserved.values()]
            if config.slice is not None:
                index: int | None = config.slice
            elif config.name in settings:
                index = settings[config.name].get("slice")
                _check_still_free(config, family, basis, index, others)
            else:
                index = _free_index(config, family, basis, others)
            reservation = _create_reservation(config, family, basis, index)
            reserved[config.name] = reservation
            slice_reservations.write_reservation(reservation, config.output)
    for number, config in enumerate(configs):
        earlier = [reserved[other.name] for other in configs[:number]]
        _warn_of_overlap(config, reserved[config.name], [*owners, *earlier], family)
        if library is not None and real_path(config.output).parent != real_path(library):
            warnings.warn(
                f"the output folder {config.output} is not in the library {library}, so later runs "
                f"may take the slice of {config.name}; set output to {library / config.name}, or "
                "copy the concept with customize library add",
                stacklevel=2,
            )
    return [reserved[config.name].index for config in configs]


def _free_index(
    config: TrainConfig, family: Family, basis: BasisInfo, others: Sequence[SliceOwner]
) -> int | None:
    """The lowest free index; None for a free slice of the name's hash, without a library."""
    if config.library is None:
        hashed = _create_reservation(config, family, basis, None)
        if not _count_shared_columns(hashed, others):
            return None
    return free_index(others, config.rank, basis, widths=input_widths(family, config))


def _create_reservation(
    config: TrainConfig, family: Family, basis: BasisInfo, index: int | None
) -> SliceReservation:
    widths = input_widths(family, config)
    slices = slice_columns(
        widths, config.rank, index=index, name=config.name, avoid=basis.num_shared_directions
    )
    return SliceReservation(
        name=config.name,
        basis=basis,
        rank=config.rank,
        index=index,
        slices={str(width): list(columns) for width, columns in slices.items()},
    )


def _check_still_free(
    config: TrainConfig,
    family: Family,
    basis: BasisInfo,
    index: int | None,
    others: Sequence[SliceOwner],
) -> None:
    """Refuse a slice that another concept took, unless the library has no better slice."""
    shared = _count_shared_columns(_create_reservation(config, family, basis, index), others)
    if index is None or not shared:
        return
    free = _create_reservation(config, family, basis, _free_index(config, family, basis, others))
    if sum(shared.values()) > sum(_count_shared_columns(free, others).values()):
        raise SettingsError(
            f"the slice {index}, in which {config.name} was being learned, now belongs to "
            f"{', '.join(shared)}",
            where=config.library,
            fix="set resume to false (--no-resume) to begin anew in a free slice",
        )


def _count_shared_columns(
    reservation: SliceReservation, others: Sequence[SliceOwner]
) -> dict[str, int]:
    """Count the columns that other concepts share with the reservation.

    Only concepts that avoid the same directions count, because slices that avoid other directions
    were chosen independently.
    """
    key = slice_key(reservation.basis)
    counts = {
        other.name: sum(map(len, shared_column_numbers(other, reservation).values()))
        for other in others
        if slice_key(other.basis) == key
    }
    return {name: count for name, count in counts.items() if count}


def _warn_of_overlap(
    config: TrainConfig, reservation: SliceReservation, others: Sequence[SliceOwner], family: Family
) -> None:
    """Warn of an index beyond the capacity of a width, and of overlaps with other slices."""
    is_alone = config.library is None
    for width, columns in (
        reservation.slices.items() if is_alone and config.slice is not None else ()
    ):
        avoided = count_shared_directions(int(width), reservation.basis.num_shared_directions)
        limit = capacity(int(width) - avoided, reservation.rank)
        if reservation.index is not None and reservation.index >= limit:
            warnings.warn(
                f"width {width} holds {limit} slices of rank {reservation.rank}, from 0: there, "
                f"slice {reservation.index} has the columns {columns[0]} to {columns[-1]} of slice "
                f"{reservation.index % limit}",
                stacklevel=2,
            )
    for other in others:
        fits_model = isinstance(other, ConceptInfo) and other.fingerprint == family.fingerprint()
        for collision in find_collisions([other, reservation]):
            if collision.columns or fits_model:
                warnings.warn(str(collision), stacklevel=2)
