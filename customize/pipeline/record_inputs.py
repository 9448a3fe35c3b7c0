"""Recording a concept's layer inputs on a pipeline, whose state is restored afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from customize.base.offload import check_not_offloaded
from customize.concepts.adapter import LayerFactors
from customize.concepts.caption_template import caption_template
from customize.concepts.formats.lora_file import LoraFile
from customize.concepts.input_statistics import (
    LayerInputs,
    base_prompts,
    contexts_of,
    digest_updates,
    fill_prompts,
    record_layer_inputs,
    updated_layers,
)
from customize.concepts.tokens.prompt_phrases import is_truncated
from customize.concepts.types import Adaptation
from customize.errors import ConfigError
from customize.families import Family
from customize.pipeline.sources import add_components, get_family, read_sources
from customize.pipeline.state import (
    AttachedConcept,
    AttachedState,
    MergePlan,
    check_shared_components,
    get_state,
)
from customize.pipeline.transaction import apply_attachments
from customize.pipeline.validation import check_base
from customize.text import quote


def record_inputs(
    pipe: Any,
    source: str | Path | Adaptation | LoraFile,
    prompts: Sequence[str] | None,
    words: str | None,
) -> LayerInputs:
    """Read a concept and record its input statistics; see :func:`customize.record_inputs`.

    No other call may use the models meanwhile.
    """
    family = get_family(pipe)
    state = get_state(pipe) or AttachedState()
    concepts = read_sources(family, state, [source])
    check_shared_components(family, state)
    check_base(family, concepts)
    family = add_components(family, state.components)
    (statistics,) = record_concepts(family, state, concepts, prompts, words).values()
    return statistics


def record_concepts(
    family: Family,
    state: AttachedState,
    concepts: Sequence[Adaptation],
    prompts: Sequence[str] | None = None,
    words: str | None = None,
) -> dict[str, LayerInputs]:
    """Return concept name -> input statistics, recorded while the base and the concept draw.

    Args:
        family: Family of all components that the state changes.
        state: State of the models.
        concepts: Concepts to record, attached or not.
        prompts: As for :func:`customize.record_inputs`.
        words: As for :func:`customize.record_inputs`.

    Raises:
        ConfigError: A prompt has no ``{}``, or truncates the words; or a concept records no words.
    """
    if prompts is not None and (not prompts or any("{}" not in prompt for prompt in prompts)):
        raise ConfigError(
            "a prompt to record with has no {} for the concept's words",
            where="prompts",
            fix='write such as "a photo of {} on a beach"; some ten of different places do',
        )
    for concept in concepts:
        if not (words or concept.info.trigger_words):
            raise ConfigError(
                f"{concept.info.name} says no words that call it, so nobody knows what to draw",
                where=concept.info.name,
                fix="say them once: customize record --words, or record_inputs(words=)",
            )
    if not concepts:
        return {}
    check_not_offloaded(family.adaptable | {"vae": family.vae})
    side = family.default_resolution
    with torch.no_grad():
        shape = family.encode_images(torch.zeros(1, 3, side, side))[0].shape[1:]
    recorded: dict[str, LayerInputs] = {}
    # Concepts of one class with updates of the same layers have the same inputs of the base.
    of_base: dict[str, LayerFactors] = {}
    before, merge_plan = state.attached, state.merge_plan
    try:
        for concept in concepts:
            updates, info = concept.updates, concept.info
            layers = updated_layers(family, updates)
            concept_words = words or info.trigger_words
            templates = contexts_of(caption_template(info.training)) if prompts is None else prompts
            concept_prompts = fill_prompts(concept_words, templates)
            plain_prompts = base_prompts(info.class_word, templates)
            key = f"{plain_prompts} {layers}"
            if key not in of_base:
                apply_attachments(family, state, {}, MergePlan())
                of_base[key] = record_layer_inputs(family, layers, plain_prompts, shape)
            alone = {info.name: AttachedConcept(concept, 1.0, fused=False)}
            apply_attachments(family, state, alone, MergePlan())
            if concept.subjects:  # a part of the words of an ordinary LoRA suffices
                _check_not_truncated(family, concept_words, concept_prompts)
            specific = record_layer_inputs(family, layers, concept_prompts, shape)
            recorded[info.name] = LayerInputs(digest_updates(updates), specific, of_base[key])
    finally:
        apply_attachments(family, state, before, merge_plan)
    return recorded


def _check_not_truncated(family: Family, words: str, prompts: Sequence[str]) -> None:
    """Refuse prompts in which an attached concept's words are truncated."""
    for key in family.clip_encoders:
        tokenizer = family.tokenizer_for(key)
        window = int(tokenizer.model_max_length)
        for prompt in prompts:
            if is_truncated(words, prompt, tokenizer, window):
                raise ConfigError(
                    f"the {key} reads {window} tokens of a prompt, and in {quote(prompt)} the "
                    f"words {quote(words)} are cut off",
                    where="prompts",
                    fix="shorten it, or write {} nearer to its beginning",
                )
