"""Recording what a concept's layers read on a pipeline, which is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from customize.base.offload import check_not_offloaded
from customize.concepts.input_statistics import (
    PROMPTS,
    LayerInputs,
    base_prompts,
    digest_updates,
    fill_prompts,
    record_layer_inputs,
    updated_layers,
)
from customize.concepts.merge.choose_method import (
    AUTO,
    choose_method,
    may_need_inputs,
    parse_method,
    read_record,
)
from customize.concepts.tokens.prompt_phrases import is_truncated
from customize.concepts.types import Adaptation
from customize.core.merges import FUSION, MERGES, SUM
from customize.errors import ConfigError
from customize.families import Family
from customize.pipeline.state import AttachedConcept, AttachedState, MergePlan
from customize.pipeline.transaction import apply_attachments
from customize.text import quote


def parse_merge(merge: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]] | None:
    """What :func:`customize.load_custom` is told about merging: method and settings, checked.

    Raises:
        ConfigError: no such method, or a setting that it does not have.
    """
    return None if merge is None else parse_method(merge)


def resolve_merge(
    family: Family,
    state: AttachedState,
    after: Mapping[str, AttachedConcept],
    chosen: tuple[str, dict[str, Any]] | None,
) -> MergePlan:
    """How the concepts that are to be attached will be merged.

    Args:
        family: of all that the state knows to be changed.
        chosen: of :func:`parse_merge`; None: as before.

    Records that lie beside the concepts are read. For "fusion" those that lack are made, for which
    the pipeline draws.

    Raises:
        ConfigError: a concept that has no record has no words to draw it with; or some are to be in
            the weights and some beside them, by a method that needs them together.
        ConceptError: a record cannot be read, or is not of this concept.
    """
    method, settings = chosen or (
        state.merge_plan.requested_method,
        dict(state.merge_plan.method_settings),
    )
    if len(after) < 2:
        return MergePlan(method, method_settings=settings)
    is_joint = method in MERGES and not MERGES[method].is_separable
    if is_joint and len({each.fused for each in after.values()}) > 1:
        beside = [name for name, each in after.items() if not each.fused]
        raise ConfigError(
            f"{method} merges all concepts together, and {', '.join(beside)} would be beside the "
            "weights, while others are in them",
            where="merge",
            fix="give fuse=True for all or for none, naming those that are attached already in "
            'weights=, or choose "sum"',
        )
    known = {
        name: own
        for name, own in state.merge_plan.input_statistics.items()
        if name in after and not after[name].routed
    }
    cache = state.library_cache
    concepts = [each.concept for each in after.values()]
    read = read_record if cache is None else partial(cache.get_input_statistics, read=read_record)
    found, records, lacking = choose_method(method, concepts, known, read)
    if MERGES[found].needs_inputs:
        made = recorded(family, state, lacking)
        if cache is not None:
            for concept in lacking:
                cache.put_input_statistics(concept, made[concept.info.name])
        records |= made
    return MergePlan(method, found, records if may_need_inputs(method) else {}, settings)


def resolve_merge_without(state: AttachedState, after: Mapping[str, AttachedConcept]) -> MergePlan:
    """How what is left will be merged when some concepts are gone; nothing is read or drawn."""
    before = state.merge_plan
    known = {name: own for name, own in before.input_statistics.items() if name in after}
    method = SUM.name
    if len(after) > 1:
        method = before.requested_method
        if may_need_inputs(method):
            fused = FUSION.name if method == AUTO else method
            method = fused if known.keys() == after.keys() else SUM.name
    return MergePlan(before.requested_method, method, known, before.method_settings)


def recorded(
    family: Family,
    state: AttachedState,
    concepts: Sequence[Adaptation],
    prompts: Sequence[str] | None = None,
    words: str | None = None,
) -> dict[str, LayerInputs]:
    """Concept's name -> its record; see :func:`customize.record_inputs`.

    Args:
        family: of all that the state knows to be changed.
    """
    prompts = PROMPTS if prompts is None else tuple(prompts)
    if not prompts or any("{}" not in prompt for prompt in prompts):
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
    found: dict[str, LayerInputs] = {}
    with _set_aside(family, state):
        for concept in concepts:
            products, info = concept.updates, concept.info
            layers = updated_layers(family, products)
            drawn = fill_prompts(words or info.trigger_words, prompts)
            apply_attachments(family, state, {}, MergePlan())
            generic = record_layer_inputs(
                family, layers, base_prompts(info.class_word, prompts), shape
            )
            apply_attachments(
                family, state, {info.name: AttachedConcept(concept, 1.0, fused=False)}, MergePlan()
            )
            _check_read(family, concept, words or info.trigger_words, drawn)
            own = record_layer_inputs(family, layers, drawn, shape)
            found[info.name] = LayerInputs(digest_updates(products), own, generic)
    return found


def _check_read(family: Family, concept: Adaptation, words: str, prompts: Sequence[str]) -> None:
    """Refuse prompts in which a trigger is behind what the encoders that know it read.

    Args:
        concept: that is attached, so that tokenizers read its triggers as they will.
    """
    if not concept.subjects:  # of whose words a part may do
        return
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


@contextmanager
def _set_aside(family: Family, state: AttachedState) -> Iterator[None]:
    """Within it anything may be attached; afterwards that is again what was before."""
    before, merging = state.attached, state.merge_plan
    try:
        yield
    finally:
        apply_attachments(family, state, before, merging)
