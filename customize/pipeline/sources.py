"""What a call is about: the pipeline's model family, and the concepts that it names, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.base.offload import materialize
from customize.concepts.base_weight import dense_weight
from customize.concepts.formats.ignored_parts import check_all_matched, check_ignore, remove_ignored
from customize.concepts.formats.layer_names import LayerNameMap
from customize.concepts.formats.lora_file import BaseWeights, LoraFile, assign_noise_levels
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.types import Adaptation, Concept, Lora
from customize.errors import ConfigError, PipelineError
from customize.families import Family, family_of
from customize.families.pipeline_components import uncompiled
from customize.pipeline.state import AttachedState, get_state
from customize.pipeline.validation import explain_quantized_layers

#: The denoisers that files go into: one for all, or an entry for each source.
Into = str | Sequence[str | Sequence[str] | None] | None


def get_family(pipe: Any) -> Family:
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


def with_all_parts(family: Family, state: AttachedState) -> Family:
    """The family of what was changed, also where the pipeline has freed or replaced some of it."""
    return type(family)(family.components | state.components, family.pipeline_config)


def read_sources(
    family: Family,
    sources: Sequence[object],
    into: Into = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """The concepts that sources name, and LoRAs with their layers found in this family's models.

    Args:
        into, ignore: as in :func:`customize.load_custom`.

    Raises:
        ConceptError: one cannot be read whole, or is a LoRA of other layers.
        ConfigError: something is no source, or ``into`` does not fit the sources or the model.
    """
    words, matched = check_ignore(ignore), set[str]()
    opened_sources = [_opened(source, words, matched) for source in sources]
    check_all_matched(words, matched)
    found = _placed_into(opened_sources, into)
    # Once for all files, as it takes a walk over the model.
    names = LayerNameMap(family) if any(isinstance(each, LoraFile) for each in found) else None

    def placed(each: Adaptation | LoraFile, weights: BaseWeights | None = None) -> Adaptation:
        if not isinstance(each, LoraFile):
            return each
        with explain_quantized_layers(family):
            return each.to_lora(family, weights, names)

    if not any(isinstance(each, LoraFile) and each.needs_base_weights for each in found):
        return [placed(each) for each in found]
    originals = get_state(family).weight_originals
    models = family.adaptable

    def weight(component: str, module: str) -> Tensor:
        place = (component, module)
        if place in originals:
            return originals[place]
        return dense_weight(models[component].get_submodule(module), ".".join(place))

    with materialize(models):
        return [placed(each, weight) for each in found]


def _placed_into(found: Sequence[Adaptation | LoraFile], into: Into) -> list[Adaptation | LoraFile]:
    """The same sources; files know the denoisers that they are for."""
    files = iter(assign_noise_levels([each for each in found if isinstance(each, LoraFile)]))
    placed: list[Adaptation | LoraFile] = []
    for each, components in zip(found, _by_source(into, len(found)), strict=True):
        if isinstance(each, LoraFile):
            placed.append(replace(next(files), into=components))
        elif components:
            raise ConfigError(
                f"{each.info.name} says itself which components it changes",
                where="into",
                fix="leave into out, or give None for it",
            )
        else:
            placed.append(each)
    return placed


def _by_source(into: Into, count: int) -> list[tuple[str, ...]]:
    """The denoisers of each source; empty where it is left to the file."""
    if into is None:
        return [()] * count
    if isinstance(into, str):
        return [(into,)] * count
    entries = list(into) if isinstance(into, Sequence) else []
    if count == 1 and len(entries) > 1:
        entries = [tuple(str(entry) for entry in entries)]
    found = [_components(entry) for entry in entries]
    if len(found) != count:
        raise ConfigError(
            f"{into!r:.100} does not say for {count} concepts where they go",
            where="into",
            fix='give one component, such as "transformer_2", or a list with an entry for each '
            'concept: a component, ("transformer", "transformer_2") for both, or None',
        )
    return found


def _components(entry: object) -> tuple[str, ...]:
    if entry is None:
        return ()
    names = (entry,) if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{entry!r:.100} is not the name of a component",
            where="into",
            fix='give a name such as "transformer_2", or several in a tuple',
        )
    return tuple(names)


def _opened(source: object, ignore: Sequence[str], matched: set[str]) -> Adaptation | LoraFile:
    if isinstance(source, Concept | Lora | LoraFile):
        return remove_ignored(source, ignore, matched)
    if isinstance(source, str | Path):
        return open_adaptation(source, ignore, matched)
    if isinstance(source, list | tuple | set | frozenset):
        raise ConfigError(
            f"a {type(source).__name__} of {len(source)} is not a concept",
            fix="unpack it with a star, as in load_custom(*concepts), or give each by itself",
        )
    if isinstance(source, Mapping):
        raise ConfigError(
            "a dict is not a concept",
            fix='give concepts by themselves and weights beside them: load_custom("rex", '
            'weights={"rex": 0.8})',
        )
    raise ConfigError(
        f"a {type(source).__name__} is not a concept",
        fix="give a folder, a .safetensors file, a hub id or a Concept",
    )
