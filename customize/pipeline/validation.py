"""Checks of a request against the pipeline, which change nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from customize.concepts.base_weight import find_unadaptable_layers
from customize.concepts.merge.merge_concepts import LayerMerge
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.tokens.layerwise_embeddings import (
    layer_vocabulary_entries,
    layers_with_embeddings,
)
from customize.concepts.tokens.subjects import Subject
from customize.concepts.tokens.token_rows import known_tokens, vocabulary_entries
from customize.concepts.types import Adaptation, Lora
from customize.core.lowrank import LowRank
from customize.errors import ConceptError, ConfigError, PipelineError
from customize.families import Family
from customize.pipeline.state import AttachedConcept, AttachedState
from customize.user_warnings import warn_user


def check_base(family: Family, concepts: Iterable[Adaptation]) -> None:
    """Refuse concepts that were learned on another architecture.

    A LoRA file records nothing about its base: that its layers exist and have the right shapes is
    all that can be checked, and is checked when they are matched. The same holds for a merge of
    such files, while a merge of concepts records the base that they were learned on.

    Args:
        family: Family of the pipeline's components.
        concepts: Concepts to be attached.

    Raises:
        ConceptError: Family, denoiser, layer widths or text encoders differ.
        PipelineError: The pipeline lacks a component, or a quantizer replaced its layers.
    """
    recorded = [
        concept
        for concept in concepts
        if not (
            isinstance(concept, Lora)
            and concept.info.family == family.name
            and not concept.info.fingerprint
        )
    ]
    if not recorded:
        return
    with explain_quantized_layers(family):
        present = family.fingerprint()  # once for all concepts, since it walks over the model
        for concept in recorded:
            _check_fingerprint(family, present, concept)
            for subject in concept.subjects:
                _check_embeddings(family, subject)


@contextmanager
def explain_quantized_layers(family: Family) -> Iterator[None]:
    """Explain a ConceptError about missing layers by the quantizer that replaced them.

    Raises:
        PipelineError: In place of the ConceptError, naming the quantizer.
    """
    try:
        yield
    except ConceptError as error:
        for key, model in family.adaptable.items():
            for name, quantizer in find_unadaptable_layers(model).items():
                raise PipelineError(
                    f"the layers of the {key} are held by {quantizer}, whose layers take no "
                    "adapter here",
                    where=f"{key}.{name}",
                    fix="load a base that is not quantized, or quantized by bitsandbytes, torchao, "
                    "quanto or GGUF",
                ) from error
        raise


def _check_fingerprint(family: Family, present: Mapping[str, Any], concept: Adaptation) -> None:
    info, recorded = concept.info, concept.info.fingerprint
    if (info.family, recorded.get("denoiser")) != (present["family"], present["denoiser"]):
        raise ConceptError(
            f"the concept {info.name} was learned on {info.family} ({info.base}), which differs "
            f"from this pipeline's {family.name} model in architecture or size",
            fix="load it into a pipeline of the base that it was learned on",
        )
    widths = recorded.get("widths")
    embedded = {key for subject in concept.subjects for key in subject.embeddings}
    for component in {*concept.updates, *embedded}:
        if component not in present["widths"]:
            raise PipelineError(
                f"the concept {info.name} needs a {component}, which this pipeline lacks",
                fix="load the pipeline with all its parts",
            )
        width = widths.get(component) if isinstance(widths, Mapping) else None
        if width != present["widths"][component]:
            raise ConceptError(
                f"the concept {info.name} was learned on a {component} of widths {width}, and "
                f"this pipeline's has {present['widths'][component]}",
                fix="load it into a pipeline of the base that it was learned on",
            )


def _check_embeddings(family: Family, subject: Subject) -> None:
    dictionaries = {dictionary.key: dictionary for dictionary in family.token_dictionaries()}
    if set(dictionaries) != set(subject.embeddings):
        raise ConceptError(
            f"the concept {subject.name} has tokens for "
            f"{', '.join(sorted(subject.embeddings))}, and this pipeline has the vocabularies of "
            f"{', '.join(sorted(dictionaries))}",
            fix="load the pipeline with the text encoders that the concept was learned with",
        )
    layers = len(layers_with_embeddings(family))
    if subject.token_layers not in (0, layers):
        raise ConceptError(
            f"the concept {subject.name} has embeddings for {subject.token_layers} "
            f"cross-attention layers, and this pipeline's {family.denoiser_key} takes {layers}",
            fix="load it into a pipeline of the base that it was learned on",
        )
    for key, rows in subject.embeddings.items():
        text_encoder: Any = dictionaries[key].text_encoder
        table = text_encoder.get_input_embeddings().weight
        if rows.shape[-1] != table.shape[1]:
            raise ConceptError(
                f"the concept {subject.name} has embeddings of width {rows.shape[-1]}, and "
                f"this text encoder's are {table.shape[1]} wide",
                where=key,
                fix="load it into a pipeline of the base that it was learned on",
            )
        if len(dictionaries[key].tokenizer) > table.shape[0]:
            raise PipelineError(
                "the tokenizer has more entries than the embedding table has rows",
                where=key,
                fix="use the tokenizer that belongs to this text encoder",
            )


def check_vocabularies(
    family: Family, state: AttachedState, concepts: Iterable[Adaptation]
) -> None:
    """Refuse concepts whose tokens are in a vocabulary already.

    Args:
        family: Family of all components that the state changes.
        state: State of the models; tokens that it added for earlier calls may be present.
        concepts: Concepts to be attached.

    Raises:
        ConceptError: Names the token.
    """
    added = {trigger for _, trigger in state.token_names}
    for concept in concepts:
        name, triggers = concept.info.name, concept.info.triggers
        for subject in concept.subjects:
            if subject.trigger in added:
                continue
            # One entry more: diffusers takes <rex>_2 for a part of <rex>, whoever added it.
            tokens = vocabulary_entries(subject.trigger, subject.num_tokens + 1)
            tokens += layer_vocabulary_entries(
                subject.trigger, subject.num_tokens, subject.token_layers
            )
            for dictionary in family.token_dictionaries():
                taken = known_tokens(dictionary.tokenizer, tokens)
                if taken:
                    rename = f'load the concept under another name: names=["{name}-2"]'
                    if len(triggers) > 1:
                        rename = "load the concepts that it was merged from, under other names"
                    raise ConceptError(
                        f"the concept {name} brings the token {taken[0]}, which the tokenizer has "
                        "already",
                        where=dictionary.key,
                        fix="call unload_textual_inversion() if it came from there, or " + rename,
                    )


def warn_about_overlaps(
    before: Mapping[str, AttachedConcept], after: Mapping[str, AttachedConcept]
) -> None:
    """Warn of concepts whose slices overlap, unless both were attached before.

    Called before the change, since a warning may be turned into an error.
    """
    for overlap in find_overlaps([attached.concept for attached in after.values()]):
        if not {overlap.first, overlap.second} <= before.keys():
            warn_user(str(overlap))


def check_layers(
    models: Mapping[str, nn.Module], layers: Collection[tuple[str, str]], *, wrapping: bool
) -> None:
    """Refuse layers in whose present state an adapter would not have its effect.

    Args:
        models: component -> model.
        layers: (component, module name) of all layers to be changed.
        wrapping: Whether adapters will be added. Otherwise the present ones get other factors,
            which concerns their layers and the attentions around them alone.

    Raises:
        PipelineError: A layer has adapters that are fused, switched off, or not LoRA.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for component in dict.fromkeys(component for component, _ in layers):
        model = models[component]
        modules: Iterable[tuple[str, nn.Module]] = model.named_modules()
        if not wrapping:  # a walk over the whole model takes long beside a swap
            names = [name for key, name in layers if key == component]
            names += [name.rsplit(".", count)[0] for name in names for count in (1, 2)]
            modules = [(name, model.get_submodule(name)) for name in dict.fromkeys(names)]
        for name, module in modules:
            # Adding an adapter takes what is fused out of every layer of the model.
            if isinstance(module, BaseTunerLayer) and module.merged:
                raise PipelineError(
                    "the adapters of this layer are fused into its weight",
                    where=f"{component}.{name}",
                    fix="call unfuse_lora() first",
                )
            # Diffusers' own flag on the attention outlives unfusing.
            if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
                raise PipelineError(
                    "the projections of this attention are fused into one, which reads none of "
                    "the layers that concepts change",
                    where=f"{component}.{name}",
                    fix="call unfuse_qkv_projections() first",
                )
    for component, name in layers:
        layer: Any = models[component].get_submodule(name)
        if not isinstance(layer, BaseTunerLayer):
            continue
        where = f"{component}.{name}"
        if not isinstance(layer, LoraLayer):
            raise PipelineError(
                f"the layer carries an adapter of another kind, {type(layer).__name__}",
                where=where,
                fix="unload that adapter first",
            )
        if layer.disable_adapters:
            raise PipelineError(
                "the adapters of this layer are switched off",
                where=where,
                fix="call enable_lora() first",
            )


