"""What layers read, on generic prompts and on the concept's, recorded while the base is here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from customize.concepts.input_statistics import (
    LayerInputs,
    base_prompts,
    digest_updates,
    fill_prompts,
    record_layer_inputs,
    updated_layers,
)
from customize.concepts.io.file_layout import LAYER_INPUTS_FILE
from customize.concepts.types import Concept
from customize.errors import ConceptError, PipelineError
from customize.families import Family
from customize.training.config import TrainConfig
from customize.training.finite_checks import suggest_base_fix
from customize.training.latents_and_embeddings import Encode
from customize.training.prepare_base import move_to_device, offload
from customize.training.progress import NO_PROGRESS, Progress
from customize.training.trainable import Trainable, TrainableConcept


def recording_prompts(config: TrainConfig) -> list[str]:
    """All that is drawn for the record."""
    if not config.record_inputs:
        return []
    return [*fill_prompts(config.trigger), *base_prompts(config.class_word)]


def record_concept_inputs(
    learned: TrainableConcept,
    family: Family,
    trainable: Trainable,
    concept: Concept,
    encode: Encode,
    shape: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write the record of a concept whose adapter and tokens are in the model still.

    It is of the concept alone, also where others were learned with it. What was learned is saved by
    then, so that a record which cannot be made is only warned of.

    Args:
        encode: knows :func:`recording_prompts`.
        shape: (channels, height, width) of latents.
    """
    layers = updated_layers(family, concept.updates)
    config = learned.config
    how: dict[str, Any] = {"encode": encode, "autocast": autocast}
    text = f"recording what the layers of {config.name} read"
    try:
        with trainable.adapters_disabled(but=learned):
            track = partial(progress.track, text=text)
            own = record_layer_inputs(
                family, layers, fill_prompts(config.trigger), shape, progress=track, **how
            )
        with trainable.adapters_disabled():
            prompts = base_prompts(config.class_word)
            track = partial(progress.track, text=f"{text} without it")
            generic = record_layer_inputs(family, layers, prompts, shape, progress=track, **how)
    except ConceptError as error:
        warnings.warn(f"the layer inputs of {config.name} were not recorded: {error}", stacklevel=2)
        return
    LayerInputs(digest_updates(concept.updates), own, generic).save(
        config.output / LAYER_INPUTS_FILE
    )


def record_generic_inputs(
    family: Family,
    prompts: Sequence[str],
    resolution: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress = NO_PROGRESS,
) -> LayerInputs:
    """What all layers read on generic prompts.

    Text encoders and denoisers are on the device one after the other, and on the CPU in the end.

    Raises:
        PipelineError: the base gives values that are not finite.
    """
    family.vae.to(device)
    shape = family.encode_images(torch.zeros(1, 3, resolution, resolution))[0].shape[1:]
    layers = {component: list(family.adapter_targets(component)) for component in family.adaptable}
    encoders = family.all_text_encoders
    move_to_device(encoders, device)

    def ready() -> None:
        offload(family, encoders, free=False)
        move_to_device(family.denoisers, device)

    how: dict[str, Any] = {
        "include_empty_prompt": True,
        "before_denoising": ready,
        "autocast": autocast,
    }
    how["progress"] = partial(
        progress.track, text="recording what all prompts share, once for a base"
    )
    try:
        generic = record_layer_inputs(family, layers, prompts, shape, **how)
    except ConceptError as error:
        raise PipelineError(
            f"the base cannot draw generic prompts: {error.problem}",
            where=family.denoiser_key,
            fix=suggest_base_fix(family, family.denoiser.dtype == torch.float16),
        ) from error
    offload(family, family.denoisers, free=False)
    return LayerInputs("generic prompts", {}, generic)
