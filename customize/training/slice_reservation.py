"""The slices that a run learns in: chosen, claimed before the first step, held until the end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

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
from customize.training import checkpoint
from customize.training.config import TrainConfig
from customize.training.trainable import input_widths


@contextmanager
def reserve_slices(
    configs: Sequence[TrainConfig],
    family: Family,
    basis: BasisInfo | None,
    before: Sequence[Mapping[str, Any]] | None,
    accelerator: Any,
) -> Iterator[list[int | None]]:
    """Choose the number of each concept of a run and claim its slice, before the first step.

    The claims go when the concepts are written. After an error they stay with the checkpoint that
    the run can go on from; where there is none, all is as it was.

    Args:
        basis: of the slices; None for the method "lora".
        before: each concept's settings in the checkpoint that the run goes on from; their slices
            hold.

    Yields:
        The numbers; None for a slice by the name's hash, or for the method "lora", which has none.

    Raises:
        ConceptError: a concept or a claim in the library cannot be read.
        ConfigError: the rank does not fit a width.
        SettingsError: someone else has taken a slice since the run was cut off.
        StorageError: a claim cannot be written.
    """
    if basis is None:
        yield [None] * len(configs)
        return
    new = [config for config in configs if not os.path.exists(config.output)]
    main = accelerator.is_main_process
    try:
        answer: list[Any] = [None]
        if main:
            try:
                answer = [_claim(configs, family, basis, before)]
            except CustomizeError as error:
                answer = [error]
        if accelerator.num_processes > 1:  # all learn in one slice, and stop for one error
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(answer)
        if isinstance(answer[0], CustomizeError):
            raise answer[0]
        yield answer[0]
    except BaseException:
        kept = checkpoint.latest_step(configs[0].output / ".checkpoints") is not None
        for config in configs if main and kept else ():
            with suppress(CustomizeError):  # what stopped the run is to be told
                slice_reservations.delete_fulfilled_reservation(config.output)
        for config in configs if main and not kept else ():
            slice_reservations.delete_reservation(config.output)
            if config in new:
                with suppress(OSError):  # not empty: class pictures are kept
                    config.output.rmdir()
        raise
    for config in configs if main else ():
        slice_reservations.delete_reservation(config.output)


def _claim(
    configs: Sequence[TrainConfig],
    family: Family,
    basis: BasisInfo,
    before: Sequence[Mapping[str, Any]] | None,
) -> list[int | None]:
    library = configs[0].library
    former = dict(zip((c.name for c in configs), before or (), strict=False))
    chosen: dict[str, SliceReservation] = {}
    with nullcontext() if library is None else slice_reservations.lock_library(library):
        there = [] if library is None else slice_owners(library, exclude=[c.name for c in configs])
        # Where a number is set it stands, so the others keep out of its way.
        for config in sorted(configs, key=lambda config: config.slice is None):
            others = [*there, *chosen.values()]
            if config.slice is not None:
                index: int | None = config.slice
            elif config.name in former:
                index = former[config.name].get("slice")
                _check_still_ours(config, family, basis, index, others)
            else:
                index = _free(config, family, basis, others)
            claim = chosen[config.name] = _claim_of(config, family, basis, index)
            slice_reservations.write_reservation(claim, config.output)
    for number, config in enumerate(configs):
        earlier = [chosen[other.name] for other in configs[:number]]
        _tell(config, chosen[config.name], [*there, *earlier], family)
    return [chosen[config.name].index for config in configs]


def _free(
    config: TrainConfig, family: Family, basis: BasisInfo, others: Sequence[SliceOwner]
) -> int | None:
    """The name's own slice where there is no library, unless one of the run has it."""
    if config.library is None and not _sharing(_claim_of(config, family, basis, None), others):
        return None
    return free_index(others, config.rank, basis, widths=input_widths(family, config))


def _claim_of(
    config: TrainConfig, family: Family, basis: BasisInfo, index: int | None
) -> SliceReservation:
    widths = input_widths(family, config)
    columns = slice_columns(
        widths, config.rank, index=index, name=config.name, avoid=basis.num_shared_directions
    )
    return SliceReservation(
        name=config.name,
        basis=basis,
        rank=config.rank,
        index=index,
        slices={str(width): list(own) for width, own in columns.items()},
    )


def _check_still_ours(
    config: TrainConfig,
    family: Family,
    basis: BasisInfo,
    index: int | None,
    others: Sequence[SliceOwner],
) -> None:
    """Refuse a slice that others hold too, unless the library is so full that none is better."""
    taken = _sharing(_claim_of(config, family, basis, index), others)
    if index is None or not taken:
        return
    free = _free(config, family, basis, others)
    best = _sharing(_claim_of(config, family, basis, free), others)
    if sum(taken.values()) > sum(best.values()):
        raise SettingsError(
            f"the slice {index}, in which {config.name} was being learned, is that of "
            f"{', '.join(taken)} by now",
            where=config.library,
            fix="set resume to false (--no-resume) to begin anew in a free slice",
        )


def _sharing(claim: SliceReservation, others: Sequence[SliceOwner]) -> dict[str, int]:
    """Name -> how many columns the claim shares with its slice; only those with which it does.

    Only of those that avoid the same directions: the others took theirs apart from it.
    """
    same = [other for other in others if slice_key(other.basis) == slice_key(claim.basis)]
    counts = {
        other.name: sum(map(len, shared_column_numbers(other, claim).values())) for other in same
    }
    return {name: count for name, count in counts.items() if count}


def _fits(holder: SliceOwner, family: Family) -> bool:
    """Whether it is a concept that the model takes."""
    return isinstance(holder, ConceptInfo) and holder.fingerprint == family.fingerprint()


def _tell(
    config: TrainConfig, claim: SliceReservation, others: Sequence[SliceOwner], family: Family
) -> None:
    """Warn of columns that are not the concept's alone, and of slices of other columns."""
    alone = config.library is None
    for width, columns in claim.slices.items() if alone and config.slice is not None else ():
        limit = capacity(
            int(width) - count_shared_directions(int(width), claim.basis.num_shared_directions),
            claim.rank,
        )
        if claim.index is not None and claim.index >= limit:
            warnings.warn(
                f"width {width} holds {limit} slices of rank {claim.rank}, from 0: there, slice "
                f"{claim.index} has the columns {columns[0]} to {columns[-1]} of slice "
                f"{claim.index % limit}",
                stacklevel=2,
            )
    for other in others:
        for collision in find_collisions([other, claim]):
            if collision.columns or _fits(other, family):
                warnings.warn(str(collision), stacklevel=2)
