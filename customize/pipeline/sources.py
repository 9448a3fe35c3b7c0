"""Reading the arguments of a call: the model family of its pipeline, and concepts."""

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
from customize.pipeline.state import AttachedState
from customize.pipeline.validation import explain_quantized_layers
from customize.references.model import is_model_folder
from customize.text import plural

#: The denoisers that files go into: one for all, or an entry for each source.
Into = str | Sequence[str | Sequence[str] | None] | None


def get_family(pipe: Any) -> Family:
    """Return the model family of a pipeline's components.

    Raises:
        PipelineError: ``pipe`` is not a pipeline, or its family is unknown.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise PipelineError(
            f"a {type(pipe).__name__} is not a diffusers pipeline",
            fix="give a DiffusionPipeline or ModularPipeline",
        )
    # Inside torch.compile's wrapper modules have the names that files use.
    inner = {key: uncompiled(component) for key, component in components.items()}
    return family_of(inner, getattr(pipe, "config", None) or {})


def add_components(family: Family, components: dict[str, Any]) -> Family:
    """Return the family with these components, which the pipeline may have freed or replaced.

    Args:
        family: Family of the components that the pipeline has now.
        components: ``components`` of an :class:`~customize.pipeline.state.AttachedState`.
    """
    return type(family)(family.components | components, family.pipeline_config)


def read_sources(
    family: Family,
    state: AttachedState,
    sources: Sequence[object],
    into: Into = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Adaptation]:
    """Read concepts, and map the keys of LoRA files to the layers of a model.

    Args:
        family: Family of the model.
        state: What is attached to the model; files that need base weights get those before fusing.
        sources: Folders, files, hub ids or concepts.
        into: As for :func:`customize.load_custom`.
        ignore: As for :func:`customize.load_custom`.

    Raises:
        ConceptError: A source cannot be read completely, or is a LoRA of other layers.
        ConfigError: A value is not a source, or ``into`` does not fit the sources or the model.
    """
    patterns, matched = check_ignore(ignore), set[str]()
    opened = [_open(source, patterns, matched) for source in sources]
    check_all_matched(patterns, matched)
    opened = _set_denoisers(opened, into)
    files = [source for source in opened if isinstance(source, LoraFile)]
    if not files:
        return [source for source in opened if not isinstance(source, LoraFile)]
    names = LayerNameMap(family)  # once for all files, since it walks over the model
    models = family.adaptable

    def read_base_weight(component: str, module: str) -> Tensor:
        original = state.weight_originals.get((component, module))
        if original is not None:
            return original
        return dense_weight(models[component].get_submodule(module), f"{component}.{module}")

    needs_weights = any(file.needs_base_weights for file in files)
    base_weights: BaseWeights | None = read_base_weight if needs_weights else None
    with materialize(models if needs_weights else {}), explain_quantized_layers(family):
        return [
            source.to_lora(family, base_weights, names) if isinstance(source, LoraFile) else source
            for source in opened
        ]


def _set_denoisers(
    opened: Sequence[Adaptation | LoraFile], into: Into
) -> list[Adaptation | LoraFile]:
    """Return the sources, with the denoisers of LoRA files set."""
    files = iter(assign_noise_levels([item for item in opened if isinstance(item, LoraFile)]))
    assigned: list[Adaptation | LoraFile] = []
    for source, denoisers in zip(opened, _parse_into(into, len(opened)), strict=True):
        if isinstance(source, LoraFile):
            assigned.append(replace(next(files), into=denoisers))
        elif denoisers:
            raise ConfigError(
                f"{source.info.name} says itself which components it changes",
                where="into",
                fix="leave into out, or give None for it",
            )
        else:
            assigned.append(source)
    return assigned


def _parse_into(into: Into, count: int) -> list[tuple[str, ...]]:
    """Return the denoisers of each source; empty where the file decides."""
    if into is None:
        return [()] * count
    if isinstance(into, str):
        return [(into,)] * count
    entries = list(into) if isinstance(into, Sequence) else []
    if count == 1 and len(entries) > 1:
        entries = [tuple(str(entry) for entry in entries)]
    for entry in entries:
        names = (entry,) if isinstance(entry, str) else entry
        if names is not None and (
            not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names)
        ):
            raise ConfigError(
                f"{entry!r:.100} is not the name of a component",
                where="into",
                fix='give a name such as "transformer_2", or several in a tuple',
            )
    if len(entries) != count:
        raise ConfigError(
            f"{into!r:.100} does not say for {plural(count, 'concept')} where they go",
            where="into",
            fix='give one component, such as "transformer_2", or a list with an entry for each '
            'concept: a component, ("transformer", "transformer_2") for both, or None',
        )
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]


def _open(source: object, ignore: Sequence[str], matched: set[str]) -> Adaptation | LoraFile:
    if isinstance(source, Concept | Lora | LoraFile):
        return remove_ignored(source, ignore, matched)
    if isinstance(source, str | Path):
        if is_model_folder(source):
            raise ConfigError(
                "the folder is a reference model, not a concept",
                where=source,
                fix="read it first: load_custom(customize.References.from_pretrained(...))",
            )
        return open_adaptation(source, ignore, matched)
    if isinstance(source, list | tuple | set | frozenset):
        raise ConfigError(
            f"a {type(source).__name__} of {len(source)} is not a concept",
            where="concepts",
            fix="unpack it with a star, as in load_custom(*concepts), or give each by itself",
        )
    if isinstance(source, Mapping):
        raise ConfigError(
            "a dict is not a concept",
            where="concepts",
            fix='give concepts by themselves and weights beside them: load_custom("rex", '
            'weights={"rex": 0.8})',
        )
    raise ConfigError(
        f"a {type(source).__name__} is not a concept",
        where="concepts",
        fix="give a folder, a .safetensors file, a hub id or a Concept",
    )
