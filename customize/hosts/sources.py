"""What a call is about: the pipeline's model family, and the concepts that it names, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.concepts.base_weight import dense_weight
from customize.concepts.concept import Concept
from customize.concepts.formats.lora import Adaptation, Lora, LoraFile
from customize.concepts.formats.lora import Weights as LayerWeights
from customize.concepts.formats.names import Names
from customize.concepts.formats.opening import opened
from customize.errors import ConfigError, PipelineError
from customize.families import Family, family_of
from customize.families.components import uncompiled
from customize.hosts.checks import naming_quantizers
from customize.hosts.offload import settled
from customize.hosts.state import Holder, find


def family_in(pipe: Any) -> Family:
    """The family of a pipeline's components.

    Raises:
        PipelineError: it is no pipeline, or of no known family.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise PipelineError(
            f"a {type(pipe).__name__} is not a diffusers pipeline",
            fix="give a DiffusionPipeline or ModularPipeline",
        )
    # Below torch.compile's wrapper, where modules have the names that files give them.
    inner = {key: uncompiled(part) for key, part in components.items()}
    return family_of(inner, getattr(pipe, "config", None) or {})


def with_all_parts(family: Family, holder: Holder) -> Family:
    """The family of what was changed, also where the pipeline has freed or replaced some of it."""
    return type(family)(family.components | holder.parts, family.pipeline_config)


def read_sources(family: Family, sources: Sequence[object]) -> list[Adaptation]:
    """The concepts that sources name, and LoRAs with their layers found in this family's models.

    Raises:
        ConceptError: one cannot be read whole, or is a LoRA of other layers.
        ConfigError: something is no source.
    """
    found = [_opened(source) for source in sources]
    # Once for all files, as it takes a walk over the model.
    names = Names(family) if any(isinstance(each, LoraFile) for each in found) else None

    def placed(each: Adaptation | LoraFile, weights: LayerWeights | None = None) -> Adaptation:
        if not isinstance(each, LoraFile):
            return each
        with naming_quantizers(family):
            return each.lora(family, weights, names)

    if not any(isinstance(each, LoraFile) and each.needs_weights for each in found):
        return [placed(each) for each in found]
    originals = find(family).originals
    models = family.adaptable

    def weight(component: str, module: str) -> Tensor:
        place = (component, module)
        if place in originals:
            return originals[place]
        return dense_weight(models[component].get_submodule(module), ".".join(place))

    with settled(models):
        return [placed(each, weight) for each in found]


def _opened(source: object) -> Adaptation | LoraFile:
    if isinstance(source, Concept | Lora | LoraFile):
        return source
    if isinstance(source, str | Path):
        return opened(source)
    raise ConfigError(
        f"a {type(source).__name__} is not a concept",
        fix="give a folder, a .safetensors file, a hub id or a Concept",
    )