def check_range(
    component: str,
    updates: Mapping[str, LowRank],
    dtype: torch.dtype,
    layers: Mapping[str, LayerMerge],
) -> None:
    """Refuse updates whose factors or product leave the range of a dtype.

    Args:
        component: Component of the layers.
        updates: Module name -> update.
        dtype: dtype of the adapter.
        layers: Module name -> merge that the update was computed from.

    Raises:
        ConfigError: Names the first such layer, and the concept whose update is the largest in it.
    """
    for name, update in updates.items():
        is_finite = all(
            bool(factor.to(dtype).isfinite().all()) for factor in (update.up, update.down)
        )
        if is_finite and update.rank:
            limit = torch.finfo(dtype).max / max(abs(update.scale), 1e-30)
            rows, columns = update.up.float().norm(dim=1), update.down.float().norm(dim=0)
            # No entry is larger than the product of the largest norms.
            if float(rows.max()) * float(columns.max()) > limit:
                product = update.up.double() @ update.down.double()
                is_finite = float(product.abs().max()) <= limit
        if not is_finite:
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of {dtype}, mostly by "
                f"{layers[name].largest_concept()}",
                where=f"{component}.{name}",
                fix="give smaller weights",
            )


def check_text_encoders_loaded(family: Family, action: str, argument: str) -> None:
    """Refuse a text encoder without its weights in memory, for a stage that encodes prompts.

    Args:
        family: Family of the pipeline's components.
        action: What the stage does, for the message.
        argument: Call argument of the stage, for the message.

    Raises:
        PipelineError: Names the text encoder.
    """
    for key, encoder in family.all_text_encoders.items():
        if any(weight.is_meta for weight in encoder.parameters()):
            raise PipelineError(
                f"{action}, and the weights of the {key} are away (sequential offload)",
                where=argument,
                fix="use enable_model_cpu_offload() or group offload",
            )
