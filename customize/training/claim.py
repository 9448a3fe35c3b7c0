"""The slice that a run learns in: chosen, claimed before the first step, and held until the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from customize.concepts import claims
from customize.concepts.claims import Claim
from customize.concepts.concept import BasisInfo
from customize.concepts.slices import Holder, collisions, columns_for, holders, next_free_index
from customize.core.bases import avoided, capacity
from customize.errors import CustomizeError, SettingsError
from customize.families import Family
from customize.training import checkpoint
from customize.training.config import TrainConfig
from customize.training.trainable import input_widths


@contextmanager
def claimed_slice(
    config: TrainConfig,
    family: Family,
    basis: BasisInfo | None,
    before: Mapping[str, Any] | None,
    accelerator: Any,
) -> Iterator[int | None]:
    """Choose the concept's number and claim its slice, before the first step.

    The claim goes when the concept is written. After an error it stays with the checkpoint that
    the run can go on from; where there is none, all is as it was.

    Args:
        basis: of the slices; None for the method "lora".
        before: the settings of the checkpoint that the run goes on from; its slice holds.

    Yields:
        The number; None for a slice by the name's hash, or for the method "lora", which has none.

    Raises:
        ConceptError: a concept or a claim in the library cannot be read.
        ConfigError: the rank does not fit a width.
        SettingsError: someone else has taken the slice since the run was cut off.
        StorageError: the claim cannot be written.
    """
    if basis is None:
        yield None
        return
    new = not config.output.exists()
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [_claim(config, family, basis, before)]
        except CustomizeError as error:
            answer = [error]
    if accelerator.num_processes > 1:  # all learn in one slice, and stop for one error
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    if isinstance(answer[0], CustomizeError):
        raise answer[0]
    try:
        yield answer[0]
    except BaseException:
        kept = checkpoint.newest_step(config.output / ".checkpoints") is not None
        if accelerator.is_main_process and not kept:
            claims.withdraw_claim(config.output)
            if new:
                with suppress(OSError):  # not empty: class pictures are kept
                    config.output.rmdir()
        raise
    if accelerator.is_main_process:
        claims.withdraw_claim(config.output)


def _claim(
    config: TrainConfig, family: Family, basis: BasisInfo, before: Mapping[str, Any] | None
) -> int | None:
    library = config.library
    with nullcontext() if library is None else claims.alone_in(library):
        others = [] if library is None else holders(library, without=config.name)
        if config.slice is not None:
            index: int | None = config.slice
        elif before is not None:
            index = before.get("slice")
            _check_still_ours(config, family, basis, index, others)
        else:
            index = _free(config, family, basis)
        claim = _claim_of(config, family, basis, index)
        claims.write_claim(claim, config.output)
    _tell(claim, library, others)
    return index


def _free(config: TrainConfig, family: Family, basis: BasisInfo) -> int | None:
    if config.library is None:
        return None
    return next_free_index(
        config.library,
        config.rank,
        basis,
        name=config.name,
        widths=input_widths(family, config),
    )


def _claim_of(config: TrainConfig, family: Family, basis: BasisInfo, index: int | None) -> Claim:
    widths = input_widths(family, config)
    columns = columns_for(widths, config.rank, index=index, name=config.name, avoid=basis.avoid)
    return Claim(
        name=config.name,
        basis=basis,
        rank=config.rank,
        index=index,
        slices={str(width): list(own) for width, own in columns.items()},
    )


def _check_still_ours(
    config: TrainConfig, family: Family, basis: BasisInfo, index: int | None, others: list[Holder]
) -> None:
    """Refuse a slice that others hold too, unless the library is so full that none is better."""
    taken = _sharing(_claim_of(config, family, basis, index), others)
    if index is None or not taken:
        return
    best = _sharing(_claim_of(config, family, basis, _free(config, family, basis)), others)
    if sum(taken.values()) > sum(best.values()):
        raise SettingsError(
            f"the slice {index}, in which {config.name} was being learned, is that of "
            f"{', '.join(taken)} by now",
            where=config.library,
            fix="set resume to false to begin anew in a free slice",
        )


def _sharing(claim: Claim, others: list[Holder]) -> dict[str, int]:
    """Name -> how many columns the claim shares with its slice; only those with which it does."""
    found = [each for other in others for each in collisions([other, claim])]
    counts = {each.first: sum(map(len, each.columns.values())) for each in found}
    return {name: count for name, count in counts.items() if count}


def _tell(claim: Claim, library: Path | None, others: list[Holder]) -> None:
    """Warn of columns that are not the concept's alone."""
    for width, columns in claim.slices.items() if library is None else ():
        limit = capacity(int(width) - avoided(int(width), claim.basis.avoid), claim.rank)
        if claim.index is not None and claim.index >= limit:
            warnings.warn(
                f"width {width} holds {limit} slices of rank {claim.rank}, from 0: there, slice "
                f"{claim.index} has the columns {columns[0]} to {columns[-1]} of slice "
                f"{claim.index % limit}",
                stacklevel=2,
            )
    for other in others:
        for collision in collisions([other, claim]):
            if collision.columns:
                warnings.warn(str(collision), stacklevel=2)
