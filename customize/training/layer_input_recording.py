"""Recording the layer inputs of a learned concept, for merges by fusion."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

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
from customize.errors import ConceptError
from customize.training.config import TrainConfig
from customize.training.run import Run
from customize.training.trainable import TrainableConcept


def recording_prompts(config: TrainConfig) -> list[str]:
    """Return the prompts of the recording; none if the settings disable it."""
    if not config.record_inputs:
        return []
    return [*fill_prompts(config.trigger), *base_prompts(config.class_word)]


def record_concept_inputs(run: Run, trained: TrainableConcept, concept: Concept) -> None:
    """Record the layer inputs of one concept and write them into its folder.

    The adapters of other concepts are disabled. The concept is already saved, so a recording that
    fails is only warned of.

    Args:
        run: The run, whose prompt encoding includes :func:`recording_prompts`.
        trained: The concept's adapter and tokens, attached to the model.
        concept: The saved concept.
    """
    config, family = trained.config, run.family
    layers, shape = updated_layers(family, concept.updates), run.images.shape
    options: dict[str, Any] = {"encode": run.encode, "autocast": run.autocast}
    text = f"recording the layer inputs of {config.name}"
    try:
        with run.trainable.adapters_disabled(except_for=trained):
            track = partial(run.progress.track, text=text)
            prompts = fill_prompts(config.trigger)
            concept_inputs = record_layer_inputs(
                family, layers, prompts, shape, progress=track, **options
            )
        with run.trainable.adapters_disabled():
            track = partial(run.progress.track, text=f"{text} without its adapter")
            prompts = base_prompts(config.class_word)
            generic = record_layer_inputs(family, layers, prompts, shape, progress=track, **options)
    except ConceptError as error:
        warnings.warn(f"the layer inputs of {config.name} were not recorded: {error}", stacklevel=2)
        return
    LayerInputs(digest_updates(concept.updates), concept_inputs, generic).save(
        config.output / LAYER_INPUTS_FILE
    )
