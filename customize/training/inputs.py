"""What a learned concept's layers read, recorded while the base is at hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from customize.concepts.concept import Concept
from customize.concepts.inputs import LayerInputs, class_words, record, texts, updates_digest
from customize.concepts.layout import INPUTS_FILE
from customize.errors import ConceptError
from customize.families import Family
from customize.training.cache import Encode
from customize.training.config import TrainConfig
from customize.training.setup import Trainable


def prompts_of(config: TrainConfig) -> list[str]:
    """All that is drawn for the record."""
    if not config.record_inputs:
        return []
    return [*texts(config.trigger), *texts(class_words(config.class_word))]


def write_record(
    config: TrainConfig,
    family: Family,
    trainable: Trainable,
    concept: Concept,
    encode: Encode,
    shape: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Write the record of a concept whose adapter and tokens are in the model still.

    What was learned is saved by then, so that a record which cannot be made is only warned of.

    Args:
        encode: knows :func:`prompts_of`.
        shape: (channels, height, width) of latents.
    """
    products = concept.products
    how: dict[str, Any] = {"encode": encode, "autocast": autocast}
    try:
        own = record(family, products, texts(config.trigger), shape, **how)
        with trainable.adapter.silent():
            words = class_words(config.class_word)
            generic = record(family, products, texts(words), shape, **how)
    except ConceptError as error:
        warnings.warn(f"the layer inputs of {config.name} were not recorded: {error}", stacklevel=2)
        return
    LayerInputs(updates_digest(products), own, generic).save(config.output / INPUTS_FILE)
