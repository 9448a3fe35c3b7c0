"""What layers read, on generic prompts and on the concept's, recorded while the base is here."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from customize.concepts import files
from customize.concepts.adapter import Factors
from customize.concepts.concept import Concept
from customize.concepts.inputs import (
    GUIDANCE,
    STEPS,
    LayerInputs,
    base_prompts,
    generic_prompts,
    layers_of,
    record,
    texts,
    updates_digest,
)
from customize.concepts.layout import INPUTS_FILE
from customize.errors import ConceptError
from customize.families import Family
from customize.training.cache import Encode
from customize.training.config import TrainConfig
from customize.training.setup import place, put_away
from customize.training.trainable import Learned, Trainable


def prompts_of(config: TrainConfig) -> list[str]:
    """All that is drawn for the record."""
    if not config.record_inputs:
        return []
    return [*texts(config.trigger), *base_prompts(config.class_word)]


def write_record(
    learned: Learned,
    family: Family,
    trainable: Trainable,
    concept: Concept,
    encode: Encode,
    shape: Sequence[int],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Write the record of a concept whose adapter and tokens are in the model still.

    It is of the concept alone, also where others were learned with it. What was learned is saved by
    then, so that a record which cannot be made is only warned of.

    Args:
        encode: knows :func:`prompts_of`.
        shape: (channels, height, width) of latents.
    """
    layers = layers_of(family, concept.products)
    config = learned.config
    how: dict[str, Any] = {"encode": encode, "autocast": autocast}
    try:
        with trainable.silent(but=learned):
            own = record(family, layers, texts(config.trigger), shape, **how)
        with trainable.silent():
            prompts = base_prompts(config.class_word)
            generic = record(family, layers, prompts, shape, **how)
    except ConceptError as error:
        warnings.warn(f"the layer inputs of {config.name} were not recorded: {error}", stacklevel=2)
        return
    LayerInputs(updates_digest(concept.products), own, generic).save(config.output / INPUTS_FILE)


def shared_directions(
    config: TrainConfig,
    family: Family,
    weights: Mapping[str, str],
    resolution: int,
    device: torch.device,
    accelerator: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[Factors, str]:
    """What all layers read on generic prompts, and a name for it.

    It is recorded once for a base, into the library's folder or the one that the concept's folder
    is in, so that all concepts there have the same.

    Args:
        weights: of the base, from :func:`customize.training.base.weights_of`.

    Returns:
        component -> module, under the names used in files -> (n, in); and 16 hexadecimal digits.

    Raises:
        ConceptError: the file there cannot be read.
        StorageError: it cannot be written.
    """
    prompts = generic_prompts()
    parts = {key: weights.get(key) for key in sorted(weights)}
    facts = [parts, family.configured(), prompts, STEPS, GUIDANCE]
    facts += [resolution, config.mixed_precision, config.quantize]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder = config.library or config.output.parent
    path = folder / f".shared_directions-{key}.safetensors"
    if accelerator.is_main_process and not path.is_file():
        files.make_folder(folder)
        _record_generic(family, prompts, resolution, device, autocast).save(path)
    accelerator.wait_for_everyone()
    found = LayerInputs.load(path).generic
    digest = hashlib.sha256()
    for component, layers in sorted(found.items()):
        for module, rows in sorted(layers.items()):
            digest.update(f"{component}.{module}\n".encode() + rows.numpy().tobytes())
    return found, digest.hexdigest()[:16]


def _record_generic(
    family: Family,
    prompts: Sequence[str],
    resolution: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> LayerInputs:
    """Text encoders and denoisers are on the device one after the other, and on the CPU in the
    end."""
    family.vae.to(device)
    shape = family.encode_images(torch.zeros(1, 3, resolution, resolution))[0].shape[1:]
    layers = {component: list(family.adapter_targets(component)) for component in family.adaptable}
    encoders = family.all_text_encoders
    place(encoders, device)

    def ready() -> None:
        put_away(family, encoders, free=False)
        place(family.denoisers, device)

    how: dict[str, Any] = {"empty_counts": True, "ready": ready, "autocast": autocast}
    generic = record(family, layers, prompts, shape, **how)
    put_away(family, family.denoisers, free=False)
    return LayerInputs("generic prompts", {}, generic)
