"""The shared directions that a run's slices avoid: those of its library, or a new recording."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from customize.concepts.adapter import LayerFactors, saved_module_name
from customize.concepts.input_statistics import (
    DIRECTIONS,
    GUIDANCE,
    STEPS,
    generic_prompts,
    record_layer_inputs,
)
from customize.concepts.slices.shared_directions import (
    SharedDirections,
    directions_path,
    find_direction_files,
    recording_name,
)
from customize.errors import ConceptError, PipelineError
from customize.families import Family
from customize.training.config import TrainConfig
from customize.training.distributed import run_on_main_process
from customize.training.finite_checks import suggest_base_fix
from customize.training.prepare_base import move_to_device, offload
from customize.training.run import Run
from customize.training.trainable import adapted_components


def load_or_record_directions(run: Run, previous: str = "") -> SharedDirections:
    """Load the shared directions of the base model from the library, or record them.

    The file is in the library's folder, or in the parent of the output folder. The first run on a
    base model records it, in its own precision and resolution, and all later runs use it. A
    recording of a nearly equal model, such as one rounded to half precision in memory, is used if
    it captures as much energy as a new one would.

    Args:
        run: The run, with the base model.
        previous: Name of the directions in the checkpoint to resume from; "" if there is none.

    Raises:
        ConceptError: A file is damaged, or does not fit the model.
        PipelineError: The base gives values that are not finite.
        StorageError: The file cannot be written.
    """
    folder = run.config.library or run.config.output.parent
    model = {"weights": dict(run.weights), "configured": run.family.relevant_config()}
    recording = {
        "prompts": generic_prompts(),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "directions": DIRECTIONS,
    }
    name = recording_name(model | recording)
    path = directions_path(folder, name)

    def load_or_record() -> SharedDirections:
        legacy = directions_path(
            folder, _legacy_name(run.config, run.family, run.weights, run.resolution)
        )
        directions = _find_directions(folder, [path, legacy], previous)
        if directions is None:
            factors = _record_generic_inputs(run)
            directions = _find_equivalent(folder, factors, run.config.num_shared_directions)
            directions = (directions or SharedDirections(name, factors)).save(path)
        _check_fits(directions, run.family, run.config, folder)
        return directions

    return run_on_main_process(run.accelerator, load_or_record)


def _find_directions(folder: Path, paths: list[Path], previous: str) -> SharedDirections | None:
    """The directions of the run to resume, or of the first existing path."""
    for path in find_direction_files(folder) if previous else ():
        with suppress(ConceptError):
            directions = SharedDirections.load(path)
            if directions.name == previous:
                return directions
    return next((SharedDirections.load(path) for path in paths if path.is_file()), None)


def _find_equivalent(folder: Path, recorded: LayerFactors, count: int) -> SharedDirections | None:
    """Directions of another recording in the folder that serve as well as the recorded ones."""
    for path in find_direction_files(folder):
        with suppress(ConceptError):  # a damaged file may be of another base model
            directions = SharedDirections.load(path)
            if directions.covers(recorded, count):
                return directions
    return None


def _record_generic_inputs(run: Run) -> LayerFactors:
    """Record the inputs of all layers on generic prompts.

    Text encoders and denoisers are on the device one after the other, and on the CPU at the end.
    """
    family = run.family
    family.vae.to(run.device)
    images = torch.zeros(1, 3, run.resolution, run.resolution)
    shape = family.encode_images(images)[0].shape[1:]
    layers = {component: list(family.adapter_targets(component)) for component in family.adaptable}
    encoders = family.all_text_encoders
    move_to_device(encoders, run.device)

    def swap_encoders_for_denoisers() -> None:
        offload(family, encoders, free=False)
        move_to_device(family.denoisers, run.device)

    text = "recording the directions that all prompts share, once for a base"
    try:
        factors = record_layer_inputs(
            family,
            layers,
            generic_prompts(),
            shape,
            include_empty_prompt=True,
            before_denoising=swap_encoders_for_denoisers,
            autocast=run.autocast,
            progress=partial(run.progress.track, text=text),
        )
    except ConceptError as error:
        raise PipelineError(
            f"the base cannot draw generic prompts: {error.problem}",
            where=family.denoiser_key,
            fix=suggest_base_fix(family, family.denoiser.dtype == torch.float16),
        ) from error
    offload(family, family.denoisers, free=False)
    return factors


def _check_fits(
    directions: SharedDirections, family: Family, config: TrainConfig, folder: Path
) -> None:
    """Refuse directions of another model, whatever their file's name is."""
    for component in adapted_components(family, config):
        for module_name, (_, width) in family.adapter_targets(component).items():
            factor = directions.factors.get(component, {}).get(
                saved_module_name(component, module_name)
            )
            if factor is None or factor.shape[1] != width:
                kind = "none" if factor is None else f"those of width {factor.shape[1]}"
                raise ConceptError(
                    f"the shared directions have {kind} of a layer of width {width}, so that they "
                    "are not of this base model",
                    where=f"{folder}: {component}.{module_name}",
                    fix="put an unchanged copy of the folder's .shared_directions-*.safetensors "
                    "back, or delete the one that the base model does not fit",
                )


def _legacy_name(
    config: TrainConfig, family: Family, weights: Mapping[str, str], resolution: int
) -> str:
    """The end of the file's name in versions that recorded each precision and resolution apart."""
    parts = {key: weights.get(key) for key in sorted(weights)}
    facts = [parts, family.relevant_config(), generic_prompts(), STEPS, GUIDANCE]
    facts += [resolution, config.mixed_precision, config.quantize]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]
