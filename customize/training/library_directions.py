"""Which directions a run's slices avoid: those of its library, recorded by whoever came first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from customize.concepts.adapter import saved_module_name
from customize.concepts.input_statistics import DIRECTIONS, GUIDANCE, STEPS, generic_prompts
from customize.concepts.slices.shared_directions import (
    SharedDirections,
    directions_path,
    find_direction_files,
    recording_name,
)
from customize.errors import ConceptError, CustomizeError
from customize.families import Family
from customize.training.config import TrainConfig
from customize.training.layer_input_recording import record_generic_inputs
from customize.training.progress import NO_PROGRESS, Progress
from customize.training.trainable import adapted_components


def load_or_record_directions(
    config: TrainConfig,
    family: Family,
    weights: Mapping[str, str],
    resolution: int,
    device: torch.device,
    accelerator: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    before: str = "",
    progress: Progress = NO_PROGRESS,
) -> SharedDirections:
    """What all layers read on generic prompts.

    It is in the library's folder, or the one that the concept's folder is in: recorded by the first
    run there on this base model, in whatever precision and resolution, and then used by all. A
    recording of a model that is nearly the same, such as one that was rounded to half precision
    in memory, is used too where it serves as well as one of its own.

    Args:
        weights: of the base, from :func:`customize.training.base_fingerprint.weight_digests`.
        before: the name of those that the run began with, if it goes on.
        progress: shows how far recording is.

    Raises:
        ConceptError: the file there cannot be read.
        StorageError: it cannot be written.
    """
    folder = config.library or config.output.parent
    prompts = generic_prompts()
    model = {"weights": dict(weights), "configured": family.relevant_config()}
    drawn = {"prompts": prompts, "steps": STEPS, "guidance": GUIDANCE, "directions": DIRECTIONS}
    key = recording_name(model | drawn)
    path = directions_path(folder, key)
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            known = _known(folder, path, _earlier_key(config, family, weights, resolution), before)
            if known is None:
                recorded = record_generic_inputs(
                    family, prompts, resolution, device, autocast, progress
                ).generic
                known = _serving(folder, recorded, config.num_shared_directions)
                known = (known or SharedDirections(key, recorded)).save(path)
            _check_fits(known, family, config, folder)
            answer = [known]
        except CustomizeError as error:
            answer = [error]
    if accelerator.num_processes > 1:  # all avoid the same, and stop for one error
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    if isinstance(answer[0], CustomizeError):
        raise answer[0]
    found: SharedDirections = answer[0]
    return found


def _known(folder: Path, path: Path, earlier: str, before: str) -> SharedDirections | None:
    """Those of a run that goes on, those of the base model, or those that an earlier version
    recorded of it with the same settings."""
    for other in find_direction_files(folder) if before else ():
        with suppress(ConceptError):
            found = SharedDirections.load(other)
            if found.name == before:
                return found
    for file in (path, directions_path(folder, earlier)):
        if file.is_file():
            return SharedDirections.load(file)
    return None


def _check_fits(
    directions: SharedDirections, family: Family, config: TrainConfig, folder: Path
) -> None:
    """Refuse a file that is not of this model whatever its name says."""
    for component in adapted_components(family, config):
        for module, (_, width) in family.adapter_targets(component).items():
            rows = directions.factors.get(component, {}).get(saved_module_name(component, module))
            if rows is None or rows.shape[1] != width:
                has = "none" if rows is None else f"those of width {rows.shape[1]}"
                raise ConceptError(
                    f"the shared directions have {has} of a layer of width {width}, so that they "
                    "are not of this base model",
                    where=f"{folder}: {component}.{module}",
                    fix="put an unchanged copy of the folder's .shared_directions-*.safetensors "
                    "back, or delete the one that the base model does not fit",
                )


def _serving(folder: Path, recorded: Any, avoid: int) -> SharedDirections | None:
    """Those of another recording in the folder that serve as well."""
    for other in find_direction_files(folder):
        with suppress(ConceptError):  # a damaged one that this base model may not need
            found = SharedDirections.load(other)
            if found.covers(recorded, avoid):
                return found
    return None


def _earlier_key(
    config: TrainConfig, family: Family, weights: Mapping[str, str], resolution: int
) -> str:
    """What the file's name ended in when each precision and resolution had one of its own."""
    parts = {key: weights.get(key) for key in sorted(weights)}
    facts = [parts, family.relevant_config(), generic_prompts(), STEPS, GUIDANCE]
    facts += [resolution, config.mixed_precision, config.quantize]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]
