"""Whether a pipeline can take what is asked for; nothing here changes anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from customize.concepts.base_weight import find_unadaptable_layers
from customize.concepts.merge.merge_concepts import LayerMerge
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


def check_base(family: Family, concepts: Iterable[Adaptation]) -> None:
    """Refuse a concept that was learned on another architecture.

    A LoRA from elsewhere says nothing on its base: that its layers are there, of the right
    shapes, is all that can be asked, and is asked when it is fitted in. So it is of a merge of such
    LoRAs, while a merge of concepts says which base they were learned on.

    Raises:
        ConceptError: family, denoiser, layer widths or text encoders differ.
    """
    said = [
        c
        for c in concepts
        if not (isinstance(c, Lora) and c.info.family == family.name and not c.info.fingerprint)
    ]
    # Once for all, as it takes a walk over the model.
    ours = family.fingerprint() if said else {}
    with explain_quantized_layers(family):
        for concept in said:
            _check_base(family, ours, concept)


@contextmanager
def explain_quantized_layers(family: Family) -> Iterator[None]:
    """Say where layers are not found because a quantizer has replaced them by its own.

    Raises:
        PipelineError: in place of a ConceptError from within, naming the quantizer.
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


def _check_base(family: Family, ours: Mapping[str, Any], concept: Adaptation) -> None:
    info, theirs = concept.info, concept.info.fingerprint
    if (info.family, theirs.get("denoiser")) != (ours["family"], ours["denoiser"]):
        raise ConceptError(
            f"the concept {info.name} was learned on {info.family} ({info.base}), which differs "
            f"from this pipeline's {family.name} model in architecture or size",
            fix="load it into a pipeline of the base that it was learned on",
        )
    widths = theirs.get("widths")
    embedded = {key for subject in concept.subjects for key in subject.embeddings}
    for component in {*concept.updates, *embedded}:
        if component not in ours["widths"]:
            raise PipelineError(
                f"the concept {info.name} needs a {component}, which this pipeline lacks",
                fix="load the pipeline with all its parts",
            )
        found = widths.get(component) if isinstance(widths, Mapping) else None
        if found != ours["widths"][component]:
            raise ConceptError(
                f"the concept {info.name} was learned on a {component} of widths {found}, and "
                f"this pipeline's has {ours['widths'][component]}",
                fix="load it into a pipeline of the base that it was learned on",
            )
    for subject in concept.subjects:
        _check_tables(family, subject)


def check_vocabulary(family: Family, concept: Adaptation, but: Collection[str] = ()) -> None:
    """Refuse a concept whose tokens some vocabulary has already.

    Args:
        but: triggers that may be there.

    Raises:
        ConceptError: naming the tokens.
    """
    info = concept.info
    for subject in concept.subjects:
        if subject.trigger in but:
            continue
        # One more than its own: diffusers takes <rex>_2 for a part of <rex>, whoever added it.
        names = vocabulary_entries(subject.trigger, subject.num_tokens + 1)
        names += layer_vocabulary_entries(subject.trigger, subject.num_tokens, subject.token_layers)
        for dictionary in family.token_dictionaries():
            taken = known_tokens(dictionary.tokenizer, names)
            if taken:
                another = f'load the concept under another name: names=["{info.name}-2"]'
                if len(info.triggers) > 1:
                    another = "load the concepts that it was merged from, under other names"
                raise ConceptError(
                    f"the concept {info.name} brings the token {taken[0]}, which the tokenizer has "
                    "already",
                    where=dictionary.key,
                    fix=f"call unload_textual_inversion() if it came from there, or {another}",
                )


def check_layers(
    models: Mapping[str, nn.Module], layers: Iterable[tuple[str, str]], *, wrapping: bool
) -> None:
    """Refuse layers in whose present state an adapter would not do what it should.

    Args:
        models: component -> model.
        layers: (component, module name) of all that are to be changed.
        wrapping: whether an adapter is to be added, or only other factors given to one that is
            there, which concerns none but its layers and the attentions around them.

    Raises:
        PipelineError: a layer has adapters that are fused, switched off, or not LoRA.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = list(layers)
    for component in dict.fromkeys(component for component, _ in layers):
        own = [name for key, name in layers if key == component]
        for name, module in _concerned(models[component], own, wrapping):
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


def _concerned(
    model: nn.Module, layers: Iterable[str], wrapping: bool
) -> Iterable[tuple[str, nn.Module]]:
    if wrapping:
        return model.named_modules()
    # A walk over a whole model takes long beside the swap itself.
    above = [name.rsplit(".", count)[0] for name in layers for count in (1, 2)]
    return [(name, model.get_submodule(name)) for name in dict.fromkeys([*layers, *above])]


def check_range(
    component: str,
    updates: Mapping[str, LowRank],
    dtype: torch.dtype,
    layers: Mapping[str, LayerMerge],
) -> None:
    """Refuse updates that are too large for the type they are to be kept in.

    Args:
        layers: what each update was merged from.

    Raises:
        ConfigError: naming the first such layer, and the concept whose update is the largest there.
    """
    for name, update in updates.items():
        if not _in_range(update, dtype):
            raise ConfigError(
                f"with these weights the concepts' sum leaves the range of {dtype}, mostly by "
                f"{layers[name].largest_concept()}",
                where=f"{component}.{name}",
                fix="give smaller weights",
            )


def _in_range(update: LowRank, dtype: torch.dtype) -> bool:
    """Whether factors and product are finite in a type."""
    if not all(bool(each.to(dtype).isfinite().all()) for each in (update.up, update.down)):
        return False
    most = torch.finfo(dtype).max / max(abs(update.scale), 1e-30)
    rows, columns = update.up.float().norm(dim=1), update.down.float().norm(dim=0)
    if not update.rank or float(rows.max()) * float(columns.max()) <= most:  # none can be larger
        return True
    return float((update.up.double() @ update.down.double()).abs().max()) <= most


def _check_tables(family: Family, subject: Subject) -> None:
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


def check_text_encoders_loaded(family: Family, what: str, where: str) -> None:
    """Refuse a text encoder whose weights are away, where a stage encodes prompts of its own.

    Args:
        what: what the stage does, for the message.
        where: its argument.

    Raises:
        PipelineError: naming the encoder.
    """
    for key, encoder in family.all_text_encoders.items():
        if any(weight.is_meta for weight in encoder.parameters()):
            raise PipelineError(
                f"{what}, and the weights of the {key} are away (sequential offload)",
                where=where,
                fix="use enable_model_cpu_offload() or group offload",
            )
